"""`.npy` files: read as NumPy would, refused where they make no sense or were cut."""

import os
import pickle
import warnings
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

import jaxhandler as jh


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)


def saved(array, path, **options):
    np.save(path, array, **options)
    return path


def npy_with_header(path, text, body=b"\0" * 96):
    header = text if isinstance(text, bytes) else text.encode("latin1")
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)
    return path


@hypothesis.given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int32, np.uint8, np.bool_, np.complex64]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    ),
    data=st.data(),
)
def test_a_npy_file_gives_the_rows_that_numpy_would(array, data, tmp_path_factory):
    path = saved(array, tmp_path_factory.mktemp("npy") / "x.npy")
    start = data.draw(st.integers(0, len(array)))
    stop = data.draw(st.integers(start, len(array)))
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(start, stop), array[start:stop])
    assert source.specs.shape == array.shape
    if len(array):
        indices = np.array(data.draw(st.lists(st.integers(0, len(array) - 1))), np.intp)
        np.testing.assert_array_equal(source.take(indices), array[indices])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_npy_format_is_read(version, x, tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, x, version=version)
    np.testing.assert_array_equal(jh.open_source(tmp_path / "x.npy").read(2, 5), x[2:5])


def test_opening_a_npy_file_of_a_terabyte_reads_only_its_header(tmp_path):
    path = npy_with_header(
        tmp_path / "x.npy",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**28}, 1024)}}\n",
    )
    try:
        os.truncate(path, path.stat().st_size - 96 + 2**40)
    except OSError:
        pytest.skip("the file system has no holes this large")
    source = jh.open_source(path)
    assert source.num_rows == 2**28
    np.testing.assert_array_equal(source.read(2**28 - 1, 2**28), np.zeros((1, 1024)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_file_stays_open_between_reads(x, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    source = jh.open_source(saved(x, tmp_path / "x.npy"))
    source.read(0, 3)
    source.take(np.array([3, 5]))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "array",
    [np.array(["a", "b"]), np.zeros(2, ">f4"), np.zeros(2, [("a", "f4")])],
    ids=["text", "big-endian", "structured"],
)
def test_types_jax_does_not_have_are_refused_in_files(array, tmp_path):
    path = saved(array, tmp_path / "x.npy")
    with pytest.raises(TypeError, match=rf"{path}: saw "):
        jh.open_source({"x": path})


class Planted:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_npy_file_of_pickled_objects_is_refused_without_unpickling(tmp_path):
    trap = tmp_path / "sprung"
    array = np.empty(1, object)
    array[0] = Planted(trap)
    path = saved(array, tmp_path / "x.npy", allow_pickle=True)
    with pytest.raises(TypeError, match=rf"{path}: saw dtype object"):
        jh.open_source(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(array[0]))
    assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUM", b"not an array at all", b"\x93NUMPY\x09\x09"])
def test_what_is_no_npy_file_is_refused(content, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npy: saw no valid header .*expected a .npy file"):
        jh.open_source(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, -1)}\n",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (3, {2**62})}}\n",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**64},)}}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
        "{'descr': [1, 2], 'fortran_order': False, 'shape': (3,)}\n",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (3,)}\n",
        "(" * 9000,
        "'''",
        " 1\n  2\n 3",
    ],
    ids=lambda text: text[:70],
)
def test_a_header_that_makes_no_sense_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"x.npy: saw "):
        jh.open_source(npy_with_header(tmp_path / "x.npy", text))


@hypothesis.given(data=st.data())
def test_a_header_with_damaged_bytes_is_refused_or_read_inside_the_file(data, tmp_path_factory):
    path = saved(np.zeros((4, 3), np.int32), tmp_path_factory.mktemp("npy") / "x.npy")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 90))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's own about old headers, Python's about escapes.
        try:
            source = jh.open_source(path, narrowing="allow")
        except (TypeError, ValueError) as error:
            named = str(path) in str(error)
            assert named
        else:
            stop = min(source.num_rows, 1)
            assert source.read(0, stop).shape == (stop, *source.specs.shape[1:])


@pytest.mark.parametrize("fortran", [False, True], ids=["rows", "fortran"])
def test_a_cut_npy_file_is_refused_with_both_sizes(fortran, x, tmp_path):
    path = saved(np.asfortranarray(x) if fortran else x, tmp_path / "x.npy")
    os.truncate(path, 200)
    with pytest.raises(ValueError, match=rf"{path}: saw 200 bytes, expected at least 260"):
        jh.open_source({"x": path})


@pytest.mark.parametrize("fortran", [False, True], ids=["rows", "fortran"])
@pytest.mark.parametrize("cut_to", [140, 0])
def test_a_npy_file_cut_after_it_was_opened_raises_on_reading(fortran, cut_to, tmp_path):
    array = np.zeros((4096, 4), np.float32)  # Several pages: reading past the end would be SIGBUS.
    path = saved(np.asfortranarray(array) if fortran else array, tmp_path / "x.npy")
    source = jh.open_source(path)
    os.truncate(path, cut_to)
    with pytest.raises(ValueError, match=rf"{path}: saw {cut_to} bytes"):
        source.read(4000, 4096)
    with pytest.raises(ValueError, match=rf"{path}: saw {cut_to} bytes"):
        source.take(np.array([4095]))


def test_a_npy_file_deleted_after_it_was_opened_raises_on_reading(x, tmp_path):
    path = saved(x, tmp_path / "x.npy")
    source = jh.open_source(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        source.read(0, 1)
