"""Device memory that ran out: how it is told, and what a run does and says then."""

import contextlib
import gc
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from jaxhandler.data.sizing import (
    MemoryNeeds,
    device_bytes,
    fitting_rows,
    free_bytes,
    readable,
    row_bytes,
)
from jaxhandler.errors import DeviceMemoryError, explain
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.parts import Share
from jaxhandler.handlers.program import Program
from jaxhandler.typing import Step

__all__ = ["Rations", "is_shortage", "let_frames_go", "refusing"]


class Rations:
    """How much of a macrobatch a run has on the device at once; less where memory ran out.

    What did not fit is not tried again by the next run of the same step and sizes, that of the next
    epoch for instance.

    Args:
        program: The handler's program.
        step: Its step.
        options: How the run goes.
        size: Rows of a macrobatch, `M`.
        specs: The source's.
        out: The types of the step's output.

    Attributes:
        share: How much.
        step: The step that goes with it.
    """

    def __init__(
        self, program: Program, step: Step, options: Options, size: int, specs: Any, out: Any
    ) -> None:
        self._program, self._options, self._size = program, options, size
        self._num_rows = jax.tree.leaves(specs)[0].shape[0]
        self._batches = -(-min(size, max(self._num_rows, 1)) // program.batch_size)
        rows = program.batch_size * row_bytes(specs)
        outputs = 0 if program.outputs is None else device_bytes(out)
        self._needs = MemoryNeeds(rows, outputs)
        self._whole = self.step = step
        self.share, self._before = Share(), None
        self._known: dict[str, Share] = {}
        if options.on_oom == "halve":
            self._known = program.traces.get(("share", step, size, rows), dict)
        found = options.share or self._known.get("share")
        if found is not None:
            self._take(found)

    @property
    def rows(self) -> int:
        """Rows on the device at once."""
        batches = self.share.batches
        return self._size if batches is None else batches * self._program.batch_size

    def halve(self) -> bool:
        """Halves the share; returns whether that was wanted and there was less to be had."""
        before = self.share
        if self._options.on_oom != "halve" or not self._take(before.halved(self._batches)):
            return False
        self._before = self._before or before
        return True

    def forget(self) -> None:
        """Lets the next run begin with all: where nothing fits, it was not the sizes alone."""
        self._known.clear()

    def _take(self, share: Share) -> bool:
        step = self._whole
        if share.pieces > 1:
            split, pieces = self._options.split, share.pieces
            if split is None or pieces >= 2 * self._program.batch_size:
                return False
            # Made once, or each run would compile it.
            key = ("micro-batches", step, pieces)
            step = self._program.traces.get(key, lambda: split(pieces))
            if step is None:
                return False
        self.share, self.step = share, step
        return True

    def proven(self, device: Any) -> str:
        """Says what was halved, once it has proved to be enough; empty where nothing was.

        Args:
            device: The device whose memory ran out.
        """
        before, self._before = self._before, None
        if before is None:
            return ""
        self._known["share"] = self.share
        size, pieces = self._program.batch_size, self.share.pieces
        before_rows = min((before.batches or self._batches) * size, self._num_rows)
        text = (
            f"on_oom: the memory of {device} ran out with {before_rows:,} rows of a macrobatch of "
            f"{self._size:,} there. The run goes on with {self.rows:,} at a time, in the same "
            f"batches of {size:,}"
        )
        if pieces == 1:
            return f"{text}."
        return (
            f"{text}, each in {pieces} micro-batches; random keys and batch statistics are those "
            "of micro-batches."
        )

    def refusal(self, device: Any, workspace: int, state: int) -> str:
        """Says which sizes did not fit, what they consist of, and what would fit.

        Args:
            device: The device whose memory ran out.
            workspace: Bytes that the plans used so far need besides; 0 where none is known.
            state: Bytes of parameters and state.
        """
        needs, size = self._needs._replace(workspace=workspace), self._program.batch_size
        resident = self._options.resident
        batches = min(self.share.batches or self._batches, self._batches)
        seen = f"{batches:,} batch{'es' * (batches > 1)} of {size:,} rows at once"
        if self.share.pieces > 1:
            seen += f" in {self.share.pieces} micro-batches each"
        times = "" if resident else " (both twice where macrobatches follow each other)"
        seen += (
            f", macrobatch_size={self._size}: {readable(batches * needs.rows)} of rows and "
            f"{readable(batches * needs.outputs)} of outputs{times}, "
            f"{readable(workspace) if workspace else 'unknown'} workspace, "
            f"{readable(state)} of parameters and state"
        )
        free = free_bytes(device)
        expected = f"what {device} has room for"
        if free is not None:
            expected += f", where {readable(free)} are free besides what lies there"
        moved = needs.rows + needs.outputs
        hopeless = free is not None and moved + workspace > free
        if resident or batches == 1 or hopeless or workspace > 2 * batches * moved:
            fix = self._smaller(moved + workspace, free)
            return explain("batch_size", seen=seen, expected=expected, fix=fix)
        fits = -(-batches // 2) * size
        if free is not None:
            fits = min(fitting_rows(self._num_rows, size, needs, free).rows, fits)
        fix = (
            f'Pass macrobatch_size={fits}, or on_oom="halve" to have parts of macrobatches there, '
            "in the same order."
        )
        return explain("macrobatch_size", seen=seen, expected=expected, fix=fix)

    def _smaller(self, needed: int, free: int | None) -> str:
        """Advises a batch that may fit: half of what did not, or less where less is free."""
        size = self._program.batch_size
        fits = size // self.share.pieces // 2
        if free is not None:
            fits = min(fits, size * free // max(needed, 1))
        if fits < 1 and self._options.resident:
            return "Call *_from_host, which has two macrobatches there."
        if fits < 1:
            return "One row is more than there is room for; take a smaller model."
        fix = (
            f"Pass batch_size={fits}, or keep a trainer's and raise accumulate, which splits it "
            "into micro-batches"
        )
        if self._options.resident:
            return f"{fix}; or call *_from_host, which has two macrobatches there."
        halves = self._options.on_oom == "halve"
        return f"{fix}." if halves else f'{fix}; on_oom="halve" does so where it must.'


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left.

    Args:
        error: Any error.

    Example:
        >>> is_shortage(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory ..."))
        True
    """
    # The second is the driver's, where a library of its own asks it.
    words = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")
    told = isinstance(error, jax.errors.JaxRuntimeError)
    return told and any(word in str(error) for word in words)


def let_frames_go(error: BaseException | None) -> None:
    """Drops the variables of the calls that an error came through: they hold arrays.

    Args:
        error: What was caught.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


@contextlib.contextmanager
def refusing(program: Program, options: Options, tree: Any) -> Iterator[None]:
    """Says which sizes a run has that finds a device full before it begins, or as it ends.

    Args:
        program: The handler's program.
        options: How the run goes.
        tree: What lies on the device whatever the sizes, parameters and state.

    Raises:
        DeviceMemoryError: If the block finds it so.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_shortage(error):
            raise
        let_frames_go(error)
        arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
        seen = (
            f"batches of {program.batch_size:,} rows, "
            f"macrobatch_size={options.macrobatch_size!r}, {readable(device_bytes(arrays))} of "
            "parameters and state"
        )
        fix = "Let arrays go that are not needed, or lower the sizes."
        expected = "what the device has room for"
        text = explain("batch_size", seen=seen, expected=expected, fix=fix)
        raise DeviceMemoryError(text) from error
