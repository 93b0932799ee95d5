"""A folder of commits: each appears whole, is checked whole, and the older one stays meanwhile."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.checkpointing.leaves import Entry, restore, stored
from jaxhandler.errors import explain, warn
from jaxhandler.files import (
    MANIFEST,
    blaming,
    partial_of,
    publish,
    read_hashed,
    read_manifest,
    remove,
    write_hashed,
)
from jaxhandler.tensors import decode, encode

__all__ = ["ARRAYS", "LOCK", "Commit", "Commits", "commits_in"]

ARRAYS, LOCK = "arrays.safetensors", "lock"
_KIND, _LAYOUT = "commit", 1
_NAME = re.compile(r"commit-(\d{8,})")
_FIX = "It was damaged or changed after it was written."
# What runs say of themselves, as far as it is there, and the least of what is a number.
_KINDS = {"identity": dict, "resolved": dict, "at": str, "controller": list, "ended": str}
_LEAST = {"visits": 0, "visits_per_epoch": 1, "macrobatch_size": 1, "rows": 0}


class Commit(NamedTuple):
    """What a run had reached.

    Attributes:
        path: Its folder.
        content: What its manifest says, JSON.
        entries: The trees that it holds by name, each a list of entries for its leaves.
        arrays: Their arrays by name.
        nodes: The classes of their nodes, each tree's by its name.
    """

    path: Path
    content: dict[str, Any]
    entries: dict[str, list[Entry]]
    arrays: dict[str, np.ndarray]
    nodes: dict[str, dict[str, str]]

    def restore(self, name: str, like: Any, *, argument: str = "like") -> Any:
        """Returns one of its trees as `like`, if it is exactly that; see `leaves.restore`."""
        entries, nodes = self.entries[name], self.nodes.get(name)
        return restore(entries, self.arrays, like, name, nodes=nodes, argument=argument)


def commits_in(folder: Path) -> Iterator[Commit]:
    """Yields the intact commits in a folder, the newest first.

    Every byte is compared with the SHA-256 that the manifest says before anything is made of it.
    Damaged commits are passed over with a warning that names the file.

    Args:
        folder: Where they are; it need not exist.

    Yields:
        `Commit`s.

    Raises:
        OSError: If there were commits, none is intact, and one could not be read.
        ValueError: If there were commits, and none is intact.
    """
    broken, intact, unread = [], False, None
    for path in reversed(_paths(folder)):
        try:
            commit = _read(path)
        except (OSError, ValueError) as error:
            broken.append(str(error))
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                unread = unread or error
            continue
        if broken and not intact:
            warn(f"{broken[0]} Going on from {path.name}, an older commit.")
        intact = True
        yield commit
    if unread is not None and not intact:
        # It may be whole, and is not to be deleted.
        raise unread
    if broken and not intact:
        fix = "Delete the folder to start anew."
        seen = "no intact commit: " + " ".join(broken)
        raise ValueError(explain(str(folder), seen=seen, expected="at least one", fix=fix))


class Commits:
    """Adds commits to a folder, as the only process that does.

    A commit is written to a folder of another name, made to last, and renamed. So whoever is killed
    leaves it whole or not at all. Only then the oldest goes.

    Args:
        folder: Where they are; made if there is none.
        keep: How many stay.
        fresh: Whether there must be no commit yet.

    Attributes:
        folder: Where they are.

    Raises:
        OSError: If another run holds the folder or has been there, or it cannot be written to.
    """

    def __init__(self, folder: Path, keep: int, *, fresh: bool = False) -> None:
        self.folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        self._kept: list[Path] = []
        self._lock = _lock(folder)
        try:
            numbers = [_number(path) for path in _paths(folder)]
            if fresh and numbers:
                raise _in_use(folder)
            for path in folder.glob("commit-*.partial"):
                try:
                    remove(path)
                except OSError as error:
                    warn(f"{path} stays, because it could not be deleted: {error}")
                    # No new one may want its name.
                    numbers += [_number(path.with_suffix(""))]
        except BaseException:
            os.close(self._lock)
            raise
        self._last = max(numbers, default=0)

    def __enter__(self) -> "Commits":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def keep(self, path: Path) -> None:
        """Counts a commit that was there before as one to keep, as long as it is among the last."""
        self._kept.append(path)

    def add(
        self,
        content: dict[str, Any],
        entries: dict[str, list[Entry]],
        arrays: Mapping[str, np.ndarray],
        nodes: Mapping[str, Mapping[str, str]],
    ) -> None:
        """Writes a commit and deletes those before the last `keep`.

        Args:
            content: What its manifest shall say, JSON.
            entries: The trees that it holds, as in `Commit`.
            arrays: Their arrays.
            nodes: The classes of their nodes; those of a tree that is not among them may differ.

        Raises:
            OSError: If it cannot be written; names the file. Earlier commits stay.
        """
        self._last += 1
        path = self.folder / f"commit-{self._last:08}"
        partial = partial_of(path)
        try:
            with blaming(partial):
                partial.mkdir()
                files = {ARRAYS: write_hashed(partial / ARRAYS, encode(arrays))}
                trees = {"entries": entries, "nodes": dict(nodes)}
                body = {"content": content, **trees, "files": files}
                publish(path, {"kind": _KIND, "layout": _LAYOUT, **body})
        except OSError:
            with contextlib.suppress(OSError):
                remove(partial)
            raise
        self._kept = [*self._kept, path][-self._keep :]
        for old in _paths(self.folder):
            if old not in self._kept:
                # Renamed first: what a kill leaves of it is not taken for a commit.
                try:
                    os.rename(old, partial_of(old))
                    remove(partial_of(old))
                except OSError as error:
                    warn(f"{old} stays, because it could not be deleted: {error}")


def _paths(folder: Path) -> list[Path]:
    """The commits that are in a folder, the oldest first, intact or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _lock(folder: Path) -> int:
    """Opens the lock of a folder; the system lets go of it however the process ends."""
    path = folder / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise _in_use(folder) from error
    return file


def _in_use(folder: Path) -> BlockingIOError:
    fix = "Give each run a folder of its own."
    seen, expected = "another run that is under way there", "one at a time"
    text = explain(str(folder), seen=seen, expected=expected, fix=fix)
    return BlockingIOError(errno.EWOULDBLOCK, text)


def _read(path: Path) -> Commit:
    name = path / MANIFEST
    manifest = read_manifest(name, fix=_FIX)
    if manifest is None:
        raise _damaged(name, "nothing of ours", "a manifest")
    marks = tuple(manifest.get(mark) for mark in ("kind", "layout", "complete"))
    if marks != (_KIND, _LAYOUT, True):
        raise _damaged(name, f"{marks}", "a whole commit of this version of jaxhandler")
    try:
        content, entries, nodes = (manifest[part] for part in ("content", "entries", "nodes"))
        if not all(isinstance(part, dict) for part in (content, entries, nodes, *nodes.values())):
            raise TypeError("what is no dictionary")
        for part, said in content.items():
            if not _makes_sense(part, said):
                raise TypeError(f"{part} {said!r:.40}")
        kinds = [kind for each in entries.values() for kind in stored(each)]
        names = [str(name) for name, _, _ in kinds]
        said = {part: manifest["files"][ARRAYS][part] for part in ("bytes", "sha256")}
    except (AttributeError, KeyError, TypeError) as error:
        seen = f"parts that make no sense ({error!r})"
        raise _damaged(name, seen, "those of a commit") from error
    file = path / ARRAYS
    data = read_hashed(file, said, expected="what was written", fix=_FIX)
    arrays = decode(data, kinds, str(file))
    return Commit(path, content, entries, dict(zip(names, arrays, strict=True)), nodes)


def _makes_sense(part: str, said: Any) -> bool:
    if part in _LEAST:
        return type(said) is int and said >= _LEAST[part]
    return isinstance(said, _KINDS.get(part, object))


def _damaged(path: Path, seen: str, expected: str) -> ValueError:
    return ValueError(explain(str(path), seen=seen, expected=expected, fix=_FIX))
