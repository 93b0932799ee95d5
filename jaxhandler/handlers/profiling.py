"""A profile of chosen macrobatches, for TensorBoard, XProf or Perfetto."""

import os
from typing import Any

import jax

from jaxhandler.errors import check_count, explain, warn
from jaxhandler.typing import Progress

__all__ = ["Profile"]


class Profile:
    """Writes what host and device do during some macrobatches with `jax.profiler`.

    A callback for both hooks of a run, and a context around it. In the trace, the host's stages are
    named `jaxhandler_read`, `jaxhandler_transfer` and `jaxhandler_write`, handing a macrobatch to
    the device is a step `jaxhandler_macrobatch` with its number, and the operations of the step
    function are under `jaxhandler_step`.

    Args:
        folder: Where the trace goes; TensorBoard and XProf open it.
        first: The first macrobatch in it, counted from 1 over all epochs of the run; the default
            leaves out the one that compiles.
        num_macrobatches: How many, from then on.
        perfetto: Whether to write `perfetto_trace.json.gz` besides, for ui.perfetto.dev.

    Raises:
        TypeError: If a number is not whole, or `folder` is no path.
        ValueError: If a number is below one.

    Example:
        >>> import tempfile
        >>> import numpy as np, jaxhandler as jh
        >>> calc = jh.calculator(lambda params, x: params * x, batch_size=2)
        >>> hooks = ("on_macrobatch_start", "on_macrobatch_finish")
        >>> x = np.ones(6, np.float32)
        >>> with jh.callbacks.Profile(tempfile.mkdtemp(), num_macrobatches=1) as profile:
        ...     called = dict.fromkeys(hooks, profile)
        ...     outputs = calc.calc_from_host(2.0, x, macrobatch_size=2, **called)
        >>> profile.profiled
        1
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        first: int = 2,
        num_macrobatches: int = 3,
        perfetto: bool = False,
    ) -> None:
        self._folder, self._perfetto = os.fspath(folder), perfetto
        self._first = check_count("first", first)
        self._last = self._first + check_count("num_macrobatches", num_macrobatches) - 1
        self._seen, self._open = 0, False
        self.profiled = 0

    def __call__(self, progress: Progress) -> None:
        """Begins or ends the trace, where it is time to."""
        number = (progress.epoch - 1) * progress.num_macrobatches + progress.macrobatch
        self._seen = max(self._seen, number)
        if progress.batch == 0:
            if number == self._first and not self._open:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=self._perfetto)
                self._open = True
        elif self._open and number <= self._last:
            self.profiled += 1
            if number == self._last:
                progress.wait()
                self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()
        if not self.profiled and error[0] is None:
            text = explain(
                "profile",
                seen=f"a run of {self._seen} macrobatches" if self._seen else "no call",
                expected=f"macrobatch {self._first}",
                fix="Pass it as on_macrobatch_start and on_macrobatch_finish, or lower first.",
            )
            warn(text)

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
