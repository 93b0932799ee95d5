"""No run gives back what is not finite, be the loss ever so finite; and it says where it began."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.handlers.finite import check_params

KEY = jax.random.key(0)
ROWS = np.ones((24, 2), np.float32)
WITH_NAN = ROWS.copy()
WITH_NAN[13, 1] = np.nan


def hides_nan(params, batch):
    # The slope of the root is infinite at zero and NaN where it is left out; the loss never is.
    scale = params["scale"]
    return jnp.where(scale > 0, jnp.sqrt(scale), 0) + (batch * params["w"]).sum(1) ** 2


def start(trainer, w=1.0):
    params = {"scale": jnp.zeros(()), "unused": jnp.ones(3), "w": jnp.full(2, w)}
    return trainer.init(params, key=KEY)


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_parameters_behind_a_finite_loss_are_noticed_whatever_step_broke_them(mode):
    tr = jh.trainer(hides_nan, optax.sgd(1e-3), batch_size=4, mode=mode)
    expected = r"params\['scale'\]: saw a value that is not finite after step 12, although"
    with pytest.raises(jh.NonFiniteError, match=expected):
        tr.train_from_host(start(tr), ROWS, macrobatch_size=8, epochs=2)


def test_they_are_noticed_before_they_are_committed(tmp_path):
    tr = jh.trainer(lambda w, x: jnp.sqrt(jnp.abs(w * x)), optax.sgd(0.1), batch_size=2)
    state, rows = tr.init(jnp.float32(1), key=KEY), np.ones(12, np.float32)
    rows[7] = 0
    checkpoint = jh.checkpoint(tmp_path, every=0)
    for _ in range(2):
        with pytest.raises(jh.NonFiniteError, match="params: saw a value .* after step 4"):
            tr.train_from_host(state, rows, shuffle=None, macrobatch_size=4, checkpoint=checkpoint)
        assert np.isfinite(jh.load_state(tmp_path, like=state).params)


def test_so_are_parameters_that_the_loss_does_not_use():
    grow = optax.chain(
        optax.sgd(1e-3), optax.add_decayed_weights(jnp.inf, {"unused": True, "w": False})
    )
    tr = jh.trainer(lambda params, batch: (batch * params["w"]).sum(1), grow, batch_size=4)
    state = tr.init({"unused": jnp.ones(3), "w": jnp.ones(2)}, key=KEY)
    with pytest.raises(jh.NonFiniteError, match=r"params\['unused'\]"):
        tr.train(state, ROWS)


def test_parameters_that_break_make_the_next_loss_tell_long_before_the_run_ends():
    tr = jh.trainer(lambda w, batch: (batch * w).sum(1) ** 2, optax.sgd(1e30), batch_size=4)
    seen = []
    with pytest.raises(jh.NonFiniteError, match=r"loss_fn: saw the loss .* epoch 0, macrobatch 1"):
        tr.train_from_host(
            tr.init(jnp.ones(2), key=KEY),
            ROWS,
            macrobatch_size=4,
            epochs=50,
            on_macrobatch_start=lambda progress: seen.append(progress.macrobatch),
        )
    assert len(seen) <= 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_the_member_with_such_parameters_is_named_with_its_step(dtype):
    tr = jh.trainer(hides_nan, optax.sgd(0.1))
    state = start(tr)._replace(step=jnp.asarray([3, 4, 5]))
    leaf = jnp.ones((3, 2), dtype)
    check_params(state._replace(params={"w": leaf}))
    expected = r"params\['w'\]: saw a value that is not finite after step 5, member 2, although"
    with pytest.raises(jh.NonFiniteError, match=expected) as error:
        check_params(state._replace(params={"w": leaf.at[2, 1].set(jnp.nan)}))
    assert error.value.rows is None
    with pytest.raises(jh.NonFiniteError, match="after step 3, members 0, 1, although"):
        check_params(state._replace(params={"w": leaf.at[:2, 1].set(jnp.inf)}))


# Where a loss was not finite, and what the rows held.


def loss_fn(w, batch):
    return (batch * w).sum(1) ** 2


def ready(on_nonfinite="raise", optimizer=None, members=None, **options):
    """A trainer, of that many models if any, and a state to start it from."""
    tr = jh.trainer(loss_fn, optimizer or optax.sgd(1e-3), batch_size=4, on_nonfinite=on_nonfinite)
    if members is None:
        return tr, tr.init(jnp.ones(2), key=KEY)
    many = jh.ensemble(tr, members=members, strategy="vmap", **options)
    return many, many.init(jnp.ones((members, 2)), key=KEY)


def refused(tr, state, data, **options):
    with pytest.raises(jh.NonFiniteError) as error:
        tr.train_from_host(state, data, **{"macrobatch_size": 8, **options})
    return error.value


def swept(members, wild, on_nonfinite="raise"):
    """An ensemble of which some members explode, from the second step on."""
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)
    many, state = ready(on_nonfinite, optimizer, members)
    rates = jnp.full(members, 1e-3).at[jnp.asarray(wild)].set(1e30)
    return many, state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rates))


class Sliced:
    """Rows that only slice, must not be sliced by two threads at once, and wear out."""

    def __init__(self, rows, times=99):
        self.rows, self.shape, self.dtype, self.times = rows, rows.shape, rows.dtype, times
        self.asked, self.busy = [], threading.Lock()

    def __getitem__(self, which):
        assert self.busy.acquire(blocking=False), "sliced by two threads at once"
        time.sleep(0.005)
        self.asked.append((which.start, which.stop))
        self.busy.release()
        if len(self.asked) > self.times:
            raise OSError("the tape is worn out")
        return self.rows[which]


@pytest.mark.parametrize("shuffle", [None, "blocks", "rows", "global"])
def test_rows_are_named_as_the_data_numbers_them_in_whatever_order_they_came(shuffle):
    tr, state = ready()
    look = jh.handler(lambda carry, batch: (carry, batch), batch_size=4)
    ids = np.arange(24, dtype=np.int32)
    given = {"shuffle": shuffle, "key": state.order_key, "macrobatch_size": 8}
    visited = look.handle_from_host((), ids, **given)[1].reshape(3, 2, 4)
    ((place, batch, _),) = np.argwhere(visited == 13)
    rows = np.sort(visited[place, batch])
    error = refused(tr, state, WITH_NAN, shuffle=shuffle)
    np.testing.assert_array_equal(error.rows, rows)
    scattered = "rows " + ", ".join(map(str, rows))
    named = "rows 12 to 16" if shuffle in (None, "blocks") else scattered
    assert str(error) == (
        f"loss_fn: saw the loss nan in epoch 0, macrobatch {place}, batch {batch} ({named} of "
        "data), expected a finite one. There data[13, 1] is nan. Mend or mask these rows, or "
        'leave such steps out with on_nonfinite="skip".'
    )


def test_many_rows_are_named_by_their_first_few():
    tr = jh.trainer(loss_fn, optax.sgd(1e-3), batch_size=9)
    state = tr.init(jnp.ones(2), key=KEY)
    error = refused(tr, state, WITH_NAN, macrobatch_size=18)
    first = ", ".join(map(str, error.rows[:4]))
    assert f"(rows {first} and {len(error.rows) - 4} others of data)" in str(error)
    one = jh.trainer(loss_fn, optax.sgd(1e-3), batch_size=1)
    assert "(row 13 of data)" in str(refused(one, state, WITH_NAN))


def test_values_are_named_by_leaf_row_and_place_in_the_row():
    data = {
        "id": np.arange(24),
        "x": ROWS,
        "y": [np.ones((24, 2, 3), np.float32), np.ones(24, np.float16)],
    }
    data["y"][0][13, 1, 2] = -np.inf
    data["y"][1][12:14] = np.nan
    tr = jh.trainer(
        lambda w, batch: (batch["x"] * w).sum(1) + batch["y"][0].sum((1, 2)),
        optax.sgd(1e-3),
        batch_size=4,
    )
    error = refused(tr, tr.init(jnp.ones(2), key=KEY), data, shuffle=None)
    expected = (
        "There data['y'][0][13, 1, 2] is -inf, the first of 3 values that are not finite. Mend"
    )
    assert expected in str(error)


@pytest.mark.parametrize(("dtype", "shown"), [(jnp.bfloat16, "nan"), (jnp.complex64, "(nan+0j)")])
def test_values_of_other_dtypes_are_looked_at_too(dtype, shown):
    tr = jh.trainer(
        lambda w, batch: jnp.abs(batch).astype(jnp.float32) @ w, optax.sgd(1e-3), batch_size=4
    )
    error = refused(tr, tr.init(jnp.ones(2), key=KEY), WITH_NAN.astype(dtype))
    assert f"There data[13, 1] is {shown}. Mend" in str(error)


def test_finite_inputs_point_at_the_rest():
    tr, state = ready(optimizer=optax.sgd(1e30))
    error = refused(tr, state, ROWS, shuffle=None)
    assert "batch 1 (rows 4 to 8 of data), expected" in str(error)
    assert "All inputs of these rows are finite. Parameters may have broken in the step" in str(
        error
    )


@pytest.mark.parametrize("policy", ["raise", "freeze"])
def test_rows_are_read_again_once_after_those_that_are_being_read(policy):
    tr, state = ready(policy)
    data = Sliced(WITH_NAN)
    if policy == "raise":
        error = refused(tr, state, data)
        assert "There data[13, 1] is nan" in str(error)
        start, stop = int(error.rows[0]), int(error.rows[-1]) + 1
        assert (start, stop) == data.asked[-1]
        assert stop - start <= 8
    else:
        with pytest.warns(UserWarning, match=r"There data\[13, 1\] is nan"):
            tr.train_from_host(state, data, macrobatch_size=8, read_ahead=2)
        assert len(data.asked) == 4


def test_rows_that_cannot_be_read_again_do_not_hide_what_happened():
    tr, state = ready()
    error = refused(tr, state, Sliced(WITH_NAN, times=3), shuffle=None)
    assert "macrobatch 1, batch 1 (rows 12 to 16 of data)" in str(error)
    assert "These rows could not be read again (the tape is worn out)." in str(error)


def test_rows_of_a_split_are_named_as_the_split_numbers_them():
    database = jh.database({"x": WITH_NAN}, splits={"odd": range(1, 24, 2)})
    tr = jh.trainer(lambda w, batch: loss_fn(w, batch["x"]), optax.sgd(1e-3), batch_size=4)
    state = tr.init(jnp.ones(2), key=KEY)
    error = refused(tr, state, database.source("odd"), shuffle=None)
    assert "(rows 4 to 8 of odd), expected a finite one. There odd['x'][6, 1] is nan." in str(error)
    assert database.splits["odd"][6] == 13


def test_rows_on_the_device_are_named_too():
    tr, state = ready()
    with pytest.raises(jh.NonFiniteError, match=r"There data\[13, 1\] is nan") as error:
        tr.train(state, jnp.asarray(WITH_NAN))
    assert 13 in error.value.rows
    assert len(error.value.rows) == 4


# Members.


def test_members_that_explode_at_once_are_all_named():
    many, state = swept(4, [1, 3])
    error = refused(many, state, ROWS, shuffle=None)
    expected = "saw the loss inf in epoch 0, macrobatch 0, batch 1, members 1, 3 (rows 4 to 8 of"
    assert expected in str(error)
    many, state = swept(9, range(2, 9))
    assert "batch 1, members 2, 3, 4, 5 and 3 others (" in str(refused(many, state, ROWS))


def test_so_are_those_that_follow_in_the_same_macrobatch():
    many, state = ready(members=3)
    weights = jnp.array([1.0, 1e10, jnp.nan])
    data = np.ones((8, 3, 2), np.float32)
    data[4:] = 1e10
    one = jh.trainer(loss_fn, optax.sgd(0.0), batch_size=4)
    many = jh.ensemble(one, members=3, member_data=True, strategy="vmap")
    error = refused(many, state._replace(params=weights[:, None] * jnp.ones(2)), data, shuffle=None)
    assert (
        "batch 0, member 2 (rows 0 to 4 of data), later in that macrobatch also member 1, exp"
        in (str(error))
    )


def test_members_with_orders_of_their_own_have_rows_of_their_own():
    many, state = ready(members=3, member_order="shuffle")
    alone, _ = ready()
    errors = [
        refused(alone, state_of(alone, state, member), WITH_NAN, macrobatch_size=24)
        for member in range(3)
    ]
    batches = [int(str(error).split("batch ")[2].split()[0]) for error in errors]
    first = [member for member in range(3) if batches[member] == min(batches)]
    later = [member for member in range(3) if batches[member] != min(batches)]
    named = [
        f"member {member} (rows {', '.join(map(str, errors[member].rows))} of data)"
        for member in first
    ]
    error = refused(many, state, WITH_NAN, macrobatch_size=24)
    assert f"batch {min(batches)}, {', '.join(named)}, later" in str(error)
    assert f"also member{'s' * (len(later) > 1)} {', '.join(map(str, later))}, expec" in str(error)
    np.testing.assert_array_equal(
        error.rows, np.unique(np.concatenate([errors[member].rows for member in first]))
    )


def state_of(trainer, state, member):
    """The state of a single model that visits rows as this member does."""
    order_key = jax.random.fold_in(state.order_key, member)
    return trainer.init(state.params[member], key=KEY, order_key=order_key)


def test_rows_drawn_twice_are_named_once():
    many, state = ready(members=3, member_order="bootstrap")
    error = refused(many, state, WITH_NAN, macrobatch_size=24)
    assert 13 in error.rows
    assert (np.diff(error.rows) > 0).all()


# Runs that go on.


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_a_run_that_skips_says_once_how_many_steps_and_where_the_first_was(mode):
    tr = jh.trainer(loss_fn, optax.sgd(1e-3), batch_size=4, on_nonfinite="skip", mode=mode)
    state = tr.init(jnp.ones(2), key=KEY)
    with pytest.warns(UserWarning, match="skip") as warnings:
        tr.train_from_host(state, WITH_NAN, shuffle=None, macrobatch_size=8, epochs=3)
    assert [str(warning.message) for warning in warnings] == [
        'on_nonfinite="skip" left out 3 of 18 steps, for a loss or gradient that was not finite. '
        "First came the loss nan in epoch 0, macrobatch 1, batch 1 (rows 12 to 16 of data). There "
        "data[13, 1] is nan."
    ]
    tr.train_from_host(state, ROWS, macrobatch_size=8)  # It says nothing.


def test_members_that_skip_are_named():
    many, state = swept(4, [1, 3], "skip")
    with pytest.warns(UserWarning, match="left out 10 of 24 steps, members 1, 3, for") as warnings:
        _, info = many.train_from_host(state, ROWS, macrobatch_size=8, shuffle=None)
    assert len(warnings) == 1
    assert (~info.finite).sum() == 10


def test_members_that_freeze_together_are_warned_of_together():
    many, state = swept(4, [1, 3], "freeze")
    with pytest.warns(UserWarning, match=r"not finite\. All inputs of these rows are") as warnings:
        state, _ = many.train_from_host(state, ROWS, macrobatch_size=8, shuffle=None)
    assert len(warnings) == 1
    assert "members 1, 3 (rows 4 to 8 of data): a loss, gr" in str(warnings[0].message)
    np.testing.assert_array_equal(state.active, [True, False, True, False])
