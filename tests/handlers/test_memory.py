"""What a run will hold, told beforehand: it is what the run then holds, and nothing runs for it."""

import dataclasses
import functools
import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxhandler as jh
from jaxhandler.data import sizing
from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.sizing import CPU_BUDGET
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.run import Run

WIDTH = 64
ROWS = 1030
FLOAT = jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32)

needs_four_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


def mlp(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def convolved(params, x):
    for w in params:
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions)
        x = jax.nn.relu(x)
    return x.mean((1, 2))


def loss_fn(params, x):
    return (mlp(params, x) ** 2).sum(axis=1)


def params_of(width=WIDTH):
    return [jnp.full((width, width), 0.01, jnp.float32) for _ in range(3)]


def calculator(**options):
    return jh.calculator(mlp, batch_size=64, **options)


def trainer(**options):
    return jh.trainer(loss_fn, optax.adam(1e-3), batch_size=64, **options)


def validator(**options):
    return jh.validator({"loss": loss_fn}, batch_size=64, **options)


def first_of(handler):
    """What its `*_from_host` takes first."""
    if isinstance(handler, jh.Trainer):
        return handler.init(params_of(), key=jax.random.key(0))
    return params_of()


def run(handler, first, data, **options):
    if isinstance(handler, jh.Trainer):
        return handler.train_from_host(first, data, **options)
    if isinstance(handler, jh.Validator):
        return handler.validate_from_host(first, data, **options)
    return handler.calc_from_host(first, data, **options)


def unread(num_rows=ROWS, specs=FLOAT):
    """A source that must not be read."""

    def refuse(*_):
        pytest.fail("rows were looked at")

    return jh.Source(num_rows, specs, refuse, refuse, check=refuse)


def zeros(num_rows=ROWS):
    """A source of fresh memory, as a file is one."""

    def read(start, stop):
        rows = aligned_empty((stop - start, WIDTH), np.dtype(np.float32))
        rows[:] = 0
        return rows

    return jh.Source(num_rows, jax.ShapeDtypeStruct((num_rows, WIDTH), np.float32), read)


def compiles(handler):
    return handler.program.plans.stats().compiles


# Planning.


@pytest.mark.parametrize("make", [calculator, validator, trainer])
def test_planning_reads_no_row_and_leaves_nothing_on_the_device(make):
    handler = make()
    first = first_of(handler)
    gc.collect()
    before = len(jax.live_arrays())
    jh.plan_memory(handler, first, unread())
    gc.collect()
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
@pytest.mark.parametrize("make", [calculator, validator, trainer])
def test_the_run_finds_the_plans_that_were_measured(make, tail, mode):
    handler = make(mode=mode, tail=tail)
    first = first_of(handler)
    jh.plan_memory(handler, first, zeros(), macrobatch_size=256)
    assert compiles(handler) == (2 if mode == "scan" else 1)
    run(handler, first, zeros(), macrobatch_size=256)
    # The tail is a plan that says nothing about a macrobatch.
    assert compiles(handler) == (2 if mode == "scan" else 1) + (tail == "exact")


@pytest.mark.parametrize("shuffle", [None, "blocks", "rows", "global"])
def test_the_run_finds_the_plans_of_every_order(shuffle):
    visit = jh.handler(lambda c, x: (c + x.sum(), x), batch_size=64, mode="scan")
    data = np.zeros((512, 3), np.float32)
    options = {"macrobatch_size": 256, "shuffle": shuffle}
    jh.plan_memory(visit, 0.0, data, **options)
    before = compiles(visit)
    visit.handle_from_host(0.0, data, key=jax.random.key(0), **options)
    assert compiles(visit) == before


@needs_four_devices
@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("make", [calculator, trainer])
def test_the_run_finds_the_plans_for_several_devices(make, mode):
    handler = make(mode=mode)
    first = first_of(handler)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {
        "macrobatch_size": 256,
        "sharding": NamedSharding(mesh, PartitionSpec("data")),
    }
    plan = jh.plan_memory(handler, first, zeros(512), **options)
    before = compiles(handler)
    run(handler, first, zeros(512), **options)
    assert compiles(handler) == before
    assert plan.device["rows"] == 2 * plan.macrobatch["rows"] // 4


def test_types_instead_of_arrays_give_the_same_plan():
    tr = trainer(mode="scan")
    state = first_of(tr)
    described = jax.eval_shape(lambda: first_of(tr))
    options = {"macrobatch_size": 256}
    told = jh.plan_memory(tr, described, zeros(), **options)
    placed = jh.plan_memory(tr, state, zeros(), **options)
    assert placed == dataclasses.replace(told, there=placed.there)
    assert told.there < placed.there == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiles(tr) == 2
    calc = calculator()
    jh.plan_memory(calc, jax.eval_shape(params_of), zeros())
    before = compiles(calc)
    jh.plan_memory(calc, params_of(), zeros())
    assert compiles(calc) == before


def test_a_model_larger_than_the_machine_can_be_planned():
    w = jax.ShapeDtypeStruct((2**21, 2**21), np.float32)
    calc = jh.calculator(lambda w, x: x @ w[:WIDTH, :8], batch_size=64)
    plan = jh.plan_memory(calc, w, unread())
    assert plan.device["parameters"] == 2**44


# "auto".


@pytest.mark.parametrize("make", [calculator, validator, trainer])
@pytest.mark.parametrize(("mode", "most"), [("loop", 2), ("scan", 3)])
def test_auto_compiles_no_plan_that_a_run_may_not_need(make, mode, most):
    handler = make(mode=mode)
    first = first_of(handler)
    run(handler, first, zeros(), macrobatch_size="auto")
    assert compiles(handler) <= most
    before = compiles(handler)
    run(handler, first, zeros(), macrobatch_size="auto")
    assert compiles(handler) == before


def test_with_a_number_nothing_is_compiled_to_measure_it():
    calc = calculator(mode="scan")
    run(calc, first_of(calc), zeros(512), macrobatch_size=256)
    assert compiles(calc) == 1


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_a_run_takes_what_the_plan_says_auto_would(mode):
    tr = trainer(mode=mode)
    state, data = first_of(tr), zeros(100_000)
    plan = jh.plan_memory(tr, state, data)
    _, info = tr.train_from_host(state, data, macrobatch_size="auto")
    assert info.report.macrobatch_size == plan.auto_size == 12_500 // 64 * 64
    assert plan.auto_why == "an eighth of the data, so that reading and computing overlap"


def wide(width):
    """A step whose workspace is a batch of 1024 rows of `width` numbers."""
    params = [
        jax.ShapeDtypeStruct((1024, width), np.float32),
        jax.ShapeDtypeStruct((width, 1024), np.float32),
    ]
    calc = jh.calculator(
        lambda params, x: jnp.tanh(x @ params[0]) @ params[1], batch_size=1024, mode="loop"
    )
    rows = jax.ShapeDtypeStruct((10**8, 1024), np.float32)
    return jh.plan_memory(calc, params, unread(10**8, rows), macrobatch_size="auto")


def test_auto_leaves_room_for_the_workspace_of_a_step():
    narrow, broad = wide(8), wide(2**16)
    assert narrow.device["workspace"] < 2**20
    assert 2**28 <= broad.device["workspace"] < 2**29
    for plan in (narrow, broad):
        assert plan.macrobatch_size == plan.auto_size
        used = sum(plan.device[name] for name in ("rows", "outputs", "workspace"))
        assert used <= CPU_BUDGET < used + 2 * sum(plan.batch.values())
        assert plan.auto_why.startswith("the most of which two fit ")
    assert broad.macrobatch_size < narrow.macrobatch_size / 1.9


def test_auto_takes_one_batch_where_the_workspace_leaves_no_room_on_cpu():
    plan = wide(2**18)
    assert plan.macrobatch_size == 1024
    assert plan.auto_why == "one batch, though two do not fit 0 B"


def test_a_batch_that_does_not_fit_an_accelerator_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 100_000)
    calc, refused = calculator(), unread()
    unchecked = jh.Source(refused.num_rows, refused.specs, refused.read)
    expected = "48.0 KiB for the workspace of a step, 64.0 KiB for two batches of 64 rows"
    with pytest.raises(ValueError, match=f"saw 97.7 KiB free on .*, expected {expected}"):
        calc.calc_from_host(params_of(), unchecked, macrobatch_size="auto")


def test_a_plan_says_whether_an_accelerator_has_room():
    plan = jh.plan_memory(calculator(), params_of(), zeros())
    assert plan.free is None
    assert plan.fits
    assert "more than is free" not in str(plan)
    to_come = sum(plan.device.values()) - plan.there
    assert dataclasses.replace(plan, free=to_come).fits
    tight = dataclasses.replace(plan, free=to_come - 1)
    assert not tight.fits
    assert "more than is free: lower macrobatch_size or batch_size" in str(tight)


# What a run really holds.


@pytest.fixture
def little_garbage():
    """What other tests left is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


KINDS = {
    "calculator": calculator,
    "validator": validator,
    "trainer": trainer,
    "trainer that does not donate": functools.partial(trainer, donate=False),
}


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("little_garbage")
def test_a_run_holds_the_parameters_state_and_outputs_that_were_planned(kind, mode):
    handler = KINDS[kind](mode=mode)
    first = first_of(handler)
    others = live_bytes() - sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    seen = []
    plan = jh.plan_memory(handler, first, zeros(), macrobatch_size=256)
    run(
        handler,
        first,
        zeros(),
        macrobatch_size=256,
        on_macrobatch_finish=lambda progress: seen.append(live_bytes() - others),
    )
    planned = sum(plan.device[name] for name in ("parameters", "state", "outputs"))
    if not handler.program.donate and kind.startswith("trainer"):
        # Between steps, the state that a step took while it gave another is gone already.
        planned -= sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    # A few bytes are flags of the run's own.
    assert abs(max(seen) - planned) <= 16


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_a_run_holds_the_macrobatches_that_were_planned(mode, read_ahead):
    # On CPU the device holds the host's own buffers: their lives are the rows' lives there.
    alive: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
    most = 0
    source = zeros(2048 * 16)

    def read(start, stop):
        nonlocal most
        rows = source.read(start, stop)
        alive[start] = rows.base
        # What XLA is about to let go of, on a thread of its own, the run does not hold.
        give_up = time.monotonic() + 5
        while len(alive) > 3 + read_ahead and time.monotonic() < give_up:
            gc.collect()
            time.sleep(0.001)
        most = max(most, len(alive))
        return rows

    # Where a step takes longer than XLA takes to let go of rows.
    heavy = lambda w, x: jax.lax.fori_loop(0, 200, lambda _, y: y @ w[0], x)  # noqa: E731
    calc = jh.calculator(heavy, batch_size=64, mode=mode)
    watched = jh.Source(source.num_rows, source.specs, read)
    options = {"macrobatch_size": 2048, "read_ahead": read_ahead}
    plan = jh.plan_memory(calc, params_of(), source, **options)
    run(calc, params_of(), watched, **options)
    assert plan.device["rows"] == 2 * plan.macrobatch["rows"]
    assert plan.host["rows"] == (1 + read_ahead) * plan.macrobatch["rows"]
    assert most * plan.macrobatch["rows"] <= plan.device["rows"] + plan.host["rows"]


def attention(params, x):
    for query, key, value in params:
        scores = jnp.einsum("btd,bsd->bts", x @ query, x @ key)
        x = x + jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), x @ value)
    return x.mean(axis=1)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


MODELS = {
    "linear": (mlp, [floats(784, 10)], (784,)),
    "small mlp": (mlp, [floats(256, 256)] * 3, (256,)),
    "large mlp": (mlp, [floats(1024, 1024)] * 4, (1024,)),
    "convolutions": (convolved, [floats(3, 3, 1, 8), floats(3, 3, 8, 8)], (16, 16, 1)),
    "attention": (attention, [[floats(32, 32)] * 3] * 2, (64, 32)),
}
COUNTERS = 1024  # What a scan counts with.
OPTIMIZERS = {"calculator": None, "sgd": optax.sgd(0.1), "adam": optax.adam(1e-3)}


def gauge_of(model, optimizer, donate):
    apply_fn, params, row = MODELS[model]
    if optimizer is None:
        handler = jh.calculator(apply_fn, batch_size=64, mode="scan")
        consts, carry = params, ()
    else:
        handler = jh.trainer(
            lambda params, x: (apply_fn(params, x) ** 2).sum(axis=1),
            optimizer,
            batch_size=64,
            mode="scan",
            donate=donate,
        )
        consts, carry = (), jax.eval_shape(lambda p: handler.init(p, key=jax.random.key(0)), params)
    options = Options(shuffle="rows", key=jax.random.key(0), dry=True)
    source = unread(ROWS, floats(ROWS, *row))
    return Run(handler.program, handler.step, consts, carry, source, options).gauge()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_what_a_scan_needs_is_told_from_the_plan_of_a_batch(model, optimizer):
    gauge = gauge_of(model, OPTIMIZERS[optimizer], donate=True)
    told, measured = gauge.beforehand(), gauge.block(512)
    # Row numbers too, which the plan of a batch only takes where somebody looks at them.
    assert 0 <= measured.rows - 8 * told.rows <= 4 * 512 + 4
    assert measured.outputs == 8 * told.outputs
    assert measured.workspace <= told.workspace + told.spare + COUNTERS
    assert told.workspace <= 1.6 * measured.workspace


@pytest.mark.parametrize("model", MODELS)
def test_so_it_is_where_the_state_is_not_donated(model):
    gauge = gauge_of(model, optax.adam(1e-3), donate=False)
    told, measured = gauge.beforehand(), gauge.block(512)
    assert measured.workspace <= told.workspace + told.spare + COUNTERS


def test_the_plan_of_a_loop_tells_all():
    calc = calculator(mode="loop")
    options = Options(dry=True)
    run = Run(calc.program, calc.step, params_of(), (), unread(), options)
    assert run.gauge().beforehand().spare == 0


# Which rung holds what.


def test_rows_of_a_file_lie_on_disk_and_rows_of_an_array_in_host_memory(tmp_path):
    x = np.zeros((ROWS, WIDTH), np.float32)
    y = np.zeros(ROWS, np.int64)
    np.save(tmp_path / "x.npy", x)
    calc = jh.calculator(lambda params, data: data["x"] @ params[0], batch_size=64)
    plan = jh.plan_memory(calc, params_of(), {"x": tmp_path / "x.npy", "y": y})
    assert plan.disk["rows"] == x.nbytes
    # One macrobatch is on its way; int64 becomes int32.
    assert plan.host["rows"] == ROWS * 4 + ROWS * (4 * WIDTH + 4)
    lent = jh.plan_memory(calculator(), params_of(), x)
    assert lent.host["rows"] == x.nbytes
    assert lent.disk["rows"] == 0


def test_outputs_go_to_host_memory_or_to_a_path(tmp_path):
    calc = calculator()
    outputs = ROWS * WIDTH * 4
    kept = jh.plan_memory(calc, params_of(), zeros())
    assert (kept.host["outputs"], kept.disk["outputs"], kept.disk_free) == (outputs, 0, None)
    written = jh.plan_memory(calc, params_of(), zeros(), out=tmp_path / "y.npy")
    assert (written.host["outputs"], written.disk["outputs"]) == (0, outputs)
    assert written.disk_free is not None
    assert written.disk_free > 0
    assert not list(tmp_path.iterdir())


def test_rows_permuted_on_the_host_are_there_twice():
    tr = trainer(mode="loop")
    shuffled, in_order = (
        jh.plan_memory(tr, first_of(tr), zeros(512), macrobatch_size=256, shuffle=shuffle)
        for shuffle in ("auto", None)
    )
    assert shuffled.host["rows"] == in_order.host["rows"] + in_order.macrobatch["rows"]


def test_data_of_one_macrobatch_is_counted_once():
    plan = jh.plan_memory(calculator(), params_of(), zeros())
    assert plan.num_macrobatches == 1
    assert plan.device["rows"] == plan.macrobatch["rows"] + (1088 - ROWS) * WIDTH * 4
    assert plan.macrobatch["rows"] == ROWS * WIDTH * 4


def test_a_handler_of_ones_own_has_consts_and_a_carry():
    visit = jh.handler(lambda w, c, x: (c + 1, x @ w), batch_size=64)
    plan = jh.plan_memory(visit, jnp.int32(0), zeros(), consts=jnp.eye(WIDTH))
    assert (plan.device["parameters"], plan.device["state"]) == (WIDTH * WIDTH * 4, 2 * 4)


def test_what_is_discarded_takes_no_room():
    visit = jh.handler(lambda c, x: (c, x), batch_size=64, outputs=None)
    plan = jh.plan_memory(visit, (), zeros())
    assert plan.batch["outputs"] == plan.host["outputs"] == 0
    # A flag says when a batch is done.
    assert plan.device["outputs"] <= ROWS


def test_data_without_rows_needs_no_room_for_them():
    plan = jh.plan_memory(calculator(), params_of(), np.zeros((0, WIDTH), np.float32))
    assert plan.device["rows"] == plan.batch["rows"] == 0
    assert plan.num_macrobatches == 0


def test_printed_it_is_a_table():
    calc = jh.calculator(lambda w, x: x @ w, batch_size=500, mode="loop")
    specs = jax.ShapeDtypeStruct((30_000, 64), np.float32)
    plan = jh.plan_memory(calc, jnp.ones((64, 4)), unread(30_000, specs), macrobatch_size=7_000)
    lines = """
30,000 rows in 5 macrobatches of at most 7,000, each a loop over 14 batches of 500, on cpu:0
                    batch  macrobatch        disk        host      device
rows            125.0 KiB     1.7 MiB     7.3 MiB     3.4 MiB     3.4 MiB
outputs           7.8 KiB   109.4 KiB         0 B   468.8 KiB   218.8 KiB
parameters                                                        1.0 KiB
state                                                                 0 B
workspace                                                             0 B
in all          132.8 KiB     1.8 MiB     7.3 MiB     3.9 MiB     3.6 MiB
already there                                                     1.0 KiB
free
macrobatch_size="auto" would take 10,000 rows: as many as by default.
"""
    assert str(plan) == repr(plan)
    device = str(jax.devices()[0])
    assert str(plan).splitlines() == lines.replace("cpu:0", device).strip().splitlines()


# What cannot be planned.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"handler": mlp}, TypeError, "handler: saw a function, expected what jh.calculator"),
        ({"handler": trainer()}, TypeError, "params: saw a list, expected a TrainState"),
        ({"consts": (1,)}, ValueError, "consts: saw some for a Calculator, expected none"),
        ({"shuffle": "some"}, ValueError, "shuffle: saw 'some', expected one of 'auto', None"),
        ({"out": 3}, TypeError, "out: saw an int"),
        ({"macrobatch_size": 0}, ValueError, "macrobatch_size: saw 0"),
        ({"read_ahead": -1}, ValueError, "read_ahead: saw -1"),
        ({"sharding": "all"}, TypeError, "sharding: saw a str"),
        ({"data": [1, 2]}, TypeError, "data"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_cannot_be_planned_is_refused_before_anything_compiles(arguments, error, match):
    calc = calculator()
    given = {"handler": calc, "params": params_of(), "data": zeros(), **arguments}
    with pytest.raises(error, match=match):
        jh.plan_memory(**given)
    assert compiles(calc) == 0


# On a GPU, which counts for itself.


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("make", [calculator, trainer])
def test_a_gpu_holds_no_more_than_was_planned(make, mode):
    handler = make(mode=mode)
    first = first_of(handler)
    device = jax.devices("gpu")[0]
    # Large enough to be the peak of the process.
    data, options = zeros(2**21), {"macrobatch_size": 2**19}
    plan = jh.plan_memory(handler, first, data, **options)
    assert plan.free == device.memory_stats()["bytes_limit"] - device.memory_stats()["bytes_in_use"]
    before = device.memory_stats()
    run(handler, first, data, **options)
    peak = device.memory_stats()["peak_bytes_in_use"]
    to_come = sum(plan.device.values()) - plan.there
    assert peak <= max(before["peak_bytes_in_use"], before["bytes_in_use"] + 1.05 * to_come)
    assert peak >= before["bytes_in_use"] + to_come / 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_on_a_gpu_auto_fits_beside_what_lies_there(mode):
    device = jax.devices("gpu")[0]
    taken = jnp.zeros((free_now(device) - 2**31) // 4)
    calc = calculator(mode=mode)
    rows = free_now(device) // (WIDTH * 4) * 4
    plan = jh.plan_memory(calc, params_of(), zeros(rows), macrobatch_size="auto")
    assert plan.auto_why.startswith("the most of which two fit")
    assert plan.fits
    sizes = set()
    for _ in calc.iter_from_host(
        params_of(),
        zeros(rows),
        macrobatch_size="auto",
        on_macrobatch_finish=lambda progress: sizes.add(progress.report.macrobatch_size),
    ):
        pass
    assert sizes == {plan.auto_size}
    assert taken.shape


def free_now(device):
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"]
