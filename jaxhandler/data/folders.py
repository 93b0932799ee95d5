"""Folders of files with a manifest: whole or absent, and never in the place of something else."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxhandler import files
from jaxhandler.errors import explain

__all__ = ["check_replaceable", "new_folder"]


def check_replaceable(path: Path, kind: str) -> None:
    """Refuses to replace a path that holds something else than an output of this `kind`."""
    if path.exists() and (files.read_manifest(files.manifest_of(path)) or {}).get("kind") != kind:
        fix = "Name another folder, or delete it."
        seen, expected = "something else there", f"no such path, or a folder of {kind}"
        raise FileExistsError(explain(str(path), seen=seen, expected=expected, fix=fix))


@contextlib.contextmanager
def new_folder(path: Path, kind: str, content: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a folder to write files to; when the block ends well it takes the place of `path`.

    Args:
        path: Where the folder shall appear.
        kind: What its manifest says that it holds.
        content: What else its manifest says.

    Yields:
        The unfinished folder.
    """
    partial = files.partial_of(path)
    files.remove(partial)
    partial.mkdir(parents=True)
    files.write_manifest(files.manifest_of(partial), {"kind": kind, "complete": False})
    yield partial
    entries = files.seal(path, {})
    files.publish(path, {**content, "kind": kind, "files": entries})
