"""Files that are whole or absent: atomic writes, manifests that say what is complete."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxhandler.checksums import checksum
from jaxhandler.errors import explain

__all__ = [
    "MANIFEST",
    "atomic_write",
    "blaming",
    "digest",
    "manifest_of",
    "partial_of",
    "private",
    "publish",
    "read_hashed",
    "read_manifest",
    "recover",
    "remove",
    "replaced_of",
    "seal",
    "sync_file",
    "sync_folder",
    "write_hashed",
    "write_manifest",
]

MANIFEST = "manifest.json"
_FORMAT, _DIGEST = "jaxhandler", "sha256"
_LARGEST_MANIFEST = 64 * 2**20


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to; when the block ends well, its file takes the place of `path`.

    A reader sees the old file or the new one, never a part. If the block raises, nothing changes.

    Args:
        path: Where the file shall appear.

    Yields:
        A path in the same folder, unused until now.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_write(path) as fresh:
        ...     _ = fresh.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    target = Path(path)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with blaming(target):
            yield fresh
            sync_file(fresh)
            os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextlib.contextmanager
def blaming(path: Path | str) -> Iterator[None]:
    """Names `path` in an OSError of the block that names no file: that of a full disk, mostly.

    Example:
        >>> with blaming(Path("rows.npy")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'rows.npy'
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def private(path: str, flags: int) -> int:
    """Opens a file, the `opener` of `open`, that nobody but its owner may read or write.

    Example:
        >>> with open("plan", "xb", opener=private) as file:
        ...     f"{os.fstat(file.fileno()).st_mode & 0o777:o}"
        '600'
    """
    return os.open(path, flags, 0o600)


def sync_file(path: Path) -> None:
    """Makes what has been written to a file last."""
    with open(path, "rb") as file, blaming(path):
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes renames inside the folder `path` last, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            with blaming(path):
                os.fsync(handle)
        finally:
            os.close(handle)


def write_hashed(path: Path, pieces: Iterable[Any], mode: int = 0o666) -> dict[str, Any]:
    """Writes a new file piece by piece, and makes it last.

    Args:
        path: Where; nothing may lie there.
        pieces: Bytes, and what is to be seen as bytes.
        mode: Who may read and write it, less what the process withholds.

    Returns:
        What a manifest says of it: `bytes` and `sha256`.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> said = write_hashed(path, [b"who", b"le"])
        >>> said["bytes"], read_hashed(path, said, expected="the note")
        (5, b'whole')
    """
    hashed, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        for piece in pieces:
            view = memoryview(piece)
            hashed.update(view)
            size += len(view)
            while view:
                view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def read_hashed(path: Path, said: Mapping[str, Any], *, expected: str, fix: str = "") -> bytes:
    """Returns the content of a file, the very bytes that were compared.

    Args:
        path: The file.
        said: What the manifest says of it, as `write_hashed` gave it.
        expected: What messages call the file that was written.
        fix: What they advise.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has another size or SHA-256.
    """
    # First: what somebody has made longer than memory cannot be read.
    if (size := path.stat().st_size) != said.get("bytes"):
        seen = f"{size} bytes where the manifest says {said.get('bytes')}"
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
    try:
        data = path.read_bytes()
    except MemoryError as error:
        raise ValueError(
            explain(str(path), seen=f"{size} bytes", expected=f"{expected}, small enough", fix=fix)
        ) from error
    if hashlib.sha256(data).hexdigest() != said.get("sha256"):
        seen = f"{len(data)} bytes of another SHA-256 than the manifest says"
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
    return data


def seal(path: Path, known: Mapping[Path, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Makes the files of the unfinished output at `path` last, and says what they are.

    Args:
        path: Where the output shall appear; its files lie in `path.partial` as yet.
        known: What the manifest shall say of a file besides; a file of which the `crc32` is not
            among it is read back.

    Returns:
        Bytes and checksum of each file by its name, for the manifest: in a folder its path inside.

    Raises:
        OSError: If a file cannot be read, or the disk fails.
    """
    partial = partial_of(path)
    found = {path.name: partial}
    if partial.is_dir():
        everything = sorted(partial.rglob("*"))
        found = {each.relative_to(partial).as_posix(): each for each in everything}
        found.pop(MANIFEST, None)
    entries = {}
    for name, file in found.items():
        if file.is_dir():
            sync_folder(file)
            continue
        sync_file(file)
        said = {"bytes": file.stat().st_size, **known.get(file, {})}
        entries[name] = said if "crc32" in said else {**said, "crc32": checksum(file)}
    return entries


def partial_of(path: Path) -> Path:
    """Returns where the rows of an output at `path` are written until it is complete."""
    return _beside(path, ".partial")


def manifest_of(path: Path) -> Path:
    """Returns where the manifest of a file or folder of ours lies: beside it, or inside it."""
    if path.is_dir():
        return path / MANIFEST
    return _beside(path, f".{MANIFEST}")


def _beside(path: Path, ending: str) -> Path:
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    return path.parent / f"{path.name}{ending}"


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Writes a manifest, JSON with sorted keys and a SHA-256 of all it says, atomically.

    Args:
        path: The manifest's own path.
        content: What it says; `complete` is false until the last byte of the data is on disk.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "manifest.json"
        >>> write_manifest(path, {"complete": False, "rows": 3})
        >>> read_manifest(path)["rows"]
        3
    """
    with atomic_write(path) as fresh:
        said = {"format": _FORMAT, "version": 1, **content}
        text = json.dumps({**said, _DIGEST: digest(said)}, indent=1, sort_keys=True)
        fresh.write_text(text + "\n", encoding="utf-8")


def read_manifest(
    path: Path, *, fix: str = "Delete the output and write it again."
) -> dict[str, Any] | None:
    """Returns what a manifest of ours says, or None where there is none.

    Args:
        path: The manifest's own path.
        fix: What messages advise where it is damaged.

    Returns:
        Its content, or None if the file is absent or not of ours.

    Raises:
        ValueError: If the file says it is ours but is damaged, too large, or names files outside.

    Example:
        >>> read_manifest(Path("nowhere.json")) is None
        True
    """
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    if size > _LARGEST_MANIFEST:
        expected = f"at most {_LARGEST_MANIFEST}"
        raise ValueError(explain(str(path), seen=f"{size} bytes", expected=expected, fix=fix))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        text = explain(str(path), seen="no valid JSON", expected="a manifest", fix=fix)
        raise ValueError(text) from error
    if not isinstance(content, dict):
        return None
    if content.get("format") != _FORMAT:
        if not {_DIGEST, "complete", "version"} <= content.keys():
            return None
        seen = f"the format {content.get('format')!r:.40}"
        raise ValueError(explain(str(path), seen=seen, expected=f"{_FORMAT!r}", fix=fix))
    entries = content.get("files", {})
    if not isinstance(entries, dict) or not all(
        isinstance(each, dict) for each in entries.values()
    ):
        expected = "an entry for each name"
        raise ValueError(
            explain(str(path), seen=f"files {entries!r:.40}", expected=expected, fix=fix)
        )
    for name in entries:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or str(inside) != name or name == ".":
            expected = "names inside its own folder"
            raise ValueError(
                explain(str(path), seen=f"the file {name!r}", expected=expected, fix=fix)
            )
    if content.pop(_DIGEST, None) != digest(content):
        seen, expected = "another SHA-256 than it says", "a manifest as it was written"
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
    return content


def digest(content: Any) -> str:
    """Returns the SHA-256 of what can be written as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def replaced_of(path: Path) -> Path:
    """Returns where the folder of an earlier run waits while the new one moves to `path`."""
    return _beside(path, ".replaced")


def publish(path: Path, manifest: dict[str, Any]) -> None:
    """Turns the finished `path.partial` into `path`, replacing what an earlier run left there.

    Killed at any point, `path` is the old output, the new one, or absent with `path.partial` whole
    and for `recover` to move; it is never half of one.

    Args:
        path: Where the output shall appear; a file or a folder.
        manifest: What its manifest shall say besides `complete`.

    Raises:
        OSError: If the output cannot be moved.
    """
    partial, replaced = partial_of(path), replaced_of(path)
    write_manifest(manifest_of(partial), {**manifest, "complete": True})
    if partial.is_dir():
        remove(replaced)
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        sync_folder(path.parent)
        remove(replaced)
        return
    manifest_of(path).unlink(missing_ok=True)
    os.replace(partial, path)
    os.replace(manifest_of(partial), manifest_of(path))
    sync_folder(path.parent)


def recover(path: Path) -> None:
    """Ends a `publish` that was killed when all bytes were written.

    Args:
        path: Where the output shall appear; nothing happens where there is nothing to move.

    Raises:
        OSError: If the output cannot be moved.
        ValueError: If its manifest is damaged.
    """
    partial = partial_of(path)
    if path.exists() == partial.exists():
        return
    manifest = read_manifest(manifest_of(partial))
    if manifest is None or manifest.get("complete") is not True:
        return
    if partial.exists():
        publish(path, manifest)
    elif not manifest_of(path).exists() and _is_of(manifest, path):
        # Of a file, only the manifest had not moved yet.
        os.replace(manifest_of(partial), manifest_of(path))
        sync_folder(path.parent)


def _is_of(manifest: dict[str, Any], path: Path) -> bool:
    entry = manifest.get("files", {}).get(path.name, {})
    return path.is_file() and entry.get("bytes") == path.stat().st_size


def remove(path: Path) -> None:
    """Deletes a file or a folder with all that is in it; absent is fine.

    The manifest goes last: a folder of which a kill has left something is still known as ours.
    """
    if path.is_dir() and not path.is_symlink():
        for each in path.iterdir():
            if each.name != MANIFEST:
                remove(each)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
