"""Whether bytes of an output of ours are those that were written: compared before they are used."""

import os
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler import checksums
from jaxhandler.errors import explain
from jaxhandler.files import blaming

__all__ = ["FOREIGN", "Intact", "rows_of"]

_FIX = (
    "It was damaged or changed after it was written; write it again, or delete the manifest if you "
    "meant to change it."
)
_SETTLED, _MOST_FILES = 10**9, 10_000
_compared: dict[tuple[str, int, int, int, int], np.ndarray] = {}
RowsOf = Callable[[int, int], tuple[int, int]]
"""`rows_of(start, stop)`: which rows lie in these bytes of a file, the first and the one after."""


class Intact:
    """What a manifest says of its files; each MiB is compared once, when it is first needed.

    Comparing costs some hundredths of a millisecond for a MiB, where rows are read, which is in a
    thread of its own. A file is not compared again by a process as long as its time of change is
    the same. Files that nobody has written a manifest for are taken as they are.

    Args:
        folder: Where the files lie.
        entries: What the manifest says of them by name, as `files.seal` gives it.

    Attributes:
        rows: How many rows the manifest tells of; None where it does not.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, Mapping[str, Any]], rows: int | None = None
    ) -> None:
        self.rows = rows
        self._entries = {
            _absolute(folder / name): entry for name, entry in entries.items() if "crc32" in entry
        }
        # Which MiB have been compared; threads may do it twice.
        self._seen: dict[str, np.ndarray] = {}

    def knows(self, path: Path | str) -> bool:
        """Whether the manifest tells of a file."""
        return _absolute(path) in self._entries

    def check(
        self,
        path: Path | str,
        start: int,
        stop: int | None = None,
        rows: RowsOf | None = None,
        held: memoryview | None = None,
    ) -> None:
        """Refuses bytes `start` to `stop` of a file, to its end for None, if they were changed.

        Args:
            path: The file; one that is not known is not looked at.
            start: The first byte.
            stop: The one after the last.
            rows: Which rows lie where, for the message.
            held: These bytes, where they have been read already.

        Raises:
            FileNotFoundError: If it is gone.
            ValueError: If they are others than were written; names the file, and rows.
        """
        entry = self._entries.get(_absolute(path)) if self._entries else None
        if entry is None:
            return
        size: int = entry["bytes"]
        stop = size if stop is None else min(stop, size)
        if start < stop:
            numbers = np.arange(start // checksums.BLOCK, -(-stop // checksums.BLOCK))
            self._compare(path, entry, numbers, rows, (start, held or memoryview(b"")))

    def check_rows(
        self, path: Path | str, offset: int, row_bytes: int, first: int, indices: np.ndarray
    ) -> None:
        """As `check`, of scattered rows in a run that begins at byte `offset` with row `first`."""
        entry = self._entries.get(_absolute(path)) if self._entries else None
        if entry is None or not len(indices) or not row_bytes:
            return
        starts = offset + (indices.astype(np.int64) - first) * row_bytes
        # Where the needed MiB begin and end, summed up.
        edges = np.zeros(-(-entry["bytes"] // checksums.BLOCK) + 1, np.int64)
        np.add.at(edges, starts // checksums.BLOCK, 1)
        np.add.at(edges, -(-(starts + row_bytes) // checksums.BLOCK), -1)
        numbers = np.flatnonzero(np.cumsum(edges[:-1]))
        self._compare(path, entry, numbers, rows_of(offset, row_bytes, first))

    def check_layout(self, path: Path | str) -> None:
        """As `check`, of what a file says about where its rows lie, which concerns them all."""
        every = self.rows
        rows = None if every is None else lambda *_: (0, every)
        for start, stop in self._entries.get(_absolute(path), {}).get("layout", ()):
            self.check(path, start, stop, rows)

    def check_metadata(self) -> None:
        """As `check`, of all files that hold no rows: those of JSON."""
        for path in self._entries:
            if path.endswith(".json"):
                self.check(path, 0)

    def _compare(
        self,
        path: Path | str,
        entry: Mapping[str, Any],
        numbers: np.ndarray,
        rows: RowsOf | None,
        held: tuple[int, memoryview] = (0, memoryview(b"")),
    ) -> None:
        text, size = entry["crc32"], entry["bytes"]
        seen = self._seen.get(str(path))
        if seen is None:
            seen = self._seen[str(path)] = _seen_of(path, len(text) // 8)
        numbers = numbers[~seen[numbers]]
        if not len(numbers):
            return
        with open(path, "rb", buffering=0) as file, blaming(path):
            for number in numbers.tolist():
                start, stop = number * checksums.BLOCK, min((number + 1) * checksums.BLOCK, size)
                if _checksum(file, start, stop, *held) != text[8 * number : 8 * number + 8]:
                    where = f"bytes {start} to {stop}"
                    if rows is not None:
                        where += ", rows {} to {}".format(*rows(start, stop))
                    raise ValueError(
                        explain(
                            str(path),
                            seen=f"another CRC-32 of {where}",
                            expected="what its manifest says",
                            fix=_FIX,
                        )
                    )
                seen[number] = True


def _checksum(file: FileIO, start: int, stop: int, begin: int, held: memoryview) -> str:
    """Returns that of a MiB; of what is not among the bytes held from `begin` on, as it is read."""
    crcs: list[int] = []
    low, high = max(start, begin), min(stop, begin + len(held))
    if low >= high:
        low = high = stop
    checksums.add_read(crcs, file, start, low)
    checksums.add_checksums(crcs, low, held[low - begin : high - begin])
    checksums.add_read(crcs, file, high, stop)
    return checksums.checksum_text(crcs)


def _seen_of(path: Path | str, blocks: int) -> np.ndarray:
    """Returns which MiB of a file this process has compared already, to be written to."""
    found, seen = os.stat(path), np.zeros(blocks, bool)
    if time.time_ns() - found.st_mtime_ns < _SETTLED:
        return seen  # Another change might show the same time.
    if len(_compared) > _MOST_FILES:
        _compared.clear()
    stamp = _absolute(path), found.st_ino, found.st_size, found.st_mtime_ns, blocks
    return _compared.setdefault(stamp, seen)


def rows_of(offset: int, row_bytes: int, first: int = 0) -> RowsOf:
    """Returns which rows lie in bytes of a run that begins at `offset` with row `first`.

    Example:
        >>> rows_of(128, 8)(128, 152)
        (0, 3)
    """

    def rows(start: int, stop: int) -> tuple[int, int]:
        low, high = max(start - offset, 0), max(stop - offset, 0)
        return first + low // row_bytes, first + -(-high // row_bytes)

    return rows


FOREIGN = Intact(Path(), {})
"""What is known of files that are not ours: nothing."""


def _absolute(path: Path | str) -> str:
    return os.path.abspath(path)
