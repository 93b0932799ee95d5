"""What a file may do to who opens it: run nothing, read nothing outside, take no memory."""

import ast
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import zarr

import jaxhandler as jh
from jaxhandler import files
from jaxhandler.data.opening import database
from jaxhandler.tensors import LARGEST_HEADER, decode

ROOT = Path(__file__).parents[1]
FOLDERS = ("jaxhandler", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
X = np.arange(12, dtype=np.float32).reshape(4, 3)

# Whatever runs code that it finds in a file, and what rests on it.
PICKLES = {"_pickle", "cloudpickle", "dill", "joblib", "klepto", "marshal", "pickle", "shelve"}
PICKLING = {"read_pickle", "serialize_executable", "to_pickle", "deserialize_and_load"}
# `torch.load` and its like: libraries of peers whose own formats are pickles.
LOADERS = {"torch", "tf", "keras"}
# Formats of peers that rest on pickles, by the file that reads them; none so far.
EXCEPTED: set[str] = set()


def pickling(tree: ast.AST, *, told: bool) -> list[str]:
    """What in a module may read or write pickles; with `told` NumPy must be told to refuse them."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in PICKLING else []
        elif isinstance(node, ast.Call):
            function, said = (
                ast.unparse(node.func),
                {each.arg: each.value for each in node.keywords},
            )
            if "allow_pickle" in said and ast.unparse(said["allow_pickle"]) != "False":
                names = [f"{function}(allow_pickle=...)"]
            elif told and function in {"np.load", "np.save", "np.savez", "np.savez_compressed"}:
                names = [] if "allow_pickle" in said else [function]
            module, _, called = function.rpartition(".")
            if called == "load" and module in LOADERS:
                names = [function]
            if called == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
                names = [str(node.args[0].value)]
        imported = isinstance(node, ast.Import | ast.ImportFrom) or "import_module" in ast.dump(
            node
        )
        for name in names:
            parts = set(name.split("."))
            if not imported or parts & (PICKLES | PICKLING):
                found.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_pickles(path: Path) -> None:
    """NumPy reads no pickles unless told so; the package tells it not to all the same."""
    if path.relative_to(ROOT).as_posix() not in EXCEPTED:
        inside = path.is_relative_to(ROOT / "jaxhandler")
        assert pickling(ast.parse(path.read_text()), told=inside) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "from jax.experimental import serialize_executable",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=maybe)",
        "np.load(path)",
        "np.save(path, rows)",
        "torch.load(path)",
        "frame.to_pickle(path)",
        "importlib.import_module('dill')",
    ],
)
def test_pickling_would_be_found(line: str) -> None:
    assert pickling(ast.parse(line), told=True) != []


class Canary:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_pickled_objects_are_refused_and_not_run(ending: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"x{ending}"
    rows = np.array([Canary(canary)], object)
    np.save(path, rows) if ending == ".npy" else np.savez(path, x=rows)
    with pytest.raises(TypeError, match=rf"x{ending}.*: saw dtype object"):
        jh.open_source(path)
    assert not canary.exists()
    np.load(tmp_path / f"x{ending}", allow_pickle=True)["x" if ending == ".npz" else 0]
    assert canary.exists()


# Headers that say they are large are refused before they are read: these files are holes.


def hole(path: Path, begin: bytes) -> Path:
    path.write_bytes(begin)
    os.truncate(path, 2**42)
    return path


def test_a_large_safetensors_header_is_refused_unread(tmp_path: Path) -> None:
    for size in (LARGEST_HEADER + 1, 2**41):
        path = hole(tmp_path / "x.safetensors", size.to_bytes(8, "little"))
        with pytest.raises(ValueError, match=rf"x\.safetensors: .*a header of {size} bytes, more"):
            jh.open_source(path)
    data = (LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}"
    with pytest.raises(ValueError, match=f"a header of {LARGEST_HEADER + 1} bytes"):
        decode(data, [])


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_large_npy_header_is_refused_unread(version: int, tmp_path: Path) -> None:
    size = (60_000).to_bytes(2, "little") if version == 1 else (2**32 - 1).to_bytes(4, "little")
    path = hole(tmp_path / "x.npy", b"\x93NUMPY" + bytes([version, 0]) + size)
    with pytest.raises(ValueError, match=r"x\.npy: saw no valid header \(\d+ bytes, more than"):
        jh.open_source(path)


def test_a_large_manifest_is_refused_unread(tmp_path: Path) -> None:
    jh.copy_rows(X, tmp_path / "x.npy")
    hole(tmp_path / "x.npy.manifest.json", b"{")
    with pytest.raises(ValueError, match=r"x\.npy\.manifest\.json: saw 4398046511104 bytes"):
        jh.open_source(tmp_path / "x.npy")


# Names in manifests lead nowhere else.


def a_folder(path: Path) -> Callable[[], object]:
    jh.copy_rows({"x": X}, path)
    return lambda: jh.open_source(path)


def a_commit(path: Path) -> Callable[[], object]:
    tr = jh.trainer(lambda w, x: x.mean(axis=1) * w, optax.sgd(0.1))
    state = tr.init(np.float32(1), key=jax.random.key(0))
    tr.train_from_host(state, X, checkpoint=jh.checkpoint(path.parent))
    path.symlink_to(path.parent / "commit-00000001")
    return lambda: jh.load_state(path.parent)


def an_artifact(path: Path) -> Callable[[], object]:
    jh.memoizing_inferer(lambda w, x: x @ w, X.T, X[:1]).save(path)
    return lambda: jh.load_inferer(path)


def some_structures(path: Path) -> Callable[[], object]:
    columns = {"num_atoms": [2], "numbers": np.array([1, 1]), "positions": X[:2]}
    database(columns, splits={"all": [0]}).save(path)
    return lambda: database(path, splits={"all": [0]})


def some_pairs(path: Path) -> Callable[[], object]:
    columns = {"num_atoms": [2], "numbers": np.array([1, 1]), "positions": X[:2]}
    structures = database(columns, splits={"all": [0]})
    jh.precompute_pairs(structures, 9.0, out=path)
    return lambda: jh.precompute_pairs(structures, 9.0, out=path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
@pytest.mark.parametrize("make", [a_folder, a_commit, an_artifact, some_structures, some_pairs])
def test_a_manifest_that_leads_outside_is_refused(
    make: Callable[[Path], Callable[[], object]], name: str, tmp_path: Path
) -> None:
    """Even by somebody who knows how a manifest is made."""
    opening = make(tmp_path / "x")
    path = tmp_path / "x" / files.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"][name] = next(iter(manifest["files"].values()))
    files.write_manifest(path, manifest)
    with pytest.raises(ValueError, match=f"saw the file '{name}', expected names inside"):
        opening()


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize(
    ("name", "said"), [("..", "outside of its group"), ("../secret", "No group")]
)
def test_a_zarr_group_that_leads_outside_is_refused(name: str, said: str, tmp_path: Path) -> None:
    zarr.create_group(tmp_path)
    zarr.create_array(tmp_path / "secret", data=X)
    group = zarr.create_group(tmp_path / "x.zarr")
    group.create_array("a", data=X)
    zarr.consolidate_metadata(tmp_path / "x.zarr")
    path = tmp_path / "x.zarr" / "zarr.json"
    content = json.loads(path.read_text())
    members = content["consolidated_metadata"]["metadata"]
    members[name] = members["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"x\.zarr: saw no valid Zarr file .*{said}"):
        jh.open_source(tmp_path / "x.zarr")


# What holds executables is its owner's alone.


@pytest.mark.skipif(os.name != "posix", reason="files have owners and permissions")
def test_executables_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        jh.memoizing_inferer(lambda w, x: x @ w, X.T, X[:1]).save(tmp_path / "model")
        store = jh.enable_plan_store(tmp_path / "plans")
        jh.load_inferer(tmp_path / "model")(X)
    finally:
        jh.enable_plan_store(None)
        os.umask(before)
    assert store is not None
    plans = list(store.glob("*.plan"))
    assert len(plans) == 1
    private = [*plans, *(tmp_path / "model").glob("model*"), *(tmp_path / "model").glob("params*")]
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in private}
    assert set(modes.values()) == {"0o600"}, modes
    for folder in (tmp_path / "model", store, store.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
