"""What an inferer tells of itself."""

from typing import NamedTuple

__all__ = ["InfererStats"]


class InfererStats(NamedTuple):
    """What an inferer has done since it was made.

    Attributes:
        hits: Calls of plans that were there.
        misses: Plans looked for, in calls or by `preload`, that had to be compiled or waited for.
        compiles: Plans compiled.
        compile_seconds: Seconds spent compiling, traces included.
        rows: Rows asked for.
        padded_rows: Rows added to fill buckets.
        evictions: Plans dropped to stay within `max_plans`.
        sizes: How many requests had how many rows.

    Example:
        >>> InfererStats(rows=3, padded_rows=1).padding
        0.25
    """

    hits: int = 0
    misses: int = 0
    compiles: int = 0
    compile_seconds: float = 0.0
    rows: int = 0
    padded_rows: int = 0
    evictions: int = 0
    sizes: dict[int, int] = {}  # noqa: RUF012

    @property
    def padding(self) -> float:
        """Added rows as a fraction of all rows computed."""
        return self.padded_rows / max(self.rows + self.padded_rows, 1)
