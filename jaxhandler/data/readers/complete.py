"""Whether an output of ours is whole: its manifest says so, and its files are as it says."""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxhandler import files
from jaxhandler.data.readers.intact import Intact
from jaxhandler.errors import explain, warn

__all__ = ["check_complete"]


def check_complete(path: Path, columns: Collection[str] | None = None) -> Intact:
    """Refuses a path where nothing is, or an output of ours that is not whole.

    Args:
        path: A file or a folder, or one of those in a folder of ours.
        columns: Of a folder of `.npy` files those that are wanted; None for all.

    Returns:
        What tells that its bytes are those that were written.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If an interrupted run left it behind, or something else has changed it since.
    """
    partial = files.partial_of(path)
    unfinished = path if path.name.endswith(".partial") else partial
    if unfinished == partial:
        files.recover(path)
        manifest = files.read_manifest(files.manifest_of(path)) if path.exists() else None
        if manifest is not None and manifest.get("complete") is not True:
            unfinished = path
        elif path.exists():
            folder, entries, rows = _described(path, manifest)
            wanted = entries
            if columns is not None and {f"{name}.npy" for name in columns} <= entries.keys():
                wanted = {f"{name}.npy": entries[f"{name}.npy"] for name in columns}
            _check_sizes(folder, wanted)
            if partial.exists():
                warn(
                    f"{path} is the whole output of an earlier run; a later run was interrupted "
                    f"and left {partial.name}. Run it again, or delete that."
                )
            return Intact(folder, entries, rows)
    if not unfinished.exists():
        text = f"{path}: there is no such file or folder."
        if set("*?[").intersection(str(path)):
            text += f" Of a pattern's files pass jh.concatenate(sorted(glob.glob({str(path)!r})))."
        raise FileNotFoundError(text)
    manifest = files.read_manifest(files.manifest_of(unfinished)) or {}
    raise _interrupted(path, unfinished, manifest)


def _interrupted(path: Path, unfinished: Path, manifest: dict[str, Any]) -> ValueError:
    text = explain(
        str(path),
        seen=f"an interrupted output in {unfinished.name}",
        expected=f"all {manifest.get('rows', 'its')} rows and a manifest that says complete",
        fix="Run what wrote it again; it starts over.",
    )
    return ValueError(text)


def _described(
    path: Path, manifest: dict[str, Any] | None
) -> tuple[Path, dict[str, dict[str, Any]], int | None]:
    """Returns the folder of the files that a manifest tells of, its entries, and how many rows."""
    if manifest is not None:
        entries = manifest.get("files", {})
        folder = path if path.is_dir() else path.parent
        own = path.is_dir() or path.name in entries
        return folder, entries if own else {}, manifest.get("rows")
    # A column of a folder, or an array in a group.
    for folder in path.parents:
        with contextlib.suppress(ValueError):  # Nor are manifests of others any of our business.
            manifest = files.read_manifest(folder / files.MANIFEST)
        if manifest is not None:
            if manifest.get("complete") is not True:
                raise _interrupted(path, folder, manifest)
            inside = path.relative_to(folder).as_posix()
            entries = {
                name: entry
                for name, entry in manifest.get("files", {}).items()
                if name == inside or name.startswith(f"{inside}/")
            }
            return folder, entries, None
        if not (folder / "zarr.json").exists():
            break
    return path, {}, None


def _check_sizes(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Refuses an output of ours that something else has changed since."""
    for name, entry in entries.items():
        file = folder / name
        found = f"{file.stat().st_size} bytes" if file.exists() else "no such file"
        expected = f"{entry.get('bytes')} bytes"
        if found != expected:
            fix = "It was changed after it was written; write it again."
            expected += " by its manifest"
            raise ValueError(explain(str(file), seen=found, expected=expected, fix=fix))
