"""What commits when it is time, in a thread of its own, and before a signal ends what is kept."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.checkpointing.commits import Commit, Commits
from jaxhandler.checkpointing.leaves import flatten, nodes_of
from jaxhandler.files import sync_file
from jaxhandler.leaving import Leaving

__all__ = ["Leg", "Saver", "unsaved"]


class Saver:
    """Commits what its user hands it, as often as a checkpoint says.

    Used as a context. While something is there that no commit holds, SIGTERM and Ctrl-C wait for
    `save`; whatever leaves the context, what `rest` last gave it is committed first. What a signal
    raises says where the newest commit stands, if its content has that as "at".

    Args:
        commits: Where to.
        every: Seconds between two commits; 0 commits whenever it can and waits for the disk.
        at: Where the commit stands that the folder holds already; "" where there is none.

    Attributes:
        failed: The error by which the context was left, which a signal may have come over.
        stopped_by: What a callback raised, by which the context is left once all is saved.
    """

    def __init__(self, commits: Commits, every: float, at: str = "") -> None:
        self._commits, self._every, self._at = commits, every, at
        self._last, self._behind = time.monotonic(), False
        self._rest: Callable[[], None] | None = None
        self._saving: Future[None] | None = None
        self.failed: Exception | None = None
        self.stopped_by: BaseException | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jaxhandler-save")
        self._leaving = Leaving(lambda: self.behind)

    def __enter__(self) -> "Saver":
        self._leaving.__enter__()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # Before signals have their way again: what is being written shall be whole.
        try:
            try:
                if (rest := self._rest) is not None:
                    # From here on a signal waits for it.
                    self._behind, self._rest = True, None
                    rest()
            except Exception as failed:
                if not isinstance(error, Exception):
                    error = failed
                    raise
                error.add_note(unsaved(failed))
            finally:
                self.failed = error if isinstance(error, Exception) else None
                self._pool.shutdown(wait=True)
                self._leaving.__exit__()
        except (KeyboardInterrupt, SystemExit) as stop:
            self._tell(stop)
            raise
        if error is not None and (
            error is self.stopped_by or isinstance(error, KeyboardInterrupt | SystemExit)
        ):
            self._tell(error)

    @property
    def behind(self) -> bool:
        """Whether something is there that no commit holds, nor will where the context is left."""
        return self._behind and self._rest is None

    def leaves(self, error: BaseException) -> bool:
        """Whether an error is what a signal raised that does not wait."""
        return error is self._leaving.raised

    def due(self) -> bool:
        """Whether to save as soon as nothing is under way; there is something from now on."""
        self._behind, self._rest = True, None
        free = not self._every or self._saving is None or self._saving.done()
        return (free and time.monotonic() - self._last >= self._every) or self._leaving.wanted

    def check(self) -> None:
        """Raises what went wrong with the last commit, if it has ended.

        Raises:
            OSError: If it could not be written.
        """
        if self._saving is not None and self._saving.done():
            self._saving.result()

    def save(
        self,
        content: dict[str, Any],
        trees: Mapping[str, Any],
        files: Iterable[Path] = (),
        *,
        wait: bool = False,
    ) -> None:
        """Commits, once the commit before is whole.

        Args:
            content: What the manifest shall say, JSON.
            trees: Trees of arrays by name, which nobody changes any more.
            files: Files that must be on the disk before.
            wait: Whether to return only when the commit is whole, as it does where a signal waits.

        Raises:
            OSError: If this commit, waited for, or the one before could not be written.
        """
        if self._saving is not None:
            self._saving.result()
        self._saving = self._pool.submit(self._write, content, trees, files)
        self._last, self._behind, self._rest = time.monotonic(), False, None
        if wait or not self._every or self._leaving.wanted:
            self._saving.result()

    def rest(self, content: dict[str, Any], trees: Mapping[str, Any]) -> None:
        """Says what to commit where the context is left; signals need not wait for it.

        Args:
            content: As for `save`.
            trees: As for `save`.
        """
        self._rest = lambda: self.save(content, trees, wait=True)
        self.leave()

    def leave(self) -> None:
        """Lets a signal that waits do what it would have done."""
        self._leaving.grant()

    def _tell(self, error: BaseException) -> None:
        """Notes where the run is saved, if it is, in what ends it."""
        if self._at:
            folder = self._commits.folder
            error.add_note(f"Saved in {folder} at {self._at}; the same call goes on from there.")

    def _write(self, content: dict[str, Any], trees: Mapping[str, Any], files: Any) -> None:
        for file in files:
            sync_file(file)
        entries: dict[str, Any] = {}
        arrays: dict[str, np.ndarray] = {}
        for name, tree in trees.items():
            entries[name], found = flatten(tree, name)
            arrays |= found
        nodes = {name: nodes_of(tree, name) for name, tree in trees.items()}
        self._commits.add(content, entries, arrays, nodes)
        self._at = content.get("at", "")


def unsaved(error: Exception) -> str:
    """Returns the note of an error after which saving failed as well."""
    return f"What was under way could not be saved: {type(error).__name__}: {error}"


class Leg(NamedTuple):
    """One run of several that are kept together, an epoch of a fit: whose commits it adds to.

    Attributes:
        saver: What commits.
        content: Gives what else a manifest says, JSON.
        trees: Trees that a commit holds beside the run's own.
        resolved: What "auto" stands for; filled in where it is empty.
        commit: Where to go on in the middle of the run; None begins it.
    """

    saver: Saver
    content: Callable[[], dict[str, Any]]
    trees: Mapping[str, Any]
    resolved: dict[str, Any]
    commit: Commit | None
