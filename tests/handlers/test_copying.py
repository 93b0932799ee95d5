"""Copies: the same rows in another file, in their order or in that of a global shuffle."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler import files

ROOT = Path(jh.__file__).parents[1]
KEY = jax.random.key(7)


class Ranges:
    """Rows behind slicing only, as those of an HDF5 dataset."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        return self.array[rows]


def globally_shuffled(x, key):
    """What a handler visits with `shuffle="global"`."""
    handler = jh.handler(lambda carry, rows: (carry, rows), batch_size=4)
    return handler.handle_from_host((), x, shuffle="global", key=key, macrobatch_size=8)[1]


@pytest.fixture
def x():
    return np.arange(60, dtype=np.float32).reshape(30, 2)


@hypothesis.given(num_rows=st.integers(0, 30), width=st.integers(0, 3))
def test_a_copy_holds_the_same_rows(num_rows, width, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    data = {"x": np.ones((num_rows, width), np.float32), "y": np.arange(num_rows, dtype=np.int32)}
    copy = jh.copy_rows(data, folder / "copy")
    assert copy.num_rows == num_rows
    jax.tree.map(np.testing.assert_array_equal, copy.read(0, num_rows), data)


def test_a_copy_is_a_finished_output(x, tmp_path):
    jh.copy_rows(x, tmp_path / "copy.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "copy.npy"), x)
    manifest = files.read_manifest(tmp_path / "copy.npy.manifest.json")
    assert (manifest["complete"], manifest["rows"]) == (True, 30)


def test_an_opened_source_is_copied(x, tmp_path):
    copy = jh.copy_rows(jh.open_source(x), tmp_path / "copy.npy")
    np.testing.assert_array_equal(copy.read(0, 30), x)


# Shuffled once.


SOURCES = {
    "memory": lambda x, folder: x,
    "a file": lambda x, folder: save(x, folder),
    "slicing": lambda x, folder: Ranges(x),
    "a file and memory": lambda x, folder: {"a": save(x, folder), "b": x},
    "memory that is narrowed": lambda x, folder: x.astype(np.int64),
}


def save(x, folder):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


@pytest.mark.parametrize("kind", SOURCES)
def test_the_order_is_that_of_a_global_shuffle(kind, x, tmp_path):
    copy = jh.copy_rows(SOURCES[kind](x, tmp_path), tmp_path / "copy", shuffle_key=KEY)
    expected = globally_shuffled(x, KEY)
    for leaf in jax.tree.leaves(copy.read(0, 30)):
        np.testing.assert_array_equal(leaf, expected)


def test_another_key_gives_another_order(x, tmp_path):
    one = jh.copy_rows(x, tmp_path / "one.npy", shuffle_key=KEY).read(0, 30)
    two = jh.copy_rows(x, tmp_path / "two.npy", shuffle_key=jax.random.key(8)).read(0, 30)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(np.sort(one, axis=0), np.sort(two, axis=0))


def test_nothing_is_left_of_what_a_shuffle_needed_meanwhile(x, tmp_path):
    jh.copy_rows(Ranges(x), tmp_path / "copy.npy", shuffle_key=KEY)
    assert sorted(os.listdir(tmp_path)) == ["copy.npy", "copy.npy.manifest.json"]


def test_a_file_is_not_shuffled_in_its_place(x, tmp_path):
    path = save(x, tmp_path)
    with pytest.raises(ValueError, match="sink: saw .*x.npy, which is read, expected a path"):
        jh.copy_rows(path, path, shuffle_key=KEY)
    np.testing.assert_array_equal(np.load(path), x)


def test_rows_too_large_for_one_block_are_shuffled_exactly(tmp_path):
    x = np.zeros((11, 5_000_000), np.float32)
    x += np.arange(11, dtype=np.float32)[:, None]
    copy = jh.copy_rows(Ranges(x), tmp_path / "copy.npy", shuffle_key=KEY)
    expected = globally_shuffled(x[:, :1], KEY)
    rows = np.load(tmp_path / "copy.npy", mmap_mode="r")
    assert copy.num_rows == 11
    for row, (first,) in zip(rows, expected, strict=True):
        assert (row == first).all()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units elsewhere")
@pytest.mark.parametrize("shuffled", [False, True])
def test_memory_does_not_grow_with_the_rows(shuffled, tmp_path):
    """Half a gigabyte passes through a process that grows by less than half of it."""
    script = """
        import resource, sys
        import jax, numpy as np
        import jaxhandler as jh
        from pathlib import Path

        path, key = Path(sys.argv[1]), jax.random.key(0) if sys.argv[2] == "True" else None
        with open(path / "x", "wb") as file:
            for start in range(0, 2**17, 2**12):
                rows = np.arange(start, start + 2**12, dtype=np.float32)
                file.write(np.repeat(rows, 1024).tobytes())

        class Rows:
            shape, dtype = (2**17, 1024), np.dtype(np.float32)

            def __getitem__(self, rows):
                count, offset = (rows.stop - rows.start) * 1024, rows.start * 4096
                return np.fromfile(path / "x", np.float32, count, offset=offset).reshape(-1, 1024)

        most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = most()
        jh.copy_rows(Rows(), path / "copy.npy", shuffle_key=key)
        grown = most() - before
        first = np.load(path / "copy.npy", mmap_mode="r")[:, 0]
        assert sorted(first.tolist()) == list(range(2**17))
        print(grown)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(shuffled)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    for file in tmp_path.iterdir():
        file.unlink()
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 224 * 2**20


# Another dtype.


def test_floating_leaves_get_the_dtype(x, tmp_path):
    data = {"x": x, "labels": np.arange(30, dtype=np.int32)}
    copy = jh.copy_rows(data, tmp_path / "copy", dtype=jnp.float16)
    assert copy.specs["x"].dtype == np.float16
    assert copy.specs["labels"].dtype == np.int32
    np.testing.assert_array_equal(copy.read(3, 9)["x"], x[3:9].astype(np.float16))


def test_bfloat16_rows_become_float32(tmp_path):
    x = np.arange(4).astype(ml_dtypes.bfloat16)
    copy = jh.copy_rows(x, tmp_path / "copy.npy", dtype="float32")
    np.testing.assert_array_equal(copy.read(0, 4), np.arange(4, dtype=np.float32))


def test_who_asks_for_float32_is_not_warned_of_float64(tmp_path):
    x = np.linspace(0, 1, 5)
    copy = jh.copy_rows(x, tmp_path / "copy.npy", dtype=np.float32)
    np.testing.assert_array_equal(copy.read(0, 5), x.astype(np.float32))


def test_who_asks_for_nothing_is_warned_of_float64(tmp_path):
    with pytest.warns(UserWarning, match="source: saw float64, expected float32"):
        jh.copy_rows(np.linspace(0, 1, 5), tmp_path / "copy.npy")


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("make", [np.asarray, Ranges])
def test_a_value_that_does_not_fit_is_refused_and_its_row_named(key, make, x, tmp_path):
    x[17, 1] = 1e6
    message = r"source\['x'\]: saw 1000000.0 in row 17, expected a finite float16. Scale"
    with pytest.raises(OverflowError, match=message):
        jh.copy_rows({"x": make(x)}, tmp_path / "copy", dtype="float16", shuffle_key=key)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ValueError, match="saw an interrupted output"):
        jh.open_source(tmp_path / "copy")


def test_infinities_that_were_there_stay(tmp_path):
    x = np.array([np.inf, np.nan, -np.inf, 1], np.float32)
    copy = jh.copy_rows(x, tmp_path / "copy.npy", dtype="float16")
    np.testing.assert_array_equal(copy.read(0, 4), x.astype(np.float16))


def test_integers_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OverflowError, match="source: saw 1099511627776 in row 1"):
        jh.copy_rows(np.array([0, 2**40]), tmp_path / "copy.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int32", "dtype: saw int32, expected a floating dtype that JAX has. Other leaves"),
        ("float64", "dtype: saw float64, .* Choose float32, or set jax_enable_x64"),
        ("number", "dtype: saw 'number', expected a floating dtype"),
        ("bfloat16", r"sink: saw bfloat16 in outputs, expected a dtype .npy files know"),
    ],
)
def test_dtypes_that_make_no_sense_are_refused(dtype, message, x, tmp_path):
    with pytest.raises(TypeError, match=message):
        jh.copy_rows(x, tmp_path / "copy.npy", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# What is refused.


@pytest.mark.parametrize("sink", [None, 3, np.zeros(3)], ids=str)
def test_a_sink_that_is_no_path_is_refused(sink, x):
    with pytest.raises(TypeError, match="sink: saw .*, expected a path"):
        jh.copy_rows(x, sink)


def test_a_key_that_is_none_is_refused(x, tmp_path):
    with pytest.raises(TypeError, match="shuffle_key: saw an int, expected a key.*random.key"):
        jh.copy_rows(x, tmp_path / "copy.npy", shuffle_key=0)


def test_a_sink_among_the_columns_that_are_copied_is_refused(x, tmp_path):
    save(x, tmp_path)
    with pytest.raises(ValueError, match="sink: saw .*expected a place outside the folder"):
        jh.copy_rows(tmp_path, tmp_path / "copy.npy")


def test_a_source_that_fails_leaves_no_copy(x, tmp_path):
    class Broken(Ranges):
        def __getitem__(self, rows):
            raise OSError("the cable is out")

    with pytest.raises(OSError, match="the cable is out"):
        jh.copy_rows(Broken(x), tmp_path / "copy.npy")
    with pytest.raises(ValueError, match="saw an interrupted output"):
        jh.open_source(tmp_path / "copy.npy")


# Progress.


@pytest.mark.parametrize(("make", "epochs"), [(np.asarray, 1), (Ranges, 2)])
def test_progress_is_drawn(make, epochs, x, tmp_path, capsys):
    jh.copy_rows(make(x), tmp_path / "copy.npy", shuffle_key=KEY, progress=True)
    shown = capsys.readouterr().out
    assert "30/30 rows" in shown if epochs == 1 else "epoch 2/2, 60/60 rows" in shown
    assert "30 rows in" in shown


def test_nothing_is_drawn_unless_asked(x, tmp_path, capsys):
    jh.copy_rows(x, tmp_path / "copy.npy")
    assert capsys.readouterr().out == ""
