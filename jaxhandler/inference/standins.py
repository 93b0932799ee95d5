"""Larger plans that stand in for those that are not there yet."""

from collections.abc import Collection, Sequence

from jaxhandler.inference.policies import Part

__all__ = ["stood_in"]


def stood_in(parts: Sequence[Part], there: Collection[int]) -> tuple[Part, ...]:
    """Returns the parts of a request as the plans that are there compute them.

    A part whose bucket has no plan goes to the next larger one that is there. Several in a row
    share it: as few calls of the largest of their plans as hold their rows. Where no larger plan
    is there, a part stays as it is.

    Args:
        parts: What the policy says.
        there: The buckets whose plans are there.

    Returns:
        The parts of the same rows, in order.

    Example:
        >>> stood_in([Part(8, 8), Part(4, 4), Part(1, 1)], {8})
        (Part(rows=8, bucket=8), Part(rows=5, bucket=8))
    """
    held, found = sorted(there), list[Part]()
    rows = bucket = 0
    for part in (*parts, None):
        larger = None if part is None or part.bucket in there else _least(held, part.bucket)
        if part is not None and larger is not None:
            rows, bucket = rows + part.rows, max(bucket, larger)
            continue
        while rows:
            first = min(rows, bucket)
            found.append(Part(first, _least(held, first) or bucket))
            rows -= first
        bucket = 0
        if part is not None:
            found.append(part)
    return tuple(found)


def _least(held: Sequence[int], size: int) -> int | None:
    """The smallest bucket there that holds so many rows."""
    return next((bucket for bucket in held if bucket >= size), None)
