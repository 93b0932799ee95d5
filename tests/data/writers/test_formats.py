"""What every format does: rows come back from its own library, whatever the tree and the pieces."""

import json
import sys
import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxhandler import files
from jaxhandler.data.sinks import FORMATS, FileSink, check_sink
from tests.data.formats import ENDINGS, TREES, read_back

NUMBERS = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float16]
NUMBERS += [np.float32, np.float64, np.int64, np.uint64]
TABLES = (".arrow", ".parquet")

each_ending = pytest.mark.parametrize("ending", ENDINGS)
each_tree = pytest.mark.parametrize("ending", TREES)
refusal = pytest.mark.usefixtures("compiles_nothing")
# Tracing counts as compiling.
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))


def specs_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def dotted(tree):
    """The leaves of a tree by the names they have in a format without trees."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    join = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return {join(path) or "outputs": leaf for path, leaf in flat}


def rows_of(tree, start, stop, axis=0):
    return jax.tree.map(lambda leaf: leaf[(slice(None),) * axis + (slice(start, stop),)], tree)


def write(path, tree, cuts=(), *, axis=0, rows_per_write=None, make=np.asarray):
    """Writes a tree in pieces and lets it appear."""
    sink = FileSink(path, specs_of(tree), axis, rows_per_write)
    rows = jax.tree.leaves(tree)[0].shape[axis]
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        middle = (start + stop) // 2
        pieces = [rows_of(tree, start, middle, axis), rows_of(tree, middle, stop, axis)]
        sink.write(start, [jax.tree.map(make, piece) for piece in pieces])
    sink.publish()


def check_same(path, tree):
    found, expected = read_back(path), dotted(tree)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype), name
        np.testing.assert_array_equal(found[name], leaf)


@st.composite
def trees(draw, endings=ENDINGS):
    """An ending, a tree that it has a place for, its row axis, and where it is cut into writes."""
    ending = draw(st.sampled_from(endings))
    table = ending in TABLES
    axis = 0 if table else draw(st.integers(0, 1))
    rows = draw(st.integers(0, 12))
    lead = (draw(st.integers(1, 3)),) * axis + (rows,)
    sizes = st.integers(1 if table else 0, 3)
    dtypes = NUMBERS + ([] if table else [np.complex64])
    rng = np.random.default_rng(draw(st.integers(0, 9)))

    def leaf():
        shape = (*lead, *draw(st.lists(sizes, max_size=3)))
        return rng.integers(0, 100, shape).astype(draw(st.sampled_from(dtypes)))

    shapes = [leaf, lambda: {"a": leaf()}, lambda: {"a": {"b": leaf(), "c": [leaf()]}, "d": leaf()}]
    tree = draw(st.sampled_from(shapes[:1] if ending == ".npy" else shapes))()
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
    return ending, tree, axis, cuts


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    case=trees(),
    rows_per_write=st.none() | st.integers(1, 5),
    make=st.sampled_from([np.asarray, lambda leaf: np.asfortranarray(leaf)]),
)
def test_rows_come_back(case, rows_per_write, make, tmp_path_factory):
    ending, tree, axis, cuts = case
    path = tmp_path_factory.mktemp("out") / f"rows{ending}"
    write(path, tree, cuts, axis=axis, rows_per_write=rows_per_write, make=make)
    check_same(path, tree)


@each_ending
def test_jax_arrays_are_written_too(ending, tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    write(tmp_path / f"rows{ending}", x, [4], make=jnp.asarray)
    check_same(tmp_path / f"rows{ending}", x)


@each_ending
def test_the_manifest_describes_every_file(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    tree = np.ones((7, 3), np.float32)
    write(path, tree if ending == ".npy" else {"a": {"b": tree}, "c": tree}, [3, 5])
    manifest = json.loads(files.manifest_of(path).read_text())
    assert manifest["complete"] is True
    assert (manifest["rows"], manifest["row_axis"]) == (7, 0)
    found = {path.name: path}
    if path.is_dir():
        found = {str(each.relative_to(path)): each for each in path.rglob("*") if each.is_file()}
        del found["manifest.json"]
    layouts = {name: entry.pop("layout", None) for name, entry in manifest["files"].items()}
    assert manifest["files"] == {
        name: {
            "bytes": file.stat().st_size,
            "crc32": f"{zlib.crc32(file.read_bytes()):08x}",
        }
        for name, file in found.items()
    }
    # Where a file says itself where its rows lie, these bytes are told apart, to its very end.
    told = [layout[-1][1] for layout in layouts.values() if layout is not None]
    assert told == [path.stat().st_size] * (ending in (".h5", ".arrow", ".parquet"))


@each_ending
def test_nothing_lies_beside_but_the_manifest(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    write(path, np.ones((7, 3), np.float32))
    beside = set() if path.is_dir() else {f"rows{ending}.manifest.json"}
    assert {each.name for each in tmp_path.iterdir()} == {path.name, *beside}


@each_ending
def test_an_earlier_output_is_there_until_the_new_one_is_whole(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    old, new = np.zeros((5, 2), np.float32), np.ones((3, 2), np.float32)
    write(path, old)
    sink = FileSink(path, specs_of(new))
    sink.write(0, [new])
    check_same(path, old)
    sink.publish()
    check_same(path, new)


@each_ending
def test_an_aborted_output_leaves_the_earlier_one(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    old = np.zeros((5, 2), np.float32)
    write(path, old)
    sink = FileSink(path, specs_of(old))
    sink.write(0, [old[:3] + 1])
    sink.abort()
    check_same(path, old)


# What a format has no place for.


@refusal
@each_ending
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "int4"])
def test_types_that_libraries_do_not_share_are_refused(name, ending, tmp_path):
    specs = {"logits": jax.ShapeDtypeStruct((3,), getattr(ml_dtypes, name))}
    message = rf"out: saw {name} in outputs\['logits'\], expected a dtype \.\w+ files know.*jh.cast"
    with pytest.raises(TypeError, match=message):
        FileSink(tmp_path / f"rows{ending}", specs)
    assert list(tmp_path.iterdir()) == []


@refusal
@each_ending
def test_random_keys_are_refused(ending, tmp_path):
    with pytest.raises(TypeError, match=r"saw key<fry> in outputs\['key'\].*random.key_data"):
        FileSink(tmp_path / f"rows{ending}", {"key": KEYS})
    assert list(tmp_path.iterdir()) == []


@refusal
@pytest.mark.parametrize("ending", TABLES)
def test_tables_refuse_complex_numbers(ending, tmp_path):
    specs = {"z": jax.ShapeDtypeStruct((3,), np.complex64)}
    with pytest.raises(TypeError, match="saw complex64 .*the real and the imaginary parts"):
        FileSink(tmp_path / f"rows{ending}", specs)


@refusal
@pytest.mark.parametrize("ending", TABLES)
def test_tables_refuse_rows_that_do_not_come_first(ending, tmp_path):
    specs = jax.ShapeDtypeStruct((2, 5), np.float32)
    with pytest.raises(ValueError, match="saw rows at axis 1, expected rows first in a .*Write .z"):
        FileSink(tmp_path / f"rows{ending}", specs, 1)


@refusal
@pytest.mark.parametrize("ending", TABLES)
def test_tables_refuse_rows_without_a_value(ending, tmp_path):
    specs = {"x": jax.ShapeDtypeStruct((5, 0), np.float32)}
    with pytest.raises(ValueError, match=r"saw rows \[0\] without a value in outputs\['x'\]"):
        FileSink(tmp_path / f"rows{ending}", specs)


BAD_NAMES = {
    "": ["a/b"],
    ".zarr": ["a/b", "..", "", "__private", "zarr.json", "manifest.json", "a\0"],
    ".h5": ["a/b", "", ".", "a\0"],
}


@refusal
@pytest.mark.parametrize(
    ("ending", "name"), [(ending, name) for ending in BAD_NAMES for name in BAD_NAMES[ending]]
)
def test_names_that_a_format_has_no_place_for_are_refused(ending, name, tmp_path):
    specs = {name: {name: jax.ShapeDtypeStruct((3,), np.float32)}}
    with pytest.raises(ValueError, match=r"out: saw \[.*\], expected one \w+ per leaf"):
        FileSink(tmp_path / f"rows{ending}", specs)
    assert list(tmp_path.iterdir()) == []


@refusal
@pytest.mark.parametrize("ending", ["", *TABLES])
def test_leaves_whose_dotted_names_are_the_same_are_refused(ending, tmp_path):
    leaf = jax.ShapeDtypeStruct((3,), np.float32)
    with pytest.raises(ValueError, match=r"saw \['a.b.*', 'a.b.*'\], expected one \w+ per leaf"):
        FileSink(tmp_path / f"rows{ending}", {"a.b": leaf, "a": {"b": leaf}})


@pytest.mark.parametrize("ending", [".zarr", ".h5"])
def test_groups_tell_dotted_names_apart(ending, tmp_path):
    path, x = tmp_path / f"rows{ending}", np.ones(3, np.float32)
    tree = {"a.b": x, "a": {"b": x}}
    sink = FileSink(path, specs_of(tree))
    sink.write(0, [tree])
    sink.publish()
    np.testing.assert_array_equal(read_back(path)["a.b"], x)


@refusal
@each_tree
def test_outputs_without_a_leaf_are_refused(ending, tmp_path):
    with pytest.raises(ValueError, match="out: saw no output leaves"):
        FileSink(tmp_path / f"rows{ending}", {})


@refusal
@pytest.mark.parametrize("ending", [ending for ending, form in FORMATS.items() if form.requires])
def test_a_library_that_is_missing_is_named_with_its_extra(ending, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, FORMATS[ending].requires, None)
    with pytest.raises(ImportError, match=r'out: saw no \w+ .*pip install -e "\.\[io\]"'):
        check_sink(tmp_path / f"rows{ending}")
