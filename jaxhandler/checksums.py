"""Checksums of files: a CRC-32 of each MiB, added up as bytes are written or read."""

import os
from io import FileIO

from zlib_ng.zlib_ng import crc32

__all__ = [
    "BLOCK",
    "add_checksums",
    "add_read",
    "checksum",
    "checksum_text",
    "checksum_within",
]

BLOCK = 2**20
"""Bytes that have a CRC-32 of their own."""


def checksum(path: str | os.PathLike[str]) -> str:
    """Returns the CRC-32 of each MiB of a file in hexadecimal.

    It finds what disks and networks do to files, for a quarter of what reading them from memory
    takes; SHA-256 took longer than the disk did to write the file. Each MiB has its own, so that
    who reads some rows need not read the others to know that these are whole.

    Args:
        path: The file.

    Returns:
        8 hexadecimal digits for each MiB, at least 8.

    Raises:
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> _ = path.write_text("whole")
        >>> checksum(path)
        'c459294f'
    """
    with open(path, "rb", buffering=0) as file:
        return checksum_within(file, 0, os.fstat(file.fileno()).st_size)


def checksum_within(file: FileIO, start: int, stop: int) -> str:
    """Returns that of bytes `start` to `stop` of an open file, or of as many as there are."""
    crcs: list[int] = []
    add_read(crcs, file, start, stop)
    return checksum_text(crcs)


def add_read(crcs: list[int], file: FileIO, start: int, stop: int) -> None:
    """As `add_checksums`, of bytes `start` to `stop` of an open file, if there are as many."""
    piece = memoryview(bytearray(min(BLOCK, max(stop - start, 1))))
    file.seek(start)
    while start < stop and (count := file.readinto(piece[: stop - start])):
        add_checksums(crcs, start, piece[:count])
        start += count


def add_checksums(crcs: list[int], position: int, view: memoryview) -> None:
    """Continues the CRC-32 of each MiB by more bytes.

    Args:
        crcs: Those of the bytes before, the last one of a MiB that may go on; changed in place.
        position: Where in the file the bytes lie: behind those before.
        view: The bytes.
    """
    while len(view):
        within = position % BLOCK
        if not within or not crcs:
            crcs.append(0)
        piece = view[: BLOCK - within]
        crcs[-1] = crc32(piece, crcs[-1])
        position, view = position + len(piece), view[len(piece) :]


def checksum_text(crcs: list[int]) -> str:
    """Returns what `checksum` does, of CRC-32s that are known."""
    return "".join(f"{crc:08x}" for crc in crcs or [0])
