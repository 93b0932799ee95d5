"""Messages have one form, and numbers and choices are checked in one way."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.errors import check_choice, check_count, explain


def test_a_message_names_the_argument_the_path_what_was_seen_and_what_to_do():
    text = explain("data", path="['x']", seen="7 rows", expected="8 rows", fix="Cut it.")
    assert text == "data['x']: saw 7 rows, expected 8 rows. Cut it."


def test_a_message_without_a_remedy_ends_with_a_full_stop():
    assert explain("data", seen="a", expected="b") == "data: saw a, expected b."


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)], ids=repr
)
def test_whole_numbers_of_any_kind_count(value):
    count = check_count("batch_size", value)
    assert type(count) is int
    assert count == 3


@pytest.mark.parametrize(
    "value",
    [True, False, np.True_, 3.0, np.float32(3), jnp.float32(3), np.array([3]), "3", None],
    ids=repr,
)
def test_what_is_no_whole_number_is_named_with_its_type(value):
    with pytest.raises(TypeError, match=r"batch_size: saw .*\(.+\), expected a whole number"):
        check_count("batch_size", value)


@pytest.mark.parametrize(("value", "least"), [(0, 1), (-1, 0), (4, 5)])
def test_a_number_below_the_least_is_named_with_it(value, least):
    with pytest.raises(ValueError, match=f"size: saw {value}, .* of at least {least}"):
        check_count("size", value, least=least)


@pytest.mark.parametrize("value", [None, "pad", "drop", 1])
def test_a_choice_among_those_offered_passes(value):
    check_choice("tail", value, (None, "pad", "drop", 1))


@pytest.mark.parametrize("value", ["PAD", "", True, 1.0, np.zeros(2), ["pad"]], ids=repr)
def test_any_other_choice_is_refused_with_those_offered(value):
    with pytest.raises(ValueError, match=r"tail: saw .*, expected one of None, 'pad', 'drop', 1"):
        check_choice("tail", value, (None, "pad", "drop", 1))


def test_a_loss_that_is_not_finite_can_be_caught_as_a_floating_point_error():
    with pytest.raises(FloatingPointError):
        raise jh.NonFiniteError("loss")


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    report = jh.RunReport(timeline=(("read", 0.0, 1.0),))
    match = r'plot: saw no matplotlib .*`pip install -e "\.\[plots\]"` in a clone'
    with pytest.raises(ImportError, match=match):
        report.plot()
