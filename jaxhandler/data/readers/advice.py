"""What would read faster: one warning for slow codecs, one for chunks that reads do not fit."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxhandler.errors import explain, warn

__all__ = ["Codec", "Watch", "codec_of", "warn_of_codecs"]

# Its name, and its level where that is known.
Codec = tuple[str, Any]

_SLOW = frozenset(
    {"brotli", "bz2", "bzip2", "deflate", "gzip", "lzf", "lzma", "szip", "xz", "zlib"}
)
_HIGH_LEVEL = 10
_HIGHEST_BLOSC = 9
_MANY = 1000


def codec_of(entry: Mapping[str, Any]) -> Codec:
    """Returns the codec that an entry in the metadata of Zarr or N5 is.

    Args:
        entry: As stored: with an "id" (Zarr 2), a "name" and a "configuration" (Zarr 3), or a
            "type" (N5).

    Returns:
        Its name, of Blosc that of the codec inside, and its level.

    Example:
        >>> codec_of({"id": "blosc", "cname": "zstd", "clevel": 5})
        ('zstd', 9)
        >>> codec_of({"name": "numcodecs.lzma", "configuration": {"preset": 6}})
        ('lzma', None)
    """
    name = next((str(entry[key]) for key in ("name", "id", "type") if key in entry), "")
    options = entry.get("configuration", entry)
    level = options.get("level")
    if name == "blosc":
        # What Blosc makes of its own levels for Zstandard.
        name, level = options["cname"], options["clevel"]
        level = 22 if level == _HIGHEST_BLOSC else 2 * level - 1
    return name.rpartition(".")[2], level


def warn_of_codecs(name: str, codecs: Iterable[Codec], said: set[str] | None = None) -> None:
    """Warns of the first codec that makes reading slow.

    Args:
        name: How messages call the file or array.
        codecs: Those that its rows were compressed by.
        said: As in `Watch`.
    """
    said = set() if said is None else said
    for codec, level in codecs:
        high = codec == "zstd" and isinstance(level, int) and level >= _HIGH_LEVEL
        if "codecs" in said or not (high or codec in _SLOW):
            continue
        said.add("codecs")
        seen = f"rows compressed by {codec}" + (f" at level {level}" if high else "")
        fix = "Runs will wait for it; write rows that are read often uncompressed, or with LZ4."
        warn(explain(name, seen=seen, expected="a codec as fast as the disk", fix=fix))


class Watch:
    """Counts the rows decoded in vain, and warns once when they are much of the work.

    A short read at the end or a look at one row is no reason: it takes two whole chunks.

    Args:
        name: How messages call the file or array.
        unit: What its format calls chunks.
        said: What has been warned of, shared by the columns of a file or of arrays that were opened
            together: one of them speaks for all.
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
        if self._unit in self._said:
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
