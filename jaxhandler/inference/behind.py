"""Plans compiled behind requests: one thread, which is there only while it has work."""

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Behind"]


class Behind:
    """Builds what is asked for in a thread, one after another, each thing once.

    Args:
        build: `build(bucket)`; what fails is not tried again.

    Example:
        >>> built = []
        >>> behind = Behind(built.append)
        >>> behind.ask(8)
        >>> behind.wait()
        >>> built
        [8]
    """

    def __init__(self, build: Callable[[int], Any]) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._waiting: dict[int, None] = {}
        self._failed: set[int] = set()
        self._thread: threading.Thread | None = None

    def ask(self, bucket: int) -> None:
        """Has a bucket built, unless it waits already or has failed."""
        with self._lock:
            if bucket in self._waiting or bucket in self._failed:
                return
            self._waiting[bucket] = None
            if self._thread is None:
                # Asked by a daemon it would be one too, and be ended within XLA, which aborts.
                thread = threading.Thread(
                    target=self._work, name="jaxhandler-compile", daemon=False
                )
                try:
                    thread.start()
                except RuntimeError:
                    # Some versions of Python begin no threads while they end.
                    self._waiting = {}
                else:
                    self._thread = thread

    def wait(self) -> None:
        """Waits until nothing is being built."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                bucket = next(iter(self._waiting), None)
                # Where Python ends, nobody is to be served any more.
                if bucket is None or not threading.main_thread().is_alive():
                    self._thread = None
                    return
            failed = True
            try:
                self._build(bucket)
                failed = False
            except Exception:
                # A request that cannot do without this plan meets the error itself.
                pass
            with self._lock:
                del self._waiting[bucket]
                if failed:
                    self._failed.add(bucket)
