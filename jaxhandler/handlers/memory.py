"""What a run will hold on disk, in host memory and on the device, before it begins."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhandler.data.order import SHUFFLES
from jaxhandler.data.sinks import check_sink
from jaxhandler.data.sizing import (
    device_bytes,
    fitting_rows,
    free_bytes,
    readable,
    row_bytes,
)
from jaxhandler.data.sources import Source, open_source
from jaxhandler.errors import a_type, check_choice, explain
from jaxhandler.handlers.calculator import Calculator
from jaxhandler.handlers.handler import Handler
from jaxhandler.handlers.needs import Gauge
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.run import Run
from jaxhandler.handlers.trainer import Trainer, check_state
from jaxhandler.handlers.validator import Validator
from jaxhandler.typing import Placement

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """The memory ladder of a run in bytes, made by `jh.plan_memory`; printed, it is a table.

    Mappings tell bytes by what they are: "rows", "outputs", and on the device also "parameters",
    "state" (the caller's and the run's copy) and "workspace" (what a step needs besides:
    activations, gradients, the compiler's scratch space). Rows and outputs are counted as the
    device has them, float64 as float32. What lies in host memory and on the device is the most that
    is there at once; `device` is what each of several devices holds.

    Attributes:
        num_rows: Rows of the data, `N`.
        batch_size: Rows of a batch, `B`.
        macrobatch_size: Rows of a macrobatch, `M`, whole batches.
        num_macrobatches: Macrobatches of an epoch.
        mode: "scan" or "loop".
        batch: One batch.
        macrobatch: One macrobatch.
        disk: On disk: all rows, unless they are arrays, and outputs that go to a path.
        host: In host memory: rows that are arrays, macrobatches read ahead, outputs kept.
        device: On the device: two macrobatches of rows and of outputs, and all else.
        there: Of `device`, what lies there already.
        free: Bytes free on the device; None on CPU, where no device says it.
        disk_free: Bytes free on the disk of `out`; None without it.
        auto_size: What `macrobatch_size="auto"` would be now.
        auto_why: What keeps it from being larger.
        device_name: How JAX calls the device.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> calc = jh.calculator(lambda scale, x: scale * x, batch_size=2)
        >>> plan = jh.plan_memory(calc, 3.0, np.zeros((8, 4), np.float32), macrobatch_size=4)
        >>> plan.batch["rows"], plan.macrobatch["rows"], plan.num_macrobatches
        (32, 64, 2)
    """

    num_rows: int
    batch_size: int
    macrobatch_size: int
    num_macrobatches: int
    mode: str
    batch: dict[str, int]
    macrobatch: dict[str, int]
    disk: dict[str, int]
    host: dict[str, int]
    device: dict[str, int]
    there: int
    free: int | None
    disk_free: int | None
    auto_size: int
    auto_why: str
    device_name: str

    @property
    def fits(self) -> bool:
        """Whether what is still to come has room on the device, as far as it says."""
        return self.free is None or sum(self.device.values()) - self.there <= self.free

    def __str__(self) -> str:
        columns = ("batch", "macrobatch", "disk", "host", "device")
        rungs = [getattr(self, column) for column in columns]
        table = [("", *columns)]
        table += [(name, *(_cell(rung.get(name)) for rung in rungs)) for name in self.device]
        table.append(("in all", *(_cell(sum(rung.values())) for rung in rungs)))
        table.append(("already there", "", "", "", "", _cell(self.there)))
        table.append(("free", "", "", _cell(self.disk_free), "", _cell(self.free)))
        rows = [f"{row[0]:13}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in table]
        visits = f"{self.num_macrobatches:,} macrobatch{'es' * (self.num_macrobatches != 1)}"
        steps = f"{self.macrobatch_size // self.batch_size:,} batches of {self.batch_size:,}"
        lines = [
            f"{self.num_rows:,} rows in {visits} of at most {self.macrobatch_size:,}, "
            f"each a {self.mode} over {steps}, on {self.device_name}",
            *(row.rstrip() for row in rows),
        ]
        if not self.fits:
            lines.append("That is more than is free: lower macrobatch_size or batch_size.")
        auto = f'macrobatch_size="auto" would take {self.auto_size:,} rows: {self.auto_why}.'
        return "\n".join([*lines, auto])

    __repr__ = __str__


def plan_memory(
    handler: Handler,
    params: Any,
    data: Any,
    *,
    consts: Any = (),
    out: Any = None,
    macrobatch_size: int | str = 10_000,
    shuffle: str | None = "auto",
    read_ahead: int = 1,
    sharding: Placement = None,
) -> MemoryPlan:
    """Says what a run will hold where, before it begins; no row is read and nothing is placed.

    The workspace is measured from the compiled plans of a batch and, for a scan, of a macrobatch.
    They are compiled into the handler's cache, where the run finds them.

    Args:
        handler: A calculator, validator, trainer or handler of your own.
        params: What its `*_from_host` takes first: parameters, a trainer's `TrainState`, a carry.
            Instead of arrays also `jax.ShapeDtypeStruct`s, as `jax.eval_shape` gives them.
        data: What `jh.open_source` takes.
        consts: For a handler of your own, what its step only reads.
        out: As in `calc_from_host`: None for NumPy arrays, or a path.
        macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
        shuffle: As in the run; "auto" is "rows" for a trainer and None for others, as there.
        read_ahead: Macrobatches read ahead.
        sharding: How a batch lies on several devices.

    Returns:
        A `MemoryPlan`. Print it.

    Raises:
        TypeError: If `handler` is none, a trainer gets no `TrainState`, or a leaf is no array.
        ValueError: If an argument makes no sense, the step does not fit the rows, or "auto" finds
            that not even one batch at a time fits the device.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> calc = jh.calculator(lambda params, x: x @ params, batch_size=500)
        >>> np.save("x.npy", np.zeros((30_000, 64), np.float32))
        >>> plan = jh.plan_memory(calc, jnp.ones((64, 4)), "x.npy", macrobatch_size=7_000)
        >>> plan.batch
        {'rows': 128000, 'outputs': 8000}
        >>> plan.device["rows"], plan.device["outputs"], plan.device["parameters"]
        (3584000, 224000, 1024)
    """
    check_choice("shuffle", shuffle, ("auto", *SHUFFLES))
    check_sink(out, data)
    consts, carry = _parts(handler, params, consts)
    if shuffle == "auto":
        shuffle = "rows" if isinstance(handler, Trainer) else None
    source = open_source(data)
    options = Options(
        macrobatch_size=macrobatch_size,
        shuffle=shuffle,
        key=np.zeros(2, np.uint32),  # No order is drawn.
        read_ahead=read_ahead,
        sharding=sharding,
        dry=True,
    )
    run = Run(handler.program, handler.step, consts, carry, source, options)
    gauge, free = run.gauge(), free_bytes(run.device)
    fit = fitting_rows(source.num_rows, run.program.batch_size, gauge.beforehand(), free)
    # A trainer may go on to the next epoch before the last macrobatch of this one is done.
    visits = 2 + read_ahead if isinstance(handler, Trainer) else run.num_visits
    return MemoryPlan(
        num_rows=source.num_rows,
        batch_size=run.program.batch_size,
        macrobatch_size=run.size,
        num_macrobatches=run.num_visits,
        mode=run.mode,
        batch=_global(run, min(run.program.batch_size, source.num_rows)),
        macrobatch=_global(run, min(run.size, source.num_rows)),
        disk=_disk(run, data, out),
        host=_host(run, data, out, visits),
        device=_device(run, gauge, visits),
        there=gauge.there(),
        free=free,
        disk_free=None if out is None else shutil.disk_usage(Path(out).parent).free,
        auto_size=fit.rows,
        auto_why=fit.why,
        device_name=str(run.device),
    )


def _parts(handler: Any, params: Any, consts: Any) -> tuple[Any, Any]:
    """Returns consts and carry."""
    if not isinstance(handler, Handler):
        expected = "what jh.calculator, validator, trainer or handler gives"
        raise TypeError(explain("handler", seen=a_type(handler), expected=expected))
    if not isinstance(handler, Calculator | Validator | Trainer):
        return consts, params
    if not isinstance(consts, tuple) or consts:
        fix = "Pass all it takes as params."
        seen = f"some for {a_type(handler)}"
        raise ValueError(explain("consts", seen=seen, expected="none", fix=fix))
    if isinstance(handler, Trainer):
        check_state(params, "params")
        return (), params
    return params, ()


def _global(run: Run, rows: int) -> dict[str, int]:
    """Counts rows and outputs of `rows` rows, on however many devices."""
    program, out = run.program, run.traced.out
    outputs = 0
    if program.outputs == "rows":
        outputs = rows * row_bytes(out, row_axis=program.row_axis)
    elif program.outputs == "steps":
        outputs = -(-rows // program.batch_size) * device_bytes(out)
    return {"rows": rows * row_bytes(run.source.specs), "outputs": outputs}


def _disk(run: Run, data: Any, out: Any) -> dict[str, int]:
    rows = _global(run, run.source.num_rows)["rows"] - _held(data)
    written = out is not None and run.program.outputs == "rows"
    return {"rows": rows, "outputs": _global(run, run.num_rows)["outputs"] if written else 0}


def _host(run: Run, data: Any, out: Any, visits: int) -> dict[str, int]:
    size, num_rows = min(run.size, run.source.num_rows), run.source.num_rows
    # One is on its way to the device while others are read ahead.
    read = 0 if run.borrows else size * min(run.options.read_ahead + 1, visits)
    permuted = 0
    if run.options.shuffle in ("rows", "blocks"):
        permuted = num_rows % run.size if run.layout.scan and run.layout.gather else size
    kept = run.num_rows if out is None or run.program.outputs != "rows" else 0
    # Off an accelerator outputs come as a copy; on CPU they are host memory already.
    copied = run.program.outputs == "rows" and (run.program.row_axis > 0 or not run.on_cpu)
    return {
        "rows": _held(data) + _global(run, read + permuted)["rows"],
        "outputs": _global(run, kept)["outputs"] + copied * _global(run, size)["outputs"],
    }


def _device(run: Run, gauge: Gauge, visits: int) -> dict[str, int]:
    size, num_rows = run.program.batch_size, run.source.num_rows
    batch = macrobatch = gauge.batch()
    steps, workspace = -(-min(run.size, num_rows) // size), batch.workspace
    if run.mode == "scan" and num_rows >= run.size:
        steps, macrobatch = 1, gauge.block(run.size)
        workspace = macrobatch.workspace
        # The last macrobatch, if it is short, goes batch by batch.
        if num_rows % run.size >= size:
            workspace = max(workspace, batch.workspace)
    parameters = device_bytes(gauge.consts)
    return {
        "rows": min(visits, 2) * steps * macrobatch.rows,
        "outputs": min(visits, 2) * steps * macrobatch.outputs,
        "parameters": parameters,
        "state": gauge.held() - parameters + macrobatch.state,
        "workspace": workspace,
    }


def _held(data: Any) -> int:
    """Counts those of the rows that are arrays in memory."""
    total = 0
    for leaf in jax.tree.leaves(data, is_leaf=lambda leaf: isinstance(leaf, Source)):
        if isinstance(leaf, Source):
            total += leaf.num_rows * row_bytes(leaf.specs) if leaf.borrow else 0
        elif isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, np.memmap):
            total += math.prod(leaf.shape) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize
    return total


def _cell(size: int | None) -> str:
    return "" if size is None else readable(size)
