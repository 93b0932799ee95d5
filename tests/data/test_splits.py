"""Splits: which rows each holds, what is refused, and that a file gives the same ones back."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxhandler.data.splits import load_splits, resolve_splits, save_splits

KEY = jax.random.key(3)
COLUMNS = {
    "fold": np.array([2, 0, 1, 0, -1, 2]),
    "small": np.array([1, 0, 1], np.uint8),
    "is_train": np.array([True, False, True, True, False, False]),
    "is_test": np.array([False, True, False, False, False, True]),
    "too": np.array([True, True, False, False, False, False]),
    "flag": np.array([1, 0, 1, 0, 0, 0]),
    "wide": np.zeros((6, 2), int),
}


def part(splits, num_rows=6, key=None):
    return resolve_splits(splits, num_rows, key, COLUMNS.__getitem__)


def lists(splits):
    return {name: rows.tolist() for name, rows in splits.items()}


def sizes(splits):
    return {name: len(rows) for name, rows in splits.items()}


# Fractions.


@hypothesis.given(
    weights=st.lists(st.integers(0, 100), min_size=1, max_size=6),
    total=st.integers(100, 600),
    num_rows=st.integers(0, 300),
)
def test_any_fractions_give_disjoint_splits_of_the_right_sizes(weights, total, num_rows):
    total = max(total, sum(weights))
    fractions = {str(i): weight / total for i, weight in enumerate(weights)}
    splits = part(fractions, num_rows, KEY)
    assert list(splits) == list(fractions)
    rows = np.concatenate(list(splits.values()))
    assert len(np.unique(rows)) == len(rows)
    assert set(rows.tolist()) <= set(range(num_rows))
    enough = num_rows >= len(weights)
    for name, fraction in fractions.items():
        assert splits[name].dtype == np.int64
        assert (np.diff(splits[name]) > 0).all()
        exact = fraction * num_rows
        lent = len(weights) if enough else 0  # To splits that would be empty.
        assert -1 - lent < len(splits[name]) - exact <= 1
        assert len(splits[name]) > 0 or fraction == 0 or not enough
        assert len(splits[name]) == 0 or fraction > 0
    left = num_rows - len(rows)
    assert left < num_rows * (1 - sum(weights) / total) + 1 + 1e-6


@pytest.mark.parametrize("num_rows", [1, 3, 7, 10, 29, 100, 1001])
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1)])
def test_fractions_that_add_up_to_one_leave_no_row_out(fractions, num_rows):
    splits = part(dict(zip("abc", fractions, strict=True)), num_rows, KEY)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(num_rows))


@pytest.mark.parametrize(
    ("fractions", "num_rows", "expected"),
    [
        ((0.8, 0.1, 0.1), 1000, [800, 100, 100]),
        ((0.29, 0.71), 100, [29, 71]),  # 0.29 * 100 is less than 29 in floats.
        ((0.8, 0.1, 0.1), 14, [11, 2, 1]),
        ((0.5,), 3, [2]),
        ((0.98, 0.01, 0.01), 5, [3, 1, 1]),
        ((0.45, 0.05), 2, [1, 1]),
        ((0.5, 0.5), 1, [1, 0]),
        ((1.0, 0.0), 4, [4, 0]),
        ((1,), 4, [4]),
        ((0.1 + 0.2, 0.7), 10, [3, 7]),  # More than one, by rounding.
    ],
)
def test_sizes_are_those_of_the_largest_remainder(fractions, num_rows, expected):
    splits = part({str(i): each for i, each in enumerate(fractions)}, num_rows, KEY)
    assert list(sizes(splits).values()) == expected


def test_the_rows_of_a_fraction_are_drawn_from_all():
    rows = part({"train": 0.5}, 1000, KEY)["train"]
    assert abs(rows.mean() - 500) < 50
    assert np.diff(rows).max() > 1


def test_another_key_gives_other_splits_and_the_same_one_the_same():
    first, again, other = (part({"a": 0.5}, 100, key)["a"] for key in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_raw_keys_draw_what_typed_keys_draw():
    raw = part({"a": 0.5}, 100, jax.random.key_data(KEY))
    assert lists(raw) == lists(part({"a": 0.5}, 100, KEY))


def test_the_splits_are_the_same_on_every_machine_and_in_every_release():
    assert lists(part({"a": 0.2}, 30, KEY)) == {"a": [2, 7, 10, 13, 14, 18]}


@pytest.mark.parametrize("fractions", [{"a": 0.8, "b": 0.3}, {"a": 80, "b": 20}, {"a": -0.1}])
def test_fractions_of_more_than_all_or_less_than_nothing_are_refused(fractions):
    with pytest.raises(ValueError, match=r"splits.*(at most 1|from 0 to 1)"):
        part(fractions, 10, KEY)


def test_a_fraction_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        part({"a": float("nan")}, 10, KEY)


def test_fractions_need_a_key():
    with pytest.raises(ValueError, match="key: saw None.*jax.random.key"):
        part({"a": 0.5}, 10)


def test_a_number_is_no_key():
    with pytest.raises(TypeError, match="key: saw 0"):
        part({"a": 0.5}, 10, 0)


# Row numbers.


def test_row_numbers_come_sorted():
    splits = part({"train": [4, 0, 2], "test": np.array([5], np.uint8), "none": []})
    assert lists(splits) == {"train": [0, 2, 4], "test": [5], "none": []}
    assert all(rows.dtype == np.int64 for rows in splits.values())


def test_ranges_and_jax_arrays_number_rows():
    splits = part({"train": range(2), "test": jax.numpy.array([3])})
    assert lists(splits) == {"train": [0, 1], "test": [3]}


def test_no_splits_are_none():
    assert part({}) == {}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"a": [0, 6]}, r"splits\['a'\]: saw row 6, expected rows from 0 to 5"),
        ({"a": [-1]}, "saw row -1"),
        ({"a": [2, 1, 2]}, "saw row 2 twice"),
        ({"a": [0, 3], "b": [3]}, "saw row 3 in 'a' and in 'b'"),
    ],
)
def test_row_numbers_that_make_no_splits_are_refused(splits, message):
    with pytest.raises(ValueError, match=message):
        part(splits)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"a": [0.5, 1.0]}, "saw float64, expected row numbers"),
        ({"a": [True, False]}, "np.flatnonzero"),
        ({"a": True}, "saw a bool"),
        ({"a": [[1]]}, "saw a list"),
        ({"a": None}, "fractions"),
        ({"a": 0.5, "b": [1]}, "saw fractions and row numbers"),
        ({1: [0]}, "the name 1"),
        ([0.8, 0.2], "saw a list"),
        (None, "fractions"),
    ],
)
def test_what_parts_nothing_is_refused(splits, message):
    with pytest.raises(TypeError, match=message):
        part(splits)


# Columns.


def test_an_integer_column_makes_a_split_of_each_value():
    assert lists(part("fold")) == {"-1": [4], "0": [1, 3], "1": [2], "2": [0, 5]}
    assert lists(part("small", 3)) == {"0": [1], "1": [0, 2]}


def test_bool_columns_are_splits():
    splits = part({"train": "is_train", "test": "is_test"})
    assert lists(splits) == {"train": [0, 2, 3], "test": [1, 5]}


def test_bool_columns_that_share_a_row_are_refused():
    with pytest.raises(ValueError, match="row 0 in 'a' and in 'b'"):
        part({"a": "is_train", "b": "too"})


@pytest.mark.parametrize("splits", ["is_train", "wide", {"a": "flag"}, {"a": "wide"}])
def test_columns_of_another_type_are_refused(splits):
    with pytest.raises(TypeError, match="the column '(is_train|wide|flag)' of .*for each row"):
        part(splits)


# Files.


@pytest.fixture
def path(tmp_path):
    return tmp_path / "splits.npz"


@pytest.mark.parametrize(
    "splits", [{"train": [0, 2], "β test": [5], "none": []}, {str(i): [i] for i in range(300)}, {}]
)
def test_a_file_gives_back_what_was_saved(splits, path):
    saved = part(splits, 300)
    save_splits(path, saved, 300)
    for where in (path, str(path)):
        loaded = part(where, 300)
        assert lists(loaded) == lists(saved)
        assert list(loaded) == list(saved)
        assert all(rows.dtype == np.int64 for rows in loaded.values())


def test_a_file_is_small(path):
    save_splits(path, part({"train": 0.8, "valid": 0.1}, 100_000, KEY), 100_000)
    assert path.stat().st_size < 50_000


def test_a_file_of_another_number_of_rows_is_refused(path):
    save_splits(path, part({"a": [0]}), 6)
    with pytest.raises(ValueError, match="splits of 6 rows, expected splits of 7"):
        load_splits(path, 7)


def test_every_damaged_byte_is_noticed_or_harmless(path):
    saved = part({"train": [0, 2], "test": [5]})
    save_splits(path, saved, 6)
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert lists(load_splits(path, 6)) == lists(saved)
        except ValueError as error:
            assert "save the splits again" in str(error)  # noqa: PT017
            refused += 1
    assert refused > len(whole) // 2


def test_other_owners_than_the_digest_is_of_are_refused(path):
    save_splits(path, part({"train": [0, 2], "test": [5]}), 6)
    with np.load(path) as file:
        contents = dict(file)
    contents["owners"] = contents["owners"][::-1]
    np.savez(path, **contents)
    with pytest.raises(ValueError, match="digest"):
        load_splits(path, 6)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04K\x00."])
def test_what_is_no_file_of_splits_is_refused(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: saw no valid file of splits"):
        load_splits(path, 6)


def test_a_file_that_is_not_there_says_so(path):
    with pytest.raises(FileNotFoundError):
        load_splits(path, 6)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ends in .npz"):
        save_splits(tmp_path / "splits.json", {}, 6)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_old_file(path):
    save_splits(path, {"a": np.array([0])}, 6)
    with pytest.raises(ValueError, match="share no row"):
        save_splits(path, {"a": np.array([0]), "b": np.array([0])}, 6)
    assert lists(load_splits(path, 6)) == {"a": [0]}
