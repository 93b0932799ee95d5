"""Whether an output of ours is whole: its manifest says so, and its files are as it says."""

from pathlib import Path
from typing import Any

from jaxhandler import files
from jaxhandler.errors import explain, warn

__all__ = ["check_complete"]


def check_complete(path: Path) -> None:
    """Refuses a path where nothing is, or an output of ours that is not whole.

    Args:
        path: A file or a folder.

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
            _check_sizes(path, manifest or {})
            if partial.exists():
                warn(
                    f"{path} is the whole output of an earlier run; a later run was interrupted "
                    f"and left {partial.name}. Run it again, or delete that."
                )
            return
    if not unfinished.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    manifest = files.read_manifest(files.manifest_of(unfinished)) or {}
    text = explain(
        str(path),
        seen=f"an interrupted output in {unfinished.name}",
        expected=f"all {manifest.get('rows', 'its')} rows and a manifest that says complete",
        fix="Run what wrote it again; it starts over.",
    )
    raise ValueError(text)


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """Refuses an output of ours that something else has changed since."""
    for name, entry in manifest.get("files", {}).items():
        file = path / name if path.is_dir() else path
        if not path.is_dir() and file.name != name:
            continue
        found = f"{file.stat().st_size} bytes" if file.exists() else "no such file"
        expected = f"{entry.get('bytes')} bytes"
        if found != expected:
            fix = "It was changed after it was written; write it again."
            expected += " by its manifest"
            raise ValueError(explain(str(file), seen=found, expected=expected, fix=fix))
