"""Fingerprints: the same for the same rows wherever they lie, another for one changed value."""

import dataclasses

import numpy as np
import pytest

from jaxhandler.checkpointing import identity
from jaxhandler.data.fingerprints import fingerprint
from jaxhandler.data.sources import open_source

X = np.arange(60, dtype=np.float32).reshape(20, 3)


def of(data, extent="auto"):
    return fingerprint(open_source(data), extent)


def test_the_format_does_not_matter(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "rows.npz", x=X, y=X[:, 0])
    assert of(X) == of(str(tmp_path / "x.npy"))
    assert of({"x": X, "y": X[:, 0]}) == of(str(tmp_path / "rows.npz"))


@pytest.mark.parametrize("place", [0, 31, 59])
def test_one_value_matters(place):
    changed = X.copy()
    changed.flat[place] += 1e-3
    assert of(changed) != of(X)


def test_length_type_and_name_matter():
    found = [of(X), of(X[:19]), of(X.astype(np.int32)), of({"x": X}), of({"y": X}), of(X[:, None])]
    assert len({str(each) for each in found}) == len(found)


def test_large_data_is_sampled_to_its_ends(monkeypatch):
    monkeypatch.setattr(identity, "FULL", 2**20)
    monkeypatch.setattr(identity, "SAMPLED", 2**21)
    rows = np.zeros((64, 2**16), np.uint8)
    ends = [rows.copy(), rows.copy()]
    ends[0][0, 0], ends[1][-1, -1] = 1, 1
    assert of(rows)["digest"] == "sampled"
    assert len({of(each)[""] for each in (rows, *ends)}) == 3
    middle = rows.copy()
    middle[20] = 1
    assert of(middle, "full") != of(rows, "full")


def test_no_rows_have_a_fingerprint():
    assert of(X[:0])["rows"] == 0


def test_without_a_digest_nothing_is_read():
    source = open_source(X)
    asked = []
    source = dataclasses.replace(source, read=asked.append, borrow=None)
    found = fingerprint(source, "none")
    assert (found["rows"], found["digest"], asked) == (20, "none", [])


def test_an_unknown_extent_is_refused():
    with pytest.raises(ValueError, match="fingerprint: saw 'half'"):
        of(X, "half")


def test_an_error_of_the_source_says_which_rows_they_were():
    def failing(start, stop):
        raise OSError(5, "Input/output error")

    source = dataclasses.replace(open_source(X), read=failing, borrow=None)
    with pytest.raises(OSError, match="Input/output error") as caught:
        fingerprint(source)
    assert caught.value.__notes__ == ["This came while reading rows 0 to 20 of data."]
