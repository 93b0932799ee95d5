"""`.npz` files: stored members are read in place, deflated ones as a stream."""

import os
import zipfile

import numpy as np
import pytest

import jaxhandler as jh

deflated = pytest.mark.filterwarnings("ignore:.*compressed by deflate")


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@deflated
def test_a_compressed_file_gives_any_range_in_any_order(x, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=x, y=x[:, 0])
    source = jh.open_source(tmp_path / "x.npz")
    assert source.take is None
    for start, stop in [(0, 10), (10, 20), (30, 40), (5, 6), (0, 40), (39, 40), (3, 3)]:
        rows = source.read(start, stop)
        np.testing.assert_array_equal(rows["x"], x[start:stop])
        np.testing.assert_array_equal(rows["y"], x[start:stop, 0])


@deflated
def test_a_compressed_file_is_given_back_with_its_last_row_or_its_source(x, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=x)

    def opened():
        return sum("x.npz" in os.readlink(f"/proc/self/fd/{n}") for n in handles())

    def handles():
        return [n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]

    source = jh.open_source(tmp_path / "x.npz")
    assert opened() == 0
    source.read(0, 20)
    assert opened() == 1
    source.read(20, 40)
    assert opened() == 0
    source.read(0, 1)
    del source
    assert opened() == 0


@deflated
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_does_not_move_the_place_in_a_compressed_file(x, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=x)
    source = jh.open_source(tmp_path / "x.npz")
    source.read(0, 10)
    child = os.fork()
    if child == 0:
        right = np.array_equal(source.read(10, 30), x[10:30])
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(source.read(10, 20), x[10:20])


@deflated
def test_a_compressed_member_whose_bytes_are_damaged_is_refused_with_its_rows(tmp_path):
    path = tmp_path / "x.npz"
    array = np.random.default_rng(0).normal(size=(9000, 3)).astype(np.float32)
    np.savez_compressed(path, x=array)
    content = bytearray(path.read_bytes())
    content[50_000:50_010] = bytes(10)
    path.write_bytes(content)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(0, 10), array[:10])
    with pytest.raises(ValueError, match=rf"{path}\['x'\]: saw no valid .npz file .*row 10"):
        source.read(10, 9000)


@deflated
def test_a_compressed_array_in_fortran_order_is_refused(x, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=np.asfortranarray(x))
    with pytest.raises(ValueError, match=r"\['x'\]: saw a compressed array in Fortran order"):
        jh.open_source(tmp_path / "x.npz")


def test_an_array_in_fortran_order_is_read_where_it_is_not_compressed(x, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.asfortranarray(x))
    source = jh.open_source(tmp_path / "x.npz")
    np.testing.assert_array_equal(source.read(3, 9), x[3:9])
    np.testing.assert_array_equal(source.take(np.array([9, 3])), x[[9, 3]])


@pytest.mark.filterwarnings("ignore:.*compressed by deflate")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_object_members_are_refused_without_unpickling(save, tmp_path):
    save(tmp_path / "x.npz", x=np.array([[1], [2, 3]], object))
    with pytest.raises(TypeError, match=r"x.npz\['x'\]: saw dtype object.*rows of one length"):
        jh.open_source(tmp_path / "x.npz")


def test_a_member_that_is_no_array_is_refused(x, tmp_path):
    np.savez(tmp_path / "x.npz", x=x)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("notes.txt", "rows")
    with pytest.raises(ValueError, match="saw the member 'notes.txt', expected .npy members"):
        jh.open_source(tmp_path / "x.npz")


def test_a_member_shorter_than_its_header_says_is_refused(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x.npz\['x'\]: saw no valid .npy file"):
        jh.open_source(tmp_path / "x.npz")


def test_names_keep_their_slashes(x, tmp_path):
    np.savez(tmp_path / "x.npz", **{"a/b": x, "a/c": x})
    assert set(jh.open_source(tmp_path / "x.npz").read(0, 1)) == {"a/b", "a/c"}


def test_arrays_of_different_lengths_are_named_with_what_to_do(x, tmp_path):
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x[:10])
    with pytest.raises(ValueError, match="one number of rows.*pass a dict of its arrays") as caught:
        jh.open_source(tmp_path / "x.npz")
    assert "40 rows in" in str(caught.value)
    assert "x.npz['x_test']" in str(caught.value)


def test_an_empty_archive_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npz: saw no arrays, expected columns of rows"):
        jh.open_source(tmp_path / "x.npz")
