"""The evaluator: metrics exact over all rows, the model on the device, the sums on the host."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxhandler.assembly.metrics import Metrics
from jaxhandler.assembly.needs import leaves_of
from jaxhandler.data.database import Database
from jaxhandler.data.selecting import select_columns
from jaxhandler.data.sources import Source, open_source
from jaxhandler.errors import check_count, explain
from jaxhandler.handlers.calculator import Calculator, calculator
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.validator import check_rows
from jaxhandler.typing import Placement

__all__ = ["Evaluator", "make_evaluator"]

# Rows whose columns are held at once where no model says how many.
_PIECE = 10_000


@dataclass(frozen=True)
class Evaluator(Calculator):
    """Computes metrics over rows; made by `jh.assemble_for_training`.

    The model runs on the device, batch after batch. What comes back is added up in float64 on the
    host, a macrobatch at a time: no metric is a mean of means, none depends on the batch size, and
    no split is held in memory. It is a calculator of the model's outputs, too, and
    `jh.ensemble(evaluator, members=E)` gives metrics `[E]`.

    Attributes:
        program: Its description.
        step: The pure step `(consts, carry, batch) -> (carry, out)`.
        metrics: What is added up.
        inputs: Columns that the model reads.
        targets: Columns that its outputs are compared with.
        plot_maker: What draws the states that `collect` gives; None where nothing is drawn.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> error = jh.losses.mae(jh.pred("y"), jh.true("t"))
        >>> apply_fn = lambda params, inputs: {"y": params * inputs["x"]}
        >>> columns = {"x": jnp.arange(4.0), "t": jnp.zeros(4)}
        >>> modules, _ = jh.assemble_for_training(
        ...     error, {"MAE": error}, model=apply_fn, params=1.0, specs=columns
        ... )
        >>> modules.evaluator.evaluate(2.0, columns)
        {'MAE': 3.0}
        >>> modules.evaluator.names
        ('MAE',)
    """

    metrics: Metrics = field(default_factory=lambda: Metrics({}))
    inputs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    plot_maker: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its metrics, in the order given."""
        return tuple(self.metrics.expressions)

    @property
    def rising(self) -> tuple[str, ...]:
        """The names of metrics of which more is better, `accuracy` and `rsq` that stand alone."""
        return self.metrics.rising()

    @property
    def columns(self) -> dict[str, list[str]]:
        """The columns that it reads, as `db_info` has them."""
        return {"inputs": list(self.inputs), "targets": list(self.targets)}

    def with_batch_size(self, batch_size: int) -> "Evaluator":
        """Returns the same evaluator with batches of another size; plans stay in its cache.

        Args:
            batch_size: Rows of a batch, `B`.

        Returns:
            An `Evaluator`.

        Raises:
            TypeError: If `batch_size` is no whole number.
            ValueError: If it is below one.

        Example:
            >>> evaluator = make_evaluator(lambda params, inputs: {}, Metrics({}))
            >>> evaluator.with_batch_size(7).program.batch_size
            7
        """
        size = check_count("batch_size", batch_size)
        return dataclasses.replace(self, program=self.program._replace(batch_size=size))

    def evaluate(
        self,
        params: Any,
        data: Any,
        *,
        macrobatch_size: int | str = 10_000,
        progress: bool = False,
        read_ahead: int = 1,
        sharding: Placement = None,
        on_oom: str = "raise",
    ) -> dict[str, Any]:
        """Computes the metrics over rows in host memory or on disk.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: Columns by name: a dict of arrays, a path, a source, a database. Only columns that
                are needed are read.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            on_oom: What is done where the device's memory runs out, "raise" or "halve", as in
                `Calculator.calc_from_host`.

        Returns:
            Metrics by name, numbers in float64; of an ensemble arrays `[E]`. NaN where no entry
            counts.

        Raises:
            TypeError: If the data have no named columns, or a dtype JAX does not have.
            ValueError: If there are no rows, or a column is missing.
            OSError: If rows cannot be read.

        Example:
            >>> import jax.numpy as jnp, jaxhandler as jh
            >>> spread = jh.losses.std(jh.pred("y"))
            >>> apply_fn = lambda params, inputs: {"y": params * inputs["x"]}
            >>> columns = {"x": jnp.array([1.0, 3.0])}
            >>> modules, _ = jh.assemble_for_training(
            ...     spread, [spread], model=apply_fn, params=1.0, specs=columns
            ... )
            >>> modules.evaluator.evaluate(2.0, columns)
            {"std(pred('y'))": 2.0}
        """
        metrics, _ = self._collect(
            params,
            data,
            drawn=False,
            macrobatch_size=macrobatch_size,
            progress=progress,
            read_ahead=read_ahead,
            sharding=sharding,
            on_oom=on_oom,
        )
        return metrics

    def collect(
        self,
        params: Any,
        data: Any,
        *,
        macrobatch_size: int | str = 10_000,
        progress: bool = False,
        read_ahead: int = 1,
        sharding: Placement = None,
        on_oom: str = "raise",
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Computes the metrics, and in the same pass what plots are drawn from.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: Columns by name: a dict of arrays, a path, a source, a database.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            on_oom: What is done where the device's memory runs out, "raise" or "halve", as in
                `Calculator.calc_from_host`.

        Returns:
            `(metrics, states)`: as `evaluate` gives them, and a state for each plot, which
            `plot_maker.draw` takes; of an ensemble the states of its first member.

        Raises:
            TypeError: If the data have no named columns, or a dtype JAX does not have.
            ValueError: If there are no rows, or a column is missing.
            OSError: If rows cannot be read.

        Example:
            >>> import jax.numpy as jnp, jaxhandler as jh
            >>> error = jh.losses.mae(jh.pred("y"), jh.true("t"))
            >>> apply_fn = lambda params, inputs: {"y": params * inputs["x"]}
            >>> columns = {"x": jnp.arange(4.0), "t": jnp.zeros(4)}
            >>> modules, _ = jh.assemble_for_training(
            ...     error, {"MAE": error}, model=apply_fn, params=1.0, specs=columns
            ... )
            >>> modules.evaluator.collect(2.0, columns)
            ({'MAE': 3.0}, ())
        """
        return self._collect(
            params,
            data,
            drawn=True,
            macrobatch_size=macrobatch_size,
            progress=progress,
            read_ahead=read_ahead,
            sharding=sharding,
            on_oom=on_oom,
        )

    def _collect(
        self, params: Any, data: Any, *, drawn: bool, **options: Any
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        stacked = self.program.members is not None and self.program.row_axis == 1
        members = self.program.members if stacked and self.program.members else 1
        gathered = [self.metrics.init() for _ in range(members)]
        with contextlib.closing(self._blocks(params, data, options)) as blocks:
            for outputs, columns in blocks:
                for member in range(members):
                    own = (
                        {name: out[member] for name, out in outputs.items()} if stacked else outputs
                    )
                    gathered[member] = self.metrics.update(
                        gathered[member], leaves_of(own, columns), drawn=drawn and not member
                    )
        host = jax.device_get(params) if self.metrics.regularized() else ()
        each = [
            self.metrics.finish(
                one, jax.tree.map(lambda leaf, i=member: leaf[i], host) if stacked else host
            )
            for member, one in enumerate(gathered)
        ]
        if not stacked:
            return each[0], gathered[0].plots
        metrics = {name: np.array([one[name] for one in each]) for name in self.names}
        return metrics, gathered[0].plots

    def _blocks(
        self, params: Any, data: Any, options: dict[str, Any]
    ) -> Generator[tuple[dict[str, Any], dict[str, Any]], None, None]:
        """Yields outputs and what they are compared with, macrobatch by macrobatch."""
        if not self.inputs and not self.targets:
            return
        source = columns_source(data, sorted({*self.inputs, *self.targets}))
        check_rows(source)
        truths = columns_source(source, self.targets).read if self.targets else lambda *_: {}
        if not self.inputs:
            for start in range(0, source.num_rows, _PIECE):
                yield {}, truths(start, min(start + _PIECE, source.num_rows))
            return
        start = 0
        for outputs in self.iter_from_host(params, columns_source(source, self.inputs), **options):
            stop = start + _num_rows(outputs, self.program.row_axis)
            yield outputs, truths(start, stop)
            start = stop


def make_evaluator(
    model_fn: Callable[..., Any],
    metrics: Metrics,
    *,
    inputs: tuple[str, ...] = (),
    targets: tuple[str, ...] = (),
    plot_maker: Any = None,
    batch_size: int = 128,
) -> Evaluator:
    """Makes an evaluator of a model and metrics.

    Args:
        model_fn: `model_fn(params, inputs)` gives outputs by name.
        metrics: What is added up.
        inputs: Columns that it reads; none where metrics are of no output.
        targets: Columns that outputs are compared with.
        plot_maker: What draws, or None.
        batch_size: Rows of a batch, `B`.

    Returns:
        An `Evaluator`.
    """

    def build(program: Program) -> Evaluator:
        return Evaluator(program, metrics, inputs, targets, plot_maker)

    return build(calculator(model_fn, batch_size=batch_size).program._replace(build=build))


def columns_source(data: Any, names: Sequence[str]) -> Source:
    """Returns a source of some columns; others are not opened where that can be helped.

    Args:
        data: A dict of arrays, a path, a source, a database.
        names: Which columns, at least one.

    Returns:
        A source of a dict.

    Raises:
        TypeError: If there are no named columns.
        ValueError: If one is missing.
    """
    if isinstance(data, Database):
        return data.source(columns=names)
    if isinstance(data, Mapping):
        _check_columns("data", data, names)
        return open_source({name: data[name] for name in names})
    source = data if isinstance(data, Source) else open_source(data)
    if not isinstance(source.specs, Mapping):
        fix = 'Pass a dict: {"x": x, "y": y}.'
        text = explain(source.name, seen=str(source), expected="columns by name", fix=fix)
        raise TypeError(text)
    _check_columns(source.name, source.specs, names)
    return select_columns(source, names)


def _num_rows(outputs: Any, axis: int) -> int:
    leaves = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
    if not isinstance(outputs, Mapping) or isinstance(leaves[0], Mapping):
        fix = (
            "Leave reduce out for metrics by member, or pass a function that averages each output."
        )
        seen, expected = "outputs that are not those of the model", "arrays by name"
        raise TypeError(explain("reduce", seen=seen, expected=expected, fix=fix))
    return leaves[0].shape[axis]


def _check_columns(argument: str, columns: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        seen = f"no column {' and '.join(map(repr, missing))}"
        expected = f"{', '.join(names)}; there are {', '.join(sorted(columns))}"
        raise ValueError(explain(argument, seen=seen, expected=expected))
