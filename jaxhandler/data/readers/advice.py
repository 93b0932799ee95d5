"""What would read faster: one warning for slow codecs, one for chunks that reads do not fit."""

from typing import Any

from jaxhandler.errors import explain, warn

__all__ = ["Watch", "warn_of_codec"]

_SLOW = frozenset({"brotli", "bz2", "deflate", "gzip", "lzf", "lzma", "szip", "zlib"})
_HIGH_LEVEL = 10
_MANY = 1000


def warn_of_codec(name: str, codec: str, level: Any = None) -> bool:
    """Warns if reading is slow because of how rows were compressed.

    Args:
        name: How messages call the file or array.
        codec: The codec's name.
        level: Its level, where that is known.

    Returns:
        Whether it warned.

    Example:
        >>> warn_of_codec("x.zarr", "lz4")
        False
    """
    high = codec == "zstd" and isinstance(level, int) and level >= _HIGH_LEVEL
    if not high and codec not in _SLOW:
        return False
    seen = f"rows compressed by {codec}" + (f" at level {level}" if high else "")
    fix = "Runs will wait for it; write rows that are read often uncompressed, or with LZ4."
    warn(explain(name, seen=seen, expected="a codec as fast as the disk", fix=fix))
    return True


class Watch:
    """Counts the rows decoded in vain, and warns once when they are much of the work.

    A short read at the end or a look at one row is no reason: it takes two whole chunks.

    Args:
        name: How messages call the file or array.
        unit: What its format calls chunks.
        said: What has been warned of, shared by the columns of a file: one of them speaks for all.
    """

    def __init__(self, name: str, unit: str = "chunks", said: set[str] | None = None) -> None:
        self._name, self._unit = name, unit
        self._said = set() if said is None else said
        self._decoded = self._asked = 0

    def count(self, asked: int, blocks: int, rows: int, chunks: int = 0) -> None:
        """Takes note of a read.

        Args:
            asked: The rows that were asked for.
            blocks: How many groups of rows have to be decoded as a whole for them.
            rows: The rows of such a group.
            chunks: In how many pieces these lie.
        """
        self._decoded, self._asked = self._decoded + blocks * rows, self._asked + asked
        if self._said:
            return
        if self._decoded - self._asked > max(self._asked // 2, 2 * rows):
            seen = f"{self._unit} of {rows} rows, read {asked} at a time"
            fix = f"Pass macrobatch_size={rows}, or write {self._unit} of {asked} rows."
        elif chunks > _MANY:
            seen = f"{chunks} {self._unit} for {asked} rows"
            fix = f"Write {self._unit} of about {asked} whole rows."
        else:
            return
        self._said.add(self._unit)
        expected = f"{self._unit} as large as a macrobatch"
        warn(explain(self._name, seen=seen, expected=expected, fix=fix))
