"""Artifacts: a folder that holds a model as StableHLO, its parameters, and how it is served."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import explain, extra
from jaxhandler.files import (
    MANIFEST,
    digest,
    partial_of,
    publish,
    read_hashed,
    read_manifest,
    recover,
    remove,
    write_hashed,
)
from jaxhandler.inference.engine import Engine
from jaxhandler.inference.exporting import Model, as_numbers, exported_model
from jaxhandler.inference.policies import Policy, from_spec
from jaxhandler.inference.structures import from_json, plain, to_json
from jaxhandler.tensors import decode, encode
from jaxhandler.versions import versions

__all__ = ["MODEL", "PARAMS", "Artifact", "describe", "load", "read_files", "save"]

MODEL, PARAMS = "model.jax_export", "params.safetensors"
_KIND, _VERSION = "inferer", 1
_TREES = ("params", "inputs", "outputs")
_EXPECTED = "what infer.save wrote"
_AGAIN = "Save the inferer again, to a folder that does not exist yet."
_FIX = f"It was damaged or changed. {_AGAIN}"
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "background": lambda value: type(value) is bool,
    "freeze": lambda value: type(value) is bool,
    "max_plans": lambda value: value is None or (_is_count(value) and value > 0),
    "platforms": lambda value: isinstance(value, list) and {*map(type, value)} == {str},
    "policy": lambda value: isinstance(value, dict),
    "row_axis": lambda value: isinstance(value, list) and [*map(_is_count, value)] == [True] * 2,
    "sizes": lambda value: isinstance(value, dict) and all(map(_is_seen, value.items())),
    "versions": lambda value: isinstance(value, dict) and {*map(type, value.values())} <= {str},
}


class Artifact(NamedTuple):
    """What an artifact holds, ready to be served.

    Attributes:
        apply_fn: `apply_fn(params, inputs)`, the model.
        params: The parameters, on the device.
        example: Types of inputs of one row.
        row_axis: Where rows are, in inputs and in outputs.
        policy: How requests become calls.
        settings: What `describe` returns.
        digest: SHA-256 of the model and its types; parameters' values have no part in it.
        params_digest: SHA-256 of the file of parameters.
    """

    apply_fn: Callable[[Any, Any], Any]
    params: Any
    example: Any
    row_axis: tuple[int, int]
    policy: Policy
    settings: dict[str, Any]
    digest: str
    params_digest: str


class _Meaning(NamedTuple):
    """What a manifest says, made sense of; leaves and structures in the order of `_TREES`."""

    leaves: list[list["_Leaf"]]
    structures: list[Any]
    policy: Policy


class _Leaf(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str


def save(engine: Engine, params: Any, directory: str | os.PathLike[str]) -> None:
    """Writes the artifact of a model and of how it is served; what `infer.save` does.

    Nobody but its owner may read or write it, until its permissions are changed.

    Args:
        engine: The plans of the model.
        params: Its parameters.
        directory: The folder; an artifact that lies there is replaced.

    Raises:
        FileExistsError: If something else lies there, also beside the files of an artifact.
        ImportError: If flatbuffers is not installed.
        OSError: If it cannot be written.
        TypeError: If a dict has keys that are neither text nor whole numbers.
        ValueError: If the model cannot be exported for any number of rows.
    """
    extra("flatbuffers", "infer.save", "serve")
    path = Path(directory)
    recover(path)
    _check_replaceable(path)
    numbers = jax.tree.map(as_numbers, plain(params))
    trees = (numbers, plain(engine.inputs.tree), plain(engine.outputs.tree))
    settings: dict[str, Any] = {
        name: _tree_json(tree, name) for name, tree in zip(_TREES, trees, strict=True)
    }
    exported = exported_model(engine, params)
    settings |= {
        "row_axis": [engine.inputs.axis, engine.outputs.axis],
        "policy": engine.policy.spec,
        "max_plans": engine.max_plans,
        "background": engine.background,
        "freeze": engine.frozen is not None,
        "sizes": {str(size): count for size, count in engine.stats().sizes.items()},
        "platforms": list(exported.platforms),
        "versions": versions(),
    }
    names = [leaf["name"] for leaf in settings["params"]["leaves"]]
    arrays = dict(zip(names, map(np.asarray, jax.tree.leaves(numbers)), strict=True))
    partial = partial_of(path)
    remove(partial)
    partial.mkdir(mode=0o700, parents=True)
    files = {
        MODEL: write_hashed(partial / MODEL, [exported.serialize()], 0o600),
        PARAMS: write_hashed(partial / PARAMS, encode(arrays), 0o600),
    }
    publish(path, {"kind": _KIND, "layout": _VERSION, "settings": settings, "files": files})


def describe(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what an artifact's manifest says of the inferer; its files are not read.

    Args:
        directory: The artifact.

    Returns:
        A dictionary of JSON: `params`, `inputs`, `outputs` (each a `tree` and its `leaves`),
        `row_axis`, `policy`, `max_plans`, `background`, `freeze`, `sizes`, `platforms`, `versions`
        and `files`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no artifact of ours, a newer one, or its manifest is damaged.
    """
    path = Path(directory)
    recover(path)
    if not path.exists():
        fix = "Write it with infer.save."
        text = explain(str(path), seen="nothing there", expected="an artifact", fix=fix)
        raise FileNotFoundError(text)
    manifest, name = _manifest(path), path / MANIFEST
    if manifest is None:
        expected = f"an artifact, a folder with a {MANIFEST} of infer.save"
        raise ValueError(explain(str(path), seen="something else", expected=expected))
    if manifest.get("layout") != _VERSION:
        fix = "Load it with the version of jaxhandler that wrote it."
        seen, expected = f"layout {manifest.get('layout')!r}", f"layout {_VERSION}"
        raise ValueError(explain(str(name), seen=seen, expected=expected, fix=fix))
    settings, files = manifest.get("settings"), manifest.get("files")
    if not isinstance(settings, dict) or not isinstance(files, dict) or {*files} != {MODEL, PARAMS}:
        raise _damaged(name, "other files than an artifact has")
    _meaning(name, settings)
    return {**settings, "files": files}


def read_files(directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the content of an artifact's files, the very bytes that were compared.

    Args:
        directory: The artifact.
        settings: What `describe` returned.

    Returns:
        Bytes by the file's name.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If one has another size or SHA-256 than the manifest says.
    """
    path = Path(directory)
    return {name: _verified(path / name, entry) for name, entry in settings["files"].items()}


def load(directory: str | os.PathLike[str]) -> Artifact:
    """Reads an artifact; every file is checked before the first is made sense of.

    Args:
        directory: The artifact.

    Returns:
        An `Artifact`.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there.
        ImportError: If flatbuffers is not installed.
        TypeError: If it has leaves of 64 bits and `jax_enable_x64` is not set.
        ValueError: If it is no artifact of ours, is damaged, or does not run on this platform.
    """
    settings, path = describe(directory), Path(directory)
    blobs = read_files(directory, settings)
    leaves, structures, policy = _meaning(path / MANIFEST, settings)
    (before, after), platforms = settings["row_axis"], settings["platforms"]
    _check_widths(path, [leaf for each in leaves for leaf in each])
    platform = jax.export.default_export_platform()
    if platform not in platforms:
        expected = f"one that the model was exported for, {' or '.join(platforms)}"
        raise ValueError(explain(str(path), seen=f"the platform {platform}", expected=expected))
    extra("flatbuffers", "jh.load_inferer", "serve")
    arrays = decode(blobs[PARAMS], leaves[0], str(path / PARAMS))
    try:
        exported = jax.export.deserialize(bytearray(blobs[MODEL]))
    except Exception as error:
        fix = "Save it again with these versions, or load it with those that saved it."
        seen = f"what jax {jax.__version__} cannot read ({error})"
        expected = f"what jax {settings['versions'].get('jax')} wrote"
        raise ValueError(
            explain(str(path / MODEL), seen=seen, expected=expected, fix=fix)
        ) from error
    _check_model(path / MODEL, exported, leaves, (before, after), platforms)
    example = [
        jax.ShapeDtypeStruct((*shape[:before], 1, *shape[before:]), _dtype(dtype))
        for _, shape, dtype in leaves[1]
    ]
    model = settings["files"][MODEL]["sha256"]
    return Artifact(
        apply_fn=Model(exported, *structures),
        params=structures[0].unflatten([jax.device_put(array) for array in arrays]),
        example=structures[1].unflatten(example),
        row_axis=(before, after),
        policy=policy,
        settings=settings,
        digest=digest([model, *(settings[name] for name in _TREES)]),
        params_digest=settings["files"][PARAMS]["sha256"],
    )


def _check_replaceable(path: Path) -> None:
    """Refuses to replace what is no artifact, or has files of somebody else in it."""
    names = sorted(os.listdir(path)) if path.is_dir() else []
    if names and _manifest(path) is not None:
        foreign = [name for name in names if name not in (MANIFEST, MODEL, PARAMS)]
        if foreign:
            fix = "Move it away, or choose a folder that does not exist yet."
            seen, expected = "what is no part of an artifact", "no others, which would be deleted"
            raise FileExistsError(
                explain(str(path / foreign[0]), seen=seen, expected=expected, fix=fix)
            )
    elif names or (path.exists() and not path.is_dir()):
        fix, seen = "Choose a folder that does not exist yet.", "something else that lies there"
        text = explain(str(path), seen=seen, expected="an artifact, or nothing", fix=fix)
        raise FileExistsError(text)


def _tree_json(tree: Any, name: str) -> dict[str, Any]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or name for path, _ in flat]
    if len(set(names)) < len(names):
        names = [f"{number}/{path}" for number, path in enumerate(names)]
    leaves = [
        {"name": path, "shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
        for path, (_, leaf) in zip(names, flat, strict=True)
    ]
    return {"tree": to_json(tree, name), "leaves": leaves}


def _meaning(name: Path, settings: Mapping[str, Any]) -> _Meaning:
    """Makes sense of all that `save` wrote, or refuses it."""
    for setting, makes_sense in _SETTINGS.items():
        if setting not in settings:
            raise _damaged(name, f"settings without {setting!r}")
        if not makes_sense(settings[setting]):
            raise _damaged(name, f"settings in which {setting!r} is {settings[setting]!r:.60}")
    try:
        leaves = [[_leaf(each) for each in settings[tree]["leaves"]] for tree in _TREES]
        structures = [from_json(settings[tree]["tree"]) for tree in _TREES]
        policy = from_spec(settings["policy"])
        if [len(each) for each in leaves] != [each.num_leaves for each in structures]:
            raise ValueError("leaves that are not those of the trees")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(name, f"settings that make no sense ({error!r})") from error
    return _Meaning(leaves, structures, policy)


def _check_model(
    path: Path,
    exported: jax.export.Exported,
    leaves: Sequence[Sequence[_Leaf]],
    row_axis: tuple[int, int],
    platforms: Sequence[str],
) -> None:
    """Refuses a model that is whole, and another one than the manifest speaks of."""
    params, inputs, outputs = (
        [_kind(leaf, axis) for leaf in some]
        for some, axis in zip(leaves, (None, *row_axis), strict=True)
    )
    for what, seen, said in (
        ("takes", [_kind(aval) for aval in exported.in_avals], [*params, *inputs]),
        ("gives", [_kind(aval) for aval in exported.out_avals], outputs),
        ("runs on", list(exported.platforms), list(platforms)),
    ):
        for found, expected in itertools.zip_longest(seen, said, fillvalue="nothing more"):
            if found != expected:
                text, seen = f"{expected}, as the manifest says", f"a model that {what} {found}"
                raise ValueError(explain(str(path), seen=seen, expected=text, fix=_AGAIN))


def _kind(leaf: Any, axis: int | None = None) -> str:
    sizes = [*map(str, leaf.shape)]
    if axis is not None:
        sizes.insert(axis, "rows")
    return f"{jnp.dtype(leaf.dtype).name}[{', '.join(sizes)}]"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seen(entry: tuple[str, Any]) -> bool:
    """Whether that is a number of rows, and how often it was seen."""
    return entry[0].isascii() and entry[0].isdecimal() and _is_count(entry[1])


def _leaf(entry: Mapping[str, Any]) -> _Leaf:
    shape = tuple(map(int, entry["shape"]))
    if min((0, *shape)) < 0 or math.prod(shape) >= 2**62:
        raise ValueError(f"a leaf of shape {list(shape)}")
    dtype = _dtype(entry["dtype"])
    if not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(f"a leaf of dtype {dtype}")
    return _Leaf(str(entry["name"]), shape, str(entry["dtype"]))


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(jnp, name, name))


def _check_widths(path: Path, leaves: Iterable[_Leaf]) -> None:
    for name, _, dtype in leaves:
        if jax.dtypes.canonicalize_dtype(_dtype(dtype)) != _dtype(dtype):
            fix = 'Call jax.config.update("jax_enable_x64", True) first.'
            seen, expected = f"{name or 'a leaf'} of dtype {dtype}", "dtypes that JAX has now"
            raise TypeError(explain(str(path), seen=seen, expected=expected, fix=fix))


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of an artifact, or None where there is none of that kind."""
    manifest = read_manifest(path / MANIFEST, fix=_AGAIN)
    return manifest if manifest is not None and manifest.get("kind") == _KIND else None


def _verified(path: Path, said: Mapping[str, Any]) -> bytes:
    try:
        return read_hashed(path, said, expected=_EXPECTED, fix=_FIX)
    except FileNotFoundError as error:
        fix = "Copy the whole folder, or save the inferer again."
        text = explain(str(path), seen="no such file", expected="a file of the artifact", fix=fix)
        raise FileNotFoundError(text) from error


def _damaged(path: Path, seen: str) -> ValueError:
    return ValueError(explain(str(path), seen=seen, expected=_EXPECTED, fix=_FIX))
