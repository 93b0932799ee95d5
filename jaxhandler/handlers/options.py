"""How a run goes over its rows: the arguments that all `*_from_host` have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.checkpointing.saver import Leg
from jaxhandler.data.order import check_order
from jaxhandler.data.sources import Source
from jaxhandler.errors import a_type, check_choice, check_count, explain
from jaxhandler.handlers.parts import Share
from jaxhandler.handlers.program import Program
from jaxhandler.typing import Callback, Placement, Step

__all__ = ["Options", "check_options"]


class Options(NamedTuple):
    """How one run goes over its rows; the arguments of the same names of `*_from_host`.

    `checkpoint` only says what makes runs the same; commits are made by `fold_durably`. `split`
    gives the step over so many micro-batches of a batch, or None where there is none; `share` is
    what a run that is taken up again had on the device at once. `resident` says that the rows lie
    on the device already; `dry` that nothing is read, placed or copied, because only plans are
    wanted.
    """

    macrobatch_size: int | str = 10_000
    shuffle: str | None = None
    key: Any = None
    epochs: int = 1
    first_epoch: int = 0
    on_macrobatch_start: Callback | None = None
    on_macrobatch_finish: Callback | None = None
    progress: bool = False
    read_ahead: int = 1
    sharding: Placement = None
    checkpoint: Checkpoint | Leg | None = None
    on_oom: str = "raise"
    split: Callable[[int], Step | None] | None = None
    share: Share | None = None
    resident: bool = False
    dry: bool = False


def check_options(options: Options, source: Source, program: Program) -> None:
    """Refuses options that make no sense.

    Args:
        options: As given.
        source: Where rows come from.
        program: The handler's program.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one has a value that makes no sense, or does not fit the others.
    """
    check_order(options.shuffle, options.key, scattered=source.take is not None)
    if program.member_order is not None and options.shuffle not in ("rows", "global"):
        seen, expected = f"{options.shuffle!r} for members with orders of their own", '"rows"'
        raise ValueError(explain("shuffle", seen=seen, expected=expected))
    check_count("epochs", options.epochs)
    check_count("read_ahead", options.read_ahead, least=0)
    check_choice("on_oom", options.on_oom, ("raise", "halve"))
    for name in ("on_macrobatch_start", "on_macrobatch_finish"):
        callback = getattr(options, name)
        if callback is not None and not callable(callback):
            seen = a_type(callback)
            raise TypeError(explain(name, seen=seen, expected="a function of one Progress"))
