"""Which values terms take: shapes, dtypes, masks, classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics

import jaxhandler as jh
from jaxhandler import losses
from tests.assembly.gathering import loss_of, metric_of, metrics_of

P, T, W, MASK = jh.pred("p"), jh.true("t"), jh.true("w"), jh.true("m")
LOGITS, LABEL = jh.pred("logits"), jh.true("label")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "mask",
    [MASK, 1 - jh.true("out"), MASK * jh.true("ones"), MASK * 1, jh.true("floats"), 2 * MASK],
)
def test_masks_are_bools_numbers_and_arithmetic_of_them(mask):
    arrays = {
        "p": np.arange(4.0, dtype=np.float32),
        "m": np.array([True, False, True, False]),
        "out": np.array([False, True, False, True]),
        "ones": np.ones(4, np.int32),
        # A mask that is not known leaves out, as a label does.
        "floats": np.array([1, 0, 0.5, np.nan], np.float32),
    }
    assert metric_of(losses.mean(P, mask=mask), arrays) == 1.0
    assert float(loss_of(losses.mean(P, mask=mask), arrays)) == 1.0


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
@pytest.mark.parametrize("name", ["mask", "weights"])
def test_masks_and_weights_may_lack_trailing_axes(shape, name):
    weights = np.arange(4.0).reshape(4, *[1] * (len(shape) - 1)) * np.ones(shape)
    arrays = {"p": np.arange(12.0).reshape(4, 3), "t": np.zeros((4, 3)), "w": weights, "m": weights}
    errors = arrays["p"][1:] if name == "mask" else arrays["p"]
    w = None if name == "mask" else np.repeat(np.arange(4.0), 3).reshape(4, 3)
    term = losses.mae(P, T, mask=MASK) if name == "mask" else losses.weighted_mae(P, T, W)
    assert metric_of(term, arrays) == pytest.approx(np.average(errors, weights=w), rel=1e-12)


def test_a_mask_of_more_axes_is_refused():
    arrays = {"p": np.zeros(4), "m": np.ones((4, 3))}
    with pytest.raises(ValueError, match=r"saw a mask \[4, 3\] for entries \[4\]"):
        metric_of(losses.mean(P, mask=MASK), arrays)


def test_weights_that_fit_nothing_are_refused():
    arrays = {"p": np.zeros((4, 3)), "t": np.zeros((4, 3)), "w": np.ones((4, 2))}
    with pytest.raises(ValueError, match="expected weights that fit the other two"):
        metric_of(losses.weighted_mse(P, T, W), arrays)


@pytest.mark.parametrize("flat", ["p", "t"])
def test_a_column_of_one_fits_rows_and_is_not_multiplied_out(flat):
    p, t = np.arange(5.0), np.arange(5.0) ** 2
    arrays = {"p": p[:, None], "t": t[:, None]} | {flat: {"p": p, "t": t}[flat]}
    expected = sklearn.metrics.mean_squared_error(t, p)
    assert metric_of(losses.mse(P, T), arrays) == expected
    assert float(loss_of(losses.mse(P, T), arrays)) == pytest.approx(expected)
    # Nor is the difference, [B, 1] less [B].
    assert metric_of(losses.mean((P - T) ** 2), arrays) == expected


@pytest.mark.parametrize(
    "shapes", [((5, 3), (5,)), ((5,), (5, 3)), ((5, 3), (5, 2)), ((5, 3), (5, 1))]
)
@pytest.mark.parametrize("name", ["mse", "mae", "rmse", "rsq"])
def test_shapes_that_differ_are_refused(shapes, name):
    arrays = {"p": np.zeros(shapes[0]), "t": np.zeros(shapes[1])}
    shown = [str(list(shape)).replace("[", r"\[").replace("]", r"\]") for shape in shapes]
    with pytest.raises(
        ValueError, match=f"saw values float64{shown[0]}, float64{shown[1]}, expect"
    ):
        metric_of(getattr(losses, name)(P, T), arrays)


@pytest.mark.parametrize("fn", [np.sum, lambda p: p[:2]])
def test_what_has_no_row_for_each_row_is_refused(fn):
    with pytest.raises(ValueError, match=r"expected one for each of 4 rows, \[B, ...\]"):
        metric_of(losses.mean(losses.apply(fn, P)), {"p": np.zeros((4, 3))})


NUMERIC = ["int8", "uint8", "int32", "int64", "uint64", "bool", "float16", "bfloat16", "float64"]


@pytest.mark.parametrize("dtype", NUMERIC)
def test_columns_of_every_dtype_are_compared_as_floats(dtype):
    # Of uint8 the difference would wrap around, of bools it does not exist.
    t = np.array([0, 1, 1, 0, 1], jnp.dtype(dtype))
    arrays = {"p": np.array([1, 0, 1, 0.5, -3], np.float32), "t": t}
    assert metric_of(losses.mse(P, T), arrays) == (1 + 1 + 0 + 0.25 + 16) / 5
    on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
    assert float(loss_of(losses.mse(P, T), on_device)) == pytest.approx(3.65)
    swapped = {"p": t, "t": arrays["p"]}
    assert metric_of(losses.mse(P, T), swapped) == 3.65


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_are_missing_too_where_they_are_nan(dtype):
    t = np.array([0, np.nan, 1], jnp.dtype(dtype))
    arrays = {"p": np.zeros(3, np.float32), "t": t}
    assert metric_of(losses.mse(P, T), arrays) == 0.5
    assert float(loss_of(losses.mse(P, T), jax.tree.map(jnp.asarray, arrays))) == 0.5


def test_narrow_floats_are_added_up_in_wide_ones():
    # The sum of squares is beyond the largest float16.
    arrays = {"p": np.full(100, 100, np.float16), "t": np.zeros(100, np.float16)}
    assert metric_of(losses.mse(P, T), arrays) == 1e4
    assert float(loss_of(losses.mse(P, T), jax.tree.map(jnp.asarray, arrays))) == 1e4


def test_complex_numbers_need_a_function_that_makes_them_real():
    arrays = {"p": np.array([3 + 4j, 0], np.complex64), "t": np.array([0, 1j], np.complex64)}
    for compute in (metric_of, loss_of):
        with pytest.raises(ValueError, match="complex64.*expected real numbers: apply jnp.real"):
            compute(losses.mse(P, T), arrays)
        assert float(compute(losses.mean(losses.apply(abs, P - T)), arrays)) == pytest.approx(3)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint32"])
def test_class_numbers_are_integers_of_any_width(dtype):
    label = np.arange(6).astype(dtype) % 4
    arrays = {"logits": RNG.normal(size=(6, 4)).astype(np.float32), "label": label}
    expected = {
        "ce": sklearn.metrics.log_loss(
            label, scipy.special.softmax(arrays["logits"].astype(float), axis=1), labels=range(4)
        ),
        "accuracy": (arrays["logits"].argmax(axis=1) == label).mean(),
    }
    terms = {"ce": losses.cross_entropy(LOGITS, LABEL), "accuracy": losses.accuracy(LOGITS, LABEL)}
    assert metrics_of(terms, arrays) == pytest.approx(expected)
    batch = jax.tree.map(jnp.asarray, arrays)
    assert {name: float(loss_of(term, batch)) for name, term in terms.items()} == pytest.approx(
        expected
    )


def test_there_may_be_more_classes_than_labels_of_a_byte_can_name():
    arrays = {"logits": jnp.zeros((3, 300)), "label": jnp.array([0, 1, 255], jnp.uint8)}
    assert float(loss_of(losses.cross_entropy(LOGITS, LABEL), arrays)) == pytest.approx(np.log(300))
    far = {**arrays, "logits": jnp.zeros((3, 300)).at[:, 299].set(1)}
    assert float(loss_of(losses.accuracy(LOGITS, LABEL), far)) == 0


def test_a_class_that_does_not_exist_makes_nan_unless_it_is_masked():
    arrays = {"logits": np.zeros((3, 2)), "label": np.array([0, 1, 255], np.uint8)}
    arrays["m"] = arrays["label"] != 255
    for compute in (metric_of, loss_of):
        assert np.isnan(compute(losses.cross_entropy(LOGITS, LABEL), arrays))
        kept = losses.cross_entropy(LOGITS, LABEL, mask=MASK)
        assert float(compute(kept, arrays)) == pytest.approx(np.log(2))


@pytest.mark.parametrize("label", [np.zeros((5, 1), int), np.zeros(5), np.zeros(5, bool)])
@pytest.mark.parametrize("name", ["cross_entropy", "accuracy"])
def test_labels_are_class_numbers_or_probabilities(name, label):
    with pytest.raises(ValueError, match=r"expected logits \[B, ..., K\], and class numbers \[B"):
        metric_of(
            getattr(losses, name)(LOGITS, LABEL), {"logits": np.zeros((5, 2)), "label": label}
        )


def test_logits_may_have_positions_between_rows_and_classes():
    logits, label = RNG.normal(size=(3, 5, 4)), RNG.integers(-1, 4, size=(3, 5))
    there = label >= 0
    expected = sklearn.metrics.log_loss(
        label[there], scipy.special.softmax(logits, axis=2)[there], labels=range(4)
    )
    found = metric_of(losses.cross_entropy(LOGITS, LABEL), {"logits": logits, "label": label}, [1])
    assert found == pytest.approx(expected)


def test_large_logits_do_not_overflow():
    arrays = {"logits": np.array([[1e5, 0.0]]), "label": np.array([1])}
    term = losses.cross_entropy(LOGITS, LABEL)
    assert metric_of(term, arrays) == 1e5
    assert float(loss_of(term, jax.tree.map(jnp.asarray, arrays))) == 1e5
