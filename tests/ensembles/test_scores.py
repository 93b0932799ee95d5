"""Losses and accuracies are each member's own, whatever is shared, masked or tied."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh

E, B, C = 3, 5, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(E, B, C)).astype(np.float32)
LABELS = RNG.integers(0, C, (E, B)).astype(np.int32)
cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)


def square(outputs, targets):
    return ((outputs - targets) ** 2).sum(-1)


# batch_loss


@pytest.mark.parametrize("labels", [LABELS, LABELS[0]], ids=["own", "shared"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_is_that_of_each_member_alone(labels, reduction):
    losses = jh.batch_loss(LOGITS, labels, cross_entropy, reduction=reduction)
    reduce = {"mean": np.mean, "sum": np.sum, "none": np.asarray}[reduction]
    for member in range(E):
        own = labels if labels.ndim == 1 else labels[member]
        expected = reduce(cross_entropy(LOGITS[member], own))
        np.testing.assert_allclose(losses[member], expected, rtol=1e-6)


def test_outputs_and_targets_may_be_trees_of_which_some_leaves_are_shared():
    outputs = {"energy": jnp.ones((E, B)), "forces": jnp.ones((E, B, 7, 3))}
    targets = {"energy": jnp.arange(B, dtype=jnp.float32), "forces": jnp.zeros((E, B, 7, 3))}

    def loss_fn(outputs, targets):
        assert outputs["forces"].shape == targets["forces"].shape == (B, 7, 3)
        forces = ((outputs["forces"] - targets["forces"]) ** 2).mean((1, 2))
        return (outputs["energy"] - targets["energy"]) ** 2 + forces

    losses = jh.batch_loss(outputs, targets, loss_fn, reduction="none")
    np.testing.assert_array_equal(losses, np.tile([2.0, 1.0, 2.0, 5.0, 10.0], (E, 1)))


def test_targets_may_be_none():
    losses = jh.batch_loss(LOGITS, None, lambda outputs, _: outputs.sum(-1), reduction="sum")
    np.testing.assert_allclose(losses, LOGITS.sum((1, 2)), rtol=1e-5)


def test_gradients_of_the_summed_losses_are_each_members_own():
    def total(logits):
        return jh.batch_loss(logits, LABELS, cross_entropy).sum()

    grads = jax.jit(jax.grad(total))(LOGITS)
    alone = jax.jit(jax.grad(lambda x, y: cross_entropy(x, y).mean()))
    for member in range(E):
        one = alone(LOGITS[member], LABELS[member])
        np.testing.assert_allclose(grads[member], one, rtol=1e-5, atol=1e-7)


def test_a_loss_works_under_vmap():
    stacked = np.stack([LOGITS, 2 * LOGITS])
    losses = jax.vmap(lambda logits: jh.batch_loss(logits, LABELS, cross_entropy))(stacked)
    np.testing.assert_allclose(losses[1], jh.batch_loss(2 * LOGITS, LABELS, cross_entropy))


@pytest.mark.parametrize("mask", [LABELS > 0, LABELS[0] > 0], ids=["own", "shared"])
def test_masked_rows_count_for_nothing(mask):
    mean = jh.batch_loss(LOGITS, LABELS, cross_entropy, mask=mask)
    total = jh.batch_loss(LOGITS, LABELS, cross_entropy, mask=mask, reduction="sum")
    rows = jh.batch_loss(LOGITS, LABELS, cross_entropy, mask=mask, reduction="none")
    for member, kept in enumerate(np.broadcast_to(mask, (E, B))):
        alone = np.asarray(cross_entropy(LOGITS[member][kept], LABELS[member][kept]))
        np.testing.assert_allclose(mean[member], alone.mean(), rtol=1e-6)
        np.testing.assert_allclose(total[member], alone.sum(), rtol=1e-6)
        assert not rows[member][~kept].any()


@pytest.mark.parametrize("poisoned", ["outputs", "targets"])
def test_nan_behind_the_mask_reaches_neither_losses_nor_gradients(poisoned):
    mask = np.ones((E, B), bool)
    mask[0, 0] = mask[1] = False
    outputs = np.ones((E, B, 2), np.float32)
    targets = np.zeros((B, 2), np.float32)
    if poisoned == "outputs":
        outputs[~mask] = np.nan
    else:
        targets[~mask[0]] = np.nan
        mask[:, 0] = False

    def total(outputs, scale):
        distance = lambda o, t: jnp.sqrt(((o - t) ** 2).sum(-1)) * scale  # noqa: E731
        return jh.batch_loss(outputs, targets, distance, mask=mask).sum()

    loss, (grads, slope) = jax.jit(jax.value_and_grad(total, (0, 1)))(outputs, 3.0)
    np.testing.assert_allclose(loss, 2 * 3 * np.sqrt(2), rtol=1e-6)
    grads = np.asarray(grads)
    assert np.isfinite(grads).all()
    assert not grads[~mask].any()
    assert grads[mask].all()
    np.testing.assert_allclose(slope, 2 * np.sqrt(2), rtol=1e-6)


def test_a_loss_at_which_the_gradient_is_infinite_may_be_masked():
    outputs = jnp.array([[0.0, 4.0]])
    total = lambda x: jh.batch_loss(  # noqa: E731
        x, None, lambda x, _: jnp.sqrt(x), mask=jnp.array([False, True])
    ).sum()
    np.testing.assert_allclose(jax.grad(total)(outputs), [[0.0, 0.25]])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_member_of_which_no_row_counts_has_no_loss_and_no_gradient(reduction):
    def total(outputs):
        losses = jh.batch_loss(
            outputs, LABELS, cross_entropy, mask=jnp.zeros(B, bool), reduction=reduction
        )
        return losses.sum()

    loss, grads = jax.jit(jax.value_and_grad(total))(LOGITS)
    assert loss == 0
    assert not grads.any()


@pytest.mark.parametrize(("dtype", "summed"), [("bool", "float32"), ("bfloat16", "float32")])
def test_narrow_losses_are_summed_in_float32(dtype, summed):
    outputs = jnp.ones((2, 1000), dtype)
    one = lambda outputs, _: outputs  # noqa: E731
    losses = jh.batch_loss(outputs, None, one, reduction="sum")
    assert losses.dtype == summed
    assert losses.tolist() == [1000, 1000]
    assert jh.batch_loss(outputs, None, one, reduction="none").dtype == dtype


SQUARE = jnp.zeros((B, B, B))  # As many members as rows and columns.


@pytest.mark.parametrize("axis", [0, None])
def test_targets_that_fit_both_ways_must_be_told(axis):
    targets = jnp.arange(B * B, dtype=jnp.float32).reshape(B, B)
    loss_fn = lambda o, t: t if t.ndim == 1 else t[:, 0]  # noqa: E731
    with pytest.raises(ValueError, match=r"targets: saw \[5, 5\], .* and not both\. Say target_ax"):
        jh.batch_loss(SQUARE, targets, loss_fn)
    losses = jh.batch_loss(SQUARE, targets, loss_fn, target_axis=axis, reduction="none")
    np.testing.assert_array_equal(losses[1], targets[1] if axis == 0 else targets[:, 0])


@pytest.mark.parametrize(
    ("targets", "axis", "message"),
    [
        ({"y": LABELS[:, :3]}, "auto", r"targets\['y'\]: saw \[3, 3\], expected \[5, ...\] that"),
        ({"y": 1.0}, "auto", r"targets\['y'\]: saw \[\], expected \[5, ...\] that members share"),
        (LABELS, None, r"targets: saw \[3, 5\], expected \[5, ...\]. Leave target_axis"),
        (LABELS[0], 0, r"targets: saw \[5\], expected \[3, 5, ...\]. Leave target_axis"),
    ],
)
def test_targets_of_other_rows_are_refused(targets, axis, message):
    with pytest.raises(ValueError, match=message):
        jh.batch_loss(LOGITS, targets, cross_entropy, target_axis=axis)


@pytest.mark.parametrize(
    ("loss_fn", "error", "seen"),
    [
        (lambda o, t: cross_entropy(o, t).mean(), ValueError, "a scalar"),
        (lambda o, t: o, ValueError, r"float32\[5, 4\]"),
        (lambda o, t: 0.0, TypeError, "a float"),
        (lambda o, t: {"loss": cross_entropy(o, t)}, TypeError, "a dict"),
    ],
)
def test_a_loss_that_is_not_one_per_row_is_refused(loss_fn, error, seen):
    with pytest.raises(error, match=rf"loss_fn: saw {seen}, expected one loss per row, \[B\] = "):
        jh.batch_loss(LOGITS, LABELS, loss_fn)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (jnp.ones(B), TypeError),
        (np.ones(E, bool), ValueError),
        (jnp.ones((B, E), bool), ValueError),
    ],
)
def test_a_mask_of_another_form_is_refused(mask, error):
    with pytest.raises(error, match=r"mask: saw .*, expected bool\[5\] or bool\[3, 5\]"):
        jh.batch_loss(LOGITS, LABELS, cross_entropy, mask=mask)


@pytest.mark.parametrize("outputs", [jnp.ones(3), {}, [jnp.ones((3, 5)), jnp.ones((3, 4))]])
def test_outputs_without_members_and_rows_are_refused(outputs):
    with pytest.raises(ValueError, match=r"outputs: saw .*, expected \[E, B, ...\] arrays"):
        jh.batch_loss(outputs, None, square)


@pytest.mark.parametrize("choice", [{"reduction": "max"}, {"target_axis": 1}])
def test_unknown_choices_are_refused(choice):
    with pytest.raises(ValueError, match="expected one of"):
        jh.batch_loss(LOGITS, LABELS, cross_entropy, **choice)


# batch_topk, batch_accuracy


@pytest.mark.parametrize("labels", [LABELS, LABELS[0]], ids=["own", "shared"])
def test_fractions_are_those_of_top_k_for_each_member(labels):
    # Few different values, so that many are equal; and no -0.0, which top_k ranks below 0.0.
    logits = np.round(LOGITS) + np.float32(0)
    fractions = jax.jit(jh.batch_topk, static_argnums=2)(logits, labels, (1, 2, C))
    assert fractions.shape == (3, E)
    for row, k in enumerate((1, 2, C)):
        classes = np.asarray(jax.lax.top_k(logits, k)[1])
        expected = (classes == np.broadcast_to(labels, (E, B))[..., None]).any(-1).mean(-1)
        np.testing.assert_allclose(fractions[row], expected, rtol=1e-6)


def test_accuracy_is_that_of_the_likeliest_class():
    expected = (np.round(LOGITS).argmax(-1) == LABELS).mean(-1)
    np.testing.assert_allclose(jh.batch_accuracy(np.round(LOGITS), LABELS), expected, rtol=1e-6)


def test_rows_may_have_several_classifications():
    logits = np.stack([LOGITS, -LOGITS], axis=2)
    labels = np.stack([LABELS, LABELS], axis=2)
    both = [np.asarray(jh.batch_accuracy(sign * LOGITS, LABELS)) for sign in (1, -1)]
    np.testing.assert_allclose(jh.batch_accuracy(logits, labels), sum(both) / 2, rtol=1e-6)


@pytest.mark.parametrize("k", [1, C])
def test_nan_and_labels_that_are_no_class_count_as_wrong(k):
    logits = jnp.zeros((1, 4, C)).at[0, 1].set(jnp.nan)
    labels = jnp.array([0, 0, -1, C])
    assert jh.batch_topk(logits, labels, [k]).tolist() == [[0.25]]


def test_a_class_of_nan_is_ahead_of_all_numbers():
    logits = jnp.array([[[jnp.nan, 5.0]]])
    assert jh.batch_topk(logits, jnp.array([1]), (1, 2)).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("logits", "targets", "error", "argument"),
    [
        (LOGITS[0], LABELS[0], ValueError, "logits"),
        (LOGITS, LABELS.astype(jnp.float32), TypeError, "targets"),
        (LOGITS, LABELS.T, ValueError, "targets"),
        (LOGITS, jax.nn.one_hot(LABELS, C, dtype=jnp.int32), ValueError, "targets"),
    ],
)
def test_logits_and_targets_that_do_not_fit_are_refused(logits, targets, error, argument):
    with pytest.raises(error, match=f"{argument}: saw"):
        jh.batch_accuracy(logits, targets)


@pytest.mark.parametrize(
    ("ks", "error", "message"),
    [
        (1, TypeError, r"ks: saw 1, .* Write \(1, 5\)"),
        ((), TypeError, "ks: saw"),
        ((1, 0), ValueError, r"ks\[1\]: saw 0"),
        ((5,), ValueError, r"ks\[0\]: saw 5, expected at most the 4 classes"),
        ((1.0,), TypeError, r"ks\[0\]: saw 1.0"),
    ],
)
def test_ks_that_are_not_counts_of_classes_are_refused(ks, error, message):
    with pytest.raises(error, match=message):
        jh.batch_topk(LOGITS, LABELS, ks)
