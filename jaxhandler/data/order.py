"""The order rows are visited in: a function of the order key, the epoch and the macrobatch size."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.errors import check_choice, explain
from jaxhandler.trees import is_key

__all__ = [
    "SHUFFLES",
    "Visit",
    "check_order",
    "generator_of",
    "macrobatch_rows",
    "num_visits",
    "visits",
]

SHUFFLES = (None, "blocks", "rows", "global")


class Visit(NamedTuple):
    """One macrobatch to be visited.

    Attributes:
        epoch: Epoch, 0-based.
        position: Its place in the epoch's order, 0-based.
        block: Its number in the data, 0-based; None under global shuffle.
        start: Its first row in the data; 0 under global shuffle.
        rows: Rows it visits.
        order: None where rows are visited as they lie, else row numbers: counted from `start`, or
            from the data's first row under global shuffle. `[rows]`, or `[rows, E]` where each
            member of an ensemble has an order of its own.
        batches: Size and block number of each batch in the order visited; the number is None where
            rows are shuffled.
        before: Rows of the epoch visited before it.
    """

    epoch: int
    position: int
    block: int | None
    start: int
    rows: int
    order: np.ndarray | None
    batches: tuple[tuple[int, int | None], ...]
    before: int = 0


def macrobatch_rows(macrobatch_size: int, batch_size: int) -> int:
    """Returns `macrobatch_size` rounded down to whole batches, at least one."""
    return max(macrobatch_size // batch_size, 1) * batch_size


def num_visits(num_rows: int, size: int, batch_size: int, tail: str) -> int:
    """Returns how many macrobatches an epoch visits."""
    return -(-_visited(num_rows, batch_size, tail) // size)


def check_order(shuffle: object, key: object, *, scattered: bool) -> None:
    """Refuses an order that cannot be drawn.

    Args:
        shuffle: None, "blocks", "rows" or "global".
        key: The order key, needed by all but None.
        scattered: Whether the source reads scattered rows, needed by "global".

    Raises:
        ValueError: If the shuffle is unknown, has no key, or the source cannot read scattered rows.
    """
    check_choice("shuffle", shuffle, SHUFFLES)
    if shuffle is not None and key is None:
        fix = "Pass key=jax.random.key(...)."
        raise ValueError(explain("key", seen="None", expected=f"a key for {shuffle=}", fix=fix))
    if shuffle == "global" and not scattered:
        fix = 'Use shuffle="rows", or rewrite the data in a random order once.'
        seen = "a source that reads ranges only"
        expected = 'one that reads scattered rows for shuffle="global"'
        raise ValueError(explain("data", seen=seen, expected=expected, fix=fix))


def visits(
    num_rows: int,
    size: int,
    batch_size: int,
    *,
    tail: str = "exact",
    shuffle: str | None = None,
    key: Any = None,
    epoch: int = 0,
    members: int | None = None,
    resample: bool = False,
) -> Iterator[Visit]:
    """Yields one epoch's macrobatches in the order they are visited.

    `None` keeps the data's order. `"blocks"` permutes macrobatches, and the batches inside each, as
    PuzzleLib's trainer does; a short batch may then come anywhere in its macrobatch. `"rows"`
    permutes macrobatches and the rows inside each. `"global"` permutes all rows, as `"rows"` does
    when one macrobatch holds them all. Drawn on the host with NumPy's Philox, nothing is compiled.

    Args:
        num_rows: Rows of the data, `N`.
        size: Rows of a macrobatch, a whole number of batches.
        batch_size: Rows of a batch.
        tail: With "drop", the rows of the short batch are left out.
        shuffle: One of `SHUFFLES`.
        key: The order key; None draws nothing.
        epoch: Which epoch, 0-based; each has its own order.
        members: How many members of an ensemble draw an order of their own, under "rows" and
            "global": member i that of a single model with the order key `fold_in(key, i)`. The
            macrobatches come in one order for all.
        resample: Whether rows are drawn with replacement, a bootstrap of each macrobatch: once for
            all epochs, which go over them in new orders.

    Yields:
        `Visit`s.
    """
    visited = _visited(num_rows, batch_size, tail)
    starts = np.arange(0, visited, size)
    keys = [key] if members is None else [jax.random.fold_in(key, i) for i in range(members)]

    def drawn(draw: int, rows: int) -> np.ndarray:
        orders = [_drawn(key, epoch, draw, rows, resample) for key in keys]
        # Row numbers are int32 in batches too, and there are many of these.
        return orders[0] if members is None else np.stack(orders, axis=1).astype(np.int32)

    if shuffle == "global":
        # One macrobatch of all rows, visited in pieces.
        everything = drawn(1, num_rows)
        for position, start in enumerate(range(0, visited, size)):
            order = everything[start : min(start + size, visited)]
            batches = tuple(zip(_cut(len(order), batch_size), itertools.repeat(None), strict=False))
            yield Visit(epoch, position, None, 0, len(order), order, batches, start)
        return
    if shuffle is not None:
        starts = generator_of(key, epoch, 0).permutation(starts)
    before = 0
    for position, start in enumerate(map(int, starts)):
        whole = min(size, num_rows - start)
        rows = min(whole, visited - start)
        block, order = start // size, None
        counts = _cut(rows, batch_size)
        batches = tuple(zip(counts, itertools.count(), strict=False))
        if shuffle == "rows":
            order = drawn(block + 1, whole)[:rows]
            batches = tuple(zip(counts, itertools.repeat(None), strict=False))
        elif shuffle == "blocks":
            numbers = generator_of(key, epoch, block + 1).permutation(len(counts))
            batches = tuple((counts[number], int(number)) for number in numbers)
            pieces = [number * batch_size + np.arange(counts[number]) for number in numbers]
            order = np.concatenate(pieces)
        yield Visit(epoch, position, block, start, rows, order, batches, before)
        before += rows


def generator_of(key: Any, epoch: int, draw: int) -> np.random.Generator:
    """Returns what orders are drawn with: NumPy's Philox, the same numbers in every process.

    Args:
        key: A `jax.random.key`, or its raw data.
        epoch: Which epoch, 0-based.
        draw: Which of its draws: 0 is the order of the macrobatches, from 1 on those of the rows
            inside each.

    Returns:
        A generator of its own for each of these.
    """
    data = jax.random.key_data(key) if is_key(key) else key
    seed = [*np.ravel(np.asarray(data)).tolist(), epoch, draw]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def _drawn(key: Any, epoch: int, draw: int, rows: int, resample: bool) -> np.ndarray:
    generator = generator_of(key, epoch, draw)
    if not resample:
        return generator.permutation(rows)
    # Drawn anew in each epoch, every row would sooner or later come to every member.
    drawn = generator_of(key, 0, draw).integers(rows, size=rows)
    return generator.permutation(drawn) if epoch else drawn


def _visited(num_rows: int, batch_size: int, tail: str) -> int:
    return num_rows // batch_size * batch_size if tail == "drop" else num_rows


def _cut(rows: int, batch_size: int) -> list[int]:
    full, rest = divmod(rows, batch_size)
    return [batch_size] * full + [rest] * (rest > 0)
