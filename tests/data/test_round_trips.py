"""What a sink has written, `jh.open_source` gives back: every format, by the public functions."""

import itertools
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler import files
from jaxhandler.data.sinks import open_sink
from tests.data.formats import ENDINGS, TREES

# Reads here are no macrobatches.
pytestmark = pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")

TABLES = (".arrow", ".parquet")
KEY = jax.random.key(5)
DTYPES = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float16]
DTYPES += [np.float32]

each_ending = pytest.mark.parametrize("ending", ENDINGS)
each_tree = pytest.mark.parametrize("ending", TREES)
refusal = pytest.mark.usefixtures("compiles_nothing")


def leaves_of(tree):
    """Leaves by dotted name; one alone by none, since some formats have no place for its name."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    join = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return {join(path) if len(flat) > 1 else "": leaf for path, leaf in flat}


def check_same(source, tree, start=0, stop=None):
    stop = source.num_rows if stop is None else stop
    rows, expected = leaves_of(source.read(start, stop)), leaves_of(tree)
    assert rows.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (rows[name].shape, rows[name].dtype) == (leaf[start:stop].shape, leaf.dtype), name
        np.testing.assert_array_equal(rows[name], leaf[start:stop])


def write(path, tree, cuts=(), rows_per_write=None):
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    rows = jax.tree.leaves(tree)[0].shape[0]
    sink = open_sink(path, specs, rows_per_write=rows_per_write)
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        sink.write(start, [jax.tree.map(lambda leaf: leaf[start:stop], tree)])  # noqa: B023
    return sink.finish()


@st.composite
def outputs(draw):
    """An ending, a tree that it has a place for, and where writes are cut."""
    ending = draw(st.sampled_from(ENDINGS))
    rows = draw(st.integers(0, 12))
    sizes = st.integers(1 if ending in TABLES else 0, 3)
    dtypes = DTYPES + ([] if ending in TABLES else [np.complex64])
    rng = np.random.default_rng(draw(st.integers(0, 9)))

    def leaf():
        shape = (rows, *draw(st.lists(sizes, max_size=3)))
        return rng.integers(0, 100, shape).astype(draw(st.sampled_from(dtypes)))

    shapes = [leaf, lambda: {"a": leaf()}, lambda: {"a": {"b": leaf(), "c": [leaf()]}, "d": leaf()}]
    tree = draw(st.sampled_from(shapes[:1] if ending == ".npy" else shapes))()
    return ending, tree, sorted(draw(st.lists(st.integers(0, rows), max_size=3)))


@hypothesis.settings(max_examples=150)
@hypothesis.given(case=outputs(), rows_per_write=st.none() | st.integers(1, 5), data=st.data())
def test_what_is_written_is_read(case, rows_per_write, data, tmp_path_factory):
    ending, tree, cuts = case
    path = tmp_path_factory.mktemp("trip") / f"rows{ending}"
    source = write(path, tree, cuts, rows_per_write)
    for opened in (source, jh.open_source(path)):
        assert opened.num_rows == jax.tree.leaves(tree)[0].shape[0]
        check_same(opened, tree)
    start = data.draw(st.integers(0, source.num_rows))
    check_same(source, tree, start, data.draw(st.integers(start, source.num_rows)))


@each_ending
@pytest.mark.parametrize("rows", [0, 1])
def test_a_tree_of_few_rows_is_read(ending, rows, tmp_path):
    tree = {"x": np.ones((rows, 3), np.float32), "y": np.zeros((rows, 2, 2), np.int32)}
    tree = tree["x"] if ending == ".npy" else tree
    check_same(write(tmp_path / f"rows{ending}", tree), tree)


@each_ending
def test_scattered_rows_are_read(ending, tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    source = write(tmp_path / f"rows{ending}", x, rows_per_write=6)
    indices = np.array([19, 0, 7, 7, 12])
    assert source.take is not None
    (rows,) = jax.tree.leaves(source.take(indices))
    np.testing.assert_array_equal(rows, x[indices])


# Damage that the manifest tells.


@refusal
@each_ending
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_file_that_is_missing_or_cut_is_refused(ending, damage, tmp_path):
    path = tmp_path / f"rows{ending}"
    x = np.ones((20, 3), np.float32)
    write(path, x if ending == ".npy" else {"a": {"b": x}, "c": x}, rows_per_write=6)
    names = list(files.read_manifest(files.manifest_of(path))["files"])
    for name in names:
        file = path / name if path.is_dir() else path
        content = file.read_bytes()
        damage(file)
        with pytest.raises((ValueError, FileNotFoundError), match="by its manifest|no such file"):
            jh.open_source(path)
        file.write_bytes(content)
    jh.open_source(path)


# Through handlers.


@each_ending
def test_a_calculator_writes_what_it_gives_in_memory(ending, tmp_path):
    x = np.arange(70, dtype=np.float32).reshape(35, 2)
    make = lambda _, x: x * 2 if ending == ".npy" else {"a": [x * 2, x.sum(1)]}  # noqa: E731
    calc = jh.calculator(make, batch_size=4)
    out = tmp_path / f"rows{ending}"
    source = calc.calc_from_host((), x, out=out, macrobatch_size=8)
    check_same(source, calc.calc_from_host((), x))


def test_a_calculator_gives_zarr_chunks_of_one_macrobatch(tmp_path):
    import zarr

    calc = jh.calculator(lambda _, x: x, batch_size=4)
    x = np.zeros((35, 2), np.float32)
    calc.calc_from_host((), x, out=tmp_path / "rows.zarr", macrobatch_size=10)
    array = zarr.open(str(tmp_path / "rows.zarr"), mode="r")
    assert array.chunks == (8, 2)
    assert array.nchunks_initialized == 5


@each_ending
def test_no_output_may_take_the_place_of_what_it_is_made_from(ending, tmp_path):
    path = tmp_path / f"rows{ending}"
    x = np.arange(70, dtype=np.float32).reshape(35, 2)
    write(path, x)
    calc = jh.calculator(lambda _, rows: jax.tree.map(lambda leaf: leaf + 1, rows), batch_size=4)
    for data in (path, jh.open_source(path)):
        with pytest.raises(ValueError, match="out: saw .*, which is read, expected a path that no"):
            calc.calc_from_host((), data, out=path, macrobatch_size=8)
    check_same(jh.open_source(path), x)


@each_tree
def test_a_handler_writes_rows_in_the_order_it_visits_them(ending, tmp_path):
    x = np.arange(70, dtype=np.float32).reshape(35, 2)
    handler = jh.handler(lambda carry, x: (carry, x), batch_size=4)
    how = {"shuffle": "rows", "key": KEY, "macrobatch_size": 8}
    _, written = handler.handle_from_host((), x, out=tmp_path / f"rows{ending}", **how)
    check_same(written, handler.handle_from_host((), x, **how)[1])


# Copies.


@pytest.mark.parametrize(("one", "two"), [*itertools.product(ENDINGS, ENDINGS)])
def test_copies_from_every_format_to_every_other(one, two, tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    tree = x if ".npy" in (one, two) else {"x": x, "y": [np.arange(20, dtype=np.int32)]}
    write(tmp_path / f"one{one}", tree, rows_per_write=6)
    check_same(jh.copy_rows(tmp_path / f"one{one}", tmp_path / f"two{two}"), tree)


@each_ending
def test_a_shuffled_copy_lies_in_the_order_of_a_global_shuffle(ending, tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    write(tmp_path / f"rows{ending}", x, rows_per_write=6)
    copy = jh.copy_rows(tmp_path / f"rows{ending}", tmp_path / "copy.npy", shuffle_key=KEY)
    handler = jh.handler(lambda carry, rows: (carry, rows), batch_size=4)
    _, visited = handler.handle_from_host((), x, shuffle="global", key=KEY, macrobatch_size=8)
    check_same(copy, visited)
