"""What a file may do to who opens it: run nothing, read nothing outside, take no memory."""

import ast
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
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
PICKLES = {
    "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "klepto", "marshal",
    "pickle", "pickletools", "shelve",
}  # fmt: skip
PICKLING = {
    "ForkingPickler", "deserialize_and_load", "read_pickle", "serialize_executable", "to_pickle",
}  # fmt: skip
# `torch.load` and its like: libraries of peers whose own formats are pickles.
LOADERS = {"keras", "tensorflow", "tf", "torch"}
# NumPy must be told to refuse them.
NUMPYS = {f"numpy.{name}" for name in ("load", "save", "savez", "savez_compressed")}
IMPORTING = {"__import__", "import_module"}
# Formats of peers that rest on pickles, by the file that reads them; none so far.
EXCEPTED: set[str] = set()


def pickling(tree: ast.AST, *, told: bool) -> list[str]:
    """What in a module may read or write pickles; with `told` NumPy must be told to refuse them."""
    meant, calls = meanings(tree), [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    refusing = {call.func for call in calls if allowing(call, meant) == "False"}
    found = []
    for node in ast.walk(tree):
        for name in names_in(node, meant):
            if forbidden(name) or (told and name in NUMPYS and node not in refusing):
                found.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return found + [
        f"line {call.lineno}: {full_name(call.func, meant)}(allow_pickle=...)"
        for call in calls
        if allowing(call, meant) not in ("", "False")
    ]


def forbidden(name: str) -> bool:
    """Whether what has this name, with the modules it lies in, pickles."""
    parts = name.split(".")
    return (
        not (PICKLES | PICKLING).isdisjoint(parts)
        or parts[:2] == ["multiprocessing", "reduction"]
        or (parts[0] in LOADERS and parts[-1] in {"load", "save"})
    )


def allowing(call: ast.Call, meant: Mapping[str, str]) -> str:
    """What a call says of pickles; "" for nothing."""
    if len(call.args) > 2 and full_name(call.func, meant) in {"numpy.load", "numpy.save"}:
        return ast.unparse(call.args[2])
    said = [ast.unparse(each.value) for each in call.keywords if each.arg == "allow_pickle"]
    return said[0] if said else ""


def names_in(node: ast.AST, meant: Mapping[str, str]) -> Iterator[str]:
    """The full names that a node mentions, in text as well: that may be handed on to import it."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Name | ast.Attribute | ast.Call):
        yield full_name(node, meant)
    elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+", str(node.value)):
        yield str(node.value)


def meanings(tree: ast.AST) -> dict[str, str]:
    """The full names behind a module's short ones."""
    meant = {"np": "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            meant |= {each.asname: each.name for each in node.names if each.asname}
        elif isinstance(node, ast.ImportFrom):
            meant |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name := full_name(node.value, meant):
                meant |= {each.id: name for each in targets if isinstance(each, ast.Name)}
    return meant


def full_name(node: ast.AST, meant: Mapping[str, str]) -> str:
    """The name of what a node is: "numpy.load" for `np.load`; "" where it has none."""
    if isinstance(node, ast.Name):
        return meant.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, meant)}.{node.attr}"
    if isinstance(node, ast.Call):
        function, texts = (
            full_name(node.func, meant),
            [getattr(a, "value", None) for a in node.args],
        )
        if function.rpartition(".")[2] in IMPORTING and texts and isinstance(texts[0], str):
            return texts[0]
        if function == "getattr" and len(texts) > 1 and isinstance(texts[1], str):
            return f"{full_name(node.args[0], meant)}.{texts[1]}"
    return ""


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
        "import pickle as p",
        "from pickle import loads",
        "import _pickle",
        "import joblib as j",
        "from joblib import load",
        "import dill",
        "import cloudpickle",
        "import shelve",
        "import marshal",
        "def later():\n    from marshal import loads",
        "__import__('pickle').loads(data)",
        "importlib.import_module('pickle')",
        "importlib.import_module('dill')",
        "from importlib import import_module as load\nload('pickle')",
        "module = 'cloudpickle'",
        "extra('joblib', 'argument', 'io')",
        "from jax.experimental import serialize_executable",
        "from jax.experimental.serialize_executable import deserialize_and_load",
        "import multiprocessing.reduction",
        "from multiprocessing import reduction",
        "from multiprocessing.reduction import ForkingPickler",
        "multiprocessing.reduction.dump(rows, file)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=maybe)",
        "np.load(path, None, True)",
        "np.load(path)",
        "np.save(path, rows)",
        "np.savez(path, x=rows)",
        "numpy.load(path)",
        "import numpy\nnumpy.load(path)",
        "import numpy as n\nn.load(path)",
        "from numpy import load",
        "from numpy import load as read\nread(path)",
        "read = np.load",
        "map(np.load, paths)",
        "getattr(np, 'load')(path)",
        "n = importlib.import_module('numpy')\nn.load(path)",
        "__import__('numpy').load(path)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "torch.load(path)",
        "torch.save(rows, path)",
        "torch.jit.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load",
        "library: Any = importlib.import_module('torch')\nlibrary.save(rows, path)",
        "keras.models.load(path)",
        "frame.to_pickle(path)",
        "pandas.read_pickle(path)",
        "frames()[0].to_pickle(path)",
    ],
)
def test_pickling_would_be_found(line: str) -> None:
    assert pickling(ast.parse(line), told=True) != []


@pytest.mark.parametrize(
    "line",
    [
        "np.load(path, allow_pickle=False)",
        "np.savez(path, allow_pickle=False, **rows)",
        "from numpy.lib.format import read_magic",
        "json.load(file)",
        "jh.load_state(path)",
        "torch.nn.Linear(3, 3)",
        "importlib.import_module('torch')",
        "'No pickle, and no marshal.'",
    ],
)
def test_what_does_not_pickle_passes(line: str) -> None:
    assert pickling(ast.parse(line), told=True) == []


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
