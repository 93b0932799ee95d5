"""What holds for every handler: rows, orders, modes, plans, errors before work."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxhandler as jh
from jaxhandler.data.buffers import aligned_empty

WEIGHTS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
SIZES = (1, 7, 23, 127, 128, 129, 10_001)


def rows_of(num_rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(num_rows)
    x = rng.normal(size=(num_rows, 5)).astype(np.float32)
    return {"x": x, "n": np.arange(num_rows, dtype=np.int32)}


def apply_fn(params, inputs):
    return {"y": jnp.tanh(inputs["x"] @ params), "n": inputs["n"]}


def in_one_shot(data):
    return {"y": np.tanh(data["x"] @ WEIGHTS), "n": data["n"]}


def assert_close(outputs, expected):
    np.testing.assert_array_equal(outputs["n"], expected["n"])
    np.testing.assert_allclose(outputs["y"], expected["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["exact", "pad"])
@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("batch_size", [1, 3, 128])
def test_outputs_equal_one_shot_outputs(batch_size, mode, tail):
    calc = jh.calculator(apply_fn, batch_size=batch_size, mode=mode, tail=tail)
    for num_rows in SIZES:
        data = rows_of(num_rows)
        expected = in_one_shot(data)
        assert_close(calc.calc(WEIGHTS, data), expected)
        for macrobatch_size in (1, 10, 40, 10_000):
            if batch_size == 1 and tail == "pad" and num_rows > 129:
                continue  # As many macrobatches as with "exact", and no tail to pad.
            outputs = calc.calc_from_host(WEIGHTS, data, macrobatch_size=macrobatch_size)
            assert_close(outputs, expected)


def test_rows_on_the_device_are_not_shuffled_without_a_key():
    visit = jh.handler(lambda carry, x: (carry, x))
    with pytest.raises(ValueError, match="key: saw None, expected a key for shuffle='rows'"):
        visit.handle((), np.zeros(3, np.float32), shuffle="rows")


@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    macrobatch_size=st.integers(1, 70),
    shuffle=st.sampled_from([None, "blocks", "rows", "global"]),
    epoch_key=st.integers(0, 3),
)
def test_each_row_is_visited_once_whatever_the_order(
    num_rows, batch_size, macrobatch_size, shuffle, epoch_key
):
    seen = {}
    for mode in ("scan", "loop"):
        visit = jh.handler(lambda carry, n: (carry + n.sum(), n), batch_size=batch_size, mode=mode)
        total, rows = visit.handle_from_host(
            np.int32(0),
            np.arange(num_rows, dtype=np.int32),
            macrobatch_size=macrobatch_size,
            shuffle=shuffle,
            key=jax.random.key(epoch_key),
        )
        assert int(total) == num_rows * (num_rows - 1) // 2
        assert sorted(rows) == list(range(num_rows))
        seen[mode] = rows.tolist()
    assert seen["scan"] == seen["loop"]


@pytest.mark.parametrize("shuffle", ["blocks", "rows", "global"])
@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_the_order_does_not_depend_on_reading_ahead(shuffle, read_ahead):
    visit = jh.handler(lambda carry, n: (carry, n), batch_size=4)
    data, key = np.arange(50, dtype=np.int32), jax.random.key(3)
    run = lambda ahead: visit.handle_from_host(  # noqa: E731
        (), data, macrobatch_size=12, shuffle=shuffle, key=key, read_ahead=ahead
    )[1]
    np.testing.assert_array_equal(run(read_ahead), run(1))


def test_rows_on_the_device_are_shuffled_as_in_one_macrobatch():
    visit = jh.handler(lambda carry, n: (carry, n), batch_size=4)
    data, key = jnp.arange(50), jax.random.key(3)
    _, resident = visit.handle((), data, shuffle="rows", key=key)
    _, streamed = visit.handle_from_host((), data, shuffle="rows", key=key)
    np.testing.assert_array_equal(resident, streamed)


def test_batches_know_their_rows_and_their_place():
    def step(consts, carry, batch):
        return carry, (batch.data, batch.index, jnp.broadcast_to(batch.position, batch.mask.shape))

    for mode in ("scan", "loop"):
        base = jh.handler(lambda carry, data: (carry, data), batch_size=4, mode=mode)
        watching = base.program.build(base.program._replace(make_step=lambda fn: step))
        rows, key = np.arange(22, dtype=np.int32), jax.random.key(0)
        _, (data, index, position) = watching.handle_from_host(
            (), rows, macrobatch_size=8, shuffle="rows", key=key
        )
        np.testing.assert_array_equal(data, index)
        assert sorted(position.tolist()) == sorted([0] * 12 + [1] * 10)


def test_has_index_passes_the_position_in_the_macrobatch():
    step = lambda carry, x, index: (carry + index, x)  # noqa: E731
    visit = jh.handler(step, batch_size=2, has_index=True, outputs=None)
    total, _ = visit.handle_from_host(np.int32(0), np.zeros(12, np.float32), macrobatch_size=6)
    assert int(total) == 2 * (0 + 1 + 2)


def test_a_scan_compiles_three_plans_at_most_and_a_loop_two():
    for mode, most in (("scan", 3), ("loop", 2)):
        calc = jh.calculator(lambda w, x: x * w, batch_size=16, mode=mode)
        calc.calc_from_host(np.float32(2), np.ones(1000 * 16 + 5, np.float32), macrobatch_size=160)
        assert calc.program.plans.stats().compiles <= most
        before = calc.program.plans.stats().compiles
        for length in (3 * 160 + 5, 160 + 2 * 16 + 5, 16 + 5):
            calc.calc_from_host(np.float32(2), np.ones(length, np.float32), macrobatch_size=160)
            calc.calc(np.float32(2), jnp.ones(length, jnp.float32))
        assert calc.program.plans.stats().compiles - before <= int(mode == "scan")
        before = calc.program.plans.stats().compiles
        calc.calc_from_host(np.float32(2), np.ones(160 + 7, np.float32), macrobatch_size=160)
        assert calc.program.plans.stats().compiles - before == 1


@pytest.mark.parametrize("tail", ["exact", "pad"])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17, 24, 39, 40, 41, 79, 80])
def test_few_rows_go_through_the_plan_of_a_macrobatch(rows, tail):
    data = rows_of(rows)

    def step(carry, data):
        return carry + data["x"].sum(axis=0), {"n": data["n"][0], "x": data["x"].sum()}

    results = []
    for mode in ("scan", "loop"):
        many = jh.handler(step, batch_size=8, mode=mode, tail=tail, outputs="steps")
        run = many.handle_from_host(np.zeros(5, np.float32), data, macrobatch_size=40)
        results.append(run)
        assert many.program.plans.stats().compiles <= 2
    (total, steps), (other_total, other_steps) = results
    np.testing.assert_allclose(total, other_total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(steps["n"], other_steps["n"])
    np.testing.assert_allclose(steps["x"], other_steps["x"], rtol=1e-5, atol=1e-5)


def test_no_number_of_whole_batches_is_compiled():
    count = jh.handler(lambda n, x: (n + 1, x.sum()), batch_size=8, mode="scan", outputs="steps")
    for batches in range(2, 12):
        number, sums = count.handle_from_host(
            np.int32(0), np.ones(8 * batches, np.float32), macrobatch_size=40
        )
        assert int(number) == batches
        np.testing.assert_array_equal(sums, np.full(batches, 8))
    # One batch that is left over from whole macrobatches comes by itself.
    assert count.program.plans.stats().compiles == 2


def test_a_second_run_neither_compiles_nor_traces():
    traces = collections.Counter()

    def double(params, x):
        traces["apply_fn"] += 1
        return 2 * x

    for mode in ("scan", "loop"):
        calc = jh.calculator(double, batch_size=16, mode=mode)
        data = np.ones(100, np.float32)
        calc.calc_from_host((), data, macrobatch_size=32)
        compiles, traced = calc.program.plans.stats().compiles, traces["apply_fn"]
        assert traced <= 2 * (compiles + 1)
        calc.calc_from_host((), data[:68], macrobatch_size=32)
        assert calc.program.plans.stats().compiles == compiles
        assert traces["apply_fn"] == traced
        traces.clear()


def test_padding_needs_no_plan_for_the_tail():
    calc = jh.calculator(lambda w, x: x * w, batch_size=16, mode="loop", tail="pad")
    for length in (16, 17, 31, 5, 100):
        outputs = calc.calc_from_host(np.float32(2), np.ones(length, np.float32))
        assert outputs.shape == (length,)
    assert calc.program.plans.stats().compiles == 1


def test_drop_leaves_the_short_batch_out():
    calc = jh.calculator(lambda w, x: x * w, batch_size=16, tail="drop")
    assert calc.calc_from_host(np.float32(2), np.ones(100, np.float32)).shape == (96,)


def test_drop_refuses_data_without_a_whole_batch():
    calc = jh.calculator(lambda w, x: x, batch_size=16, tail="drop")
    with pytest.raises(ValueError, match=r"data: saw 7 rows with tail=\"drop\".*batch of 16"):
        calc.calc_from_host((), np.ones(7, np.float32))


def test_plans_may_be_shared_between_handlers():
    plans = jh.PlanCache()
    add = jh.calculator(lambda w, x: x + w, plans=plans)
    multiply = jh.calculator(lambda w, x: x * w, plans=plans)
    data = np.full(10, 3, np.float32)
    assert add.calc_from_host(np.float32(2), data)[0] == 5
    assert multiply.calc_from_host(np.float32(2), data)[0] == 6
    assert plans.stats().compiles == 2


def test_auto_loops_on_cpu_where_the_step_convolves():
    def convolve(kernel, x):
        @jax.jit
        def inner(x):
            return jax.lax.conv(x, kernel, (1, 1), "SAME")

        return jax.checkpoint(inner)(x)

    reports = []
    watch = lambda progress: reports.append(progress.report.mode)  # noqa: E731
    images = np.ones((8, 1, 6, 6), np.float32)
    kernel = np.ones((2, 1, 3, 3), np.float32)
    convolving = jh.calculator(convolve, batch_size=4)
    convolving.calc_from_host(kernel, images, on_macrobatch_finish=watch)
    plain = jh.handler(lambda carry, x: (carry, x), batch_size=4)
    plain.handle_from_host(jnp.zeros(()), images, on_macrobatch_finish=watch)
    on_cpu = jax.default_backend() == "cpu"
    assert reports == ["loop" if on_cpu else "scan", "scan"]


def test_auto_loops_on_cpu_over_rows_lent_from_memory_and_scans_those_of_files(tmp_path):
    rows = np.ones((8, 3), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    reports = []
    watch = lambda progress: reports.append(progress.report.mode)  # noqa: E731
    calc = jh.calculator(lambda w, x: x, batch_size=4)
    calc.calc_from_host((), rows, on_macrobatch_finish=watch)
    calc.calc_from_host((), tmp_path / "rows.npy", on_macrobatch_finish=watch)
    on_cpu = jax.default_backend() == "cpu"
    assert reports == ["loop" if on_cpu else "scan", "scan"]


def test_constants_are_not_copied_into_the_carry():
    step = lambda consts, carry, x: (carry + x.sum(), consts["w"] * x)  # noqa: E731
    scale = jh.handler(step, batch_size=4)
    consts = {"w": jnp.full((), 3.0)}
    total, outputs = scale.handle_from_host(0.0, np.ones(10, np.float32), consts=consts)
    assert float(total) == 10
    np.testing.assert_array_equal(outputs, np.full(10, 3, np.float32))
    assert float(consts["w"]) == 3


def test_the_carry_of_the_caller_survives_donation():
    carry = {"total": jnp.zeros(3), "same": jnp.ones(3)}
    carry["again"] = carry["same"]
    step = lambda carry, x: (jax.tree.map(lambda leaf: leaf + x.sum(), carry), x)  # noqa: E731
    after, _ = jh.handler(step, batch_size=4).handle(carry, jnp.ones(10))
    np.testing.assert_array_equal(carry["total"], np.zeros(3))
    np.testing.assert_array_equal(carry["again"], np.ones(3))
    np.testing.assert_array_equal(after["again"], np.full(3, 11.0))


def test_steps_are_stacked():
    count = jh.handler(lambda n, x: (n + 1, x.sum()), batch_size=4, outputs="steps")
    n, sums = count.handle_from_host(np.int32(0), np.ones(10, np.float32), macrobatch_size=4)
    assert int(n) == 3
    np.testing.assert_array_equal(sums, [4, 4, 2])


def test_empty_data_gives_empty_outputs_of_the_right_shape():
    calc = jh.calculator(apply_fn)
    for outputs in (calc.calc_from_host(WEIGHTS, rows_of(0)), calc.calc(WEIGHTS, rows_of(0))):
        assert outputs["y"].shape == (0, 3)
        assert outputs["y"].dtype == np.float32
    assert calc.program.plans.stats().compiles == 0


def test_without_rows_the_carry_given_back_is_not_the_callers():
    count = jh.handler(lambda n, x: (n + 1, x.sum()), batch_size=4, outputs="steps")
    # JAX borrows aligned memory; and copying this much outlasts a run of nothing.
    carry = aligned_empty((2**25,), np.dtype(np.float32))
    no_rows = np.ones((0, 2), np.float32)
    for run in (count.handle, count.handle_from_host):
        carry[:] = 0
        n, _ = run(carry, no_rows)
        carry[:] = 7
        assert not np.any(n)


def test_wide_integers_on_disk_are_refused_before_the_function_is_called(tmp_path):
    def never(params, batch):
        raise AssertionError("called")

    wide = np.zeros(30, np.int64)
    wide[20] = 2**40 + 5
    np.save(tmp_path / "wide.npy", wide)
    calc = jh.calculator(never, batch_size=4)
    for data in (tmp_path / "wide.npy", np.load(tmp_path / "wide.npy", mmap_mode="r")):
        with pytest.raises(OverflowError, match="1099511627781 in row 20"):
            calc.calc_from_host((), data, macrobatch_size=8)


def test_an_output_without_a_row_per_row_is_refused_before_anything_compiles():
    calc = jh.calculator(lambda w, x: {"mean": x.mean(axis=0)}, batch_size=4)
    expected = r"outputs\['mean'\]: saw float32\[2\] for a batch of 4 rows, expected 4 along axis 0"
    with pytest.raises(ValueError, match=expected):
        calc.calc_from_host((), np.zeros((10, 2), np.float32))
    assert calc.program.plans.stats().compiles == 0


def test_a_carry_of_another_type_is_refused_with_its_path():
    with pytest.raises(ValueError, match=r"carry\['n'\]: saw float32\[3\] returned.*int32\[3\]"):
        jh.handler(lambda carry, x: ({"n": jnp.zeros(3)}, x)).handle_from_host(
            {"n": np.zeros(3, np.int32)}, np.zeros(4, np.float32)
        )
    with pytest.raises(ValueError, match="carry: saw PyTreeDef"):
        jh.handler(lambda carry, x: ((), x)).handle_from_host({"n": 0}, np.zeros(4, np.float32))


def test_a_step_that_gives_no_pair_is_refused():
    with pytest.raises(TypeError, match=r"step_fn: saw a .*, expected \(carry, out\)"):
        jh.handler(lambda carry, x: x).handle_from_host((), np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("batch_size", 0, ValueError),
        ("batch_size", True, TypeError),
        ("batch_size", 2.5, TypeError),
        ("tail", "keep", ValueError),
        ("mode", "fast", ValueError),
        ("on_batch_finish", 3, TypeError),
        ("plans", {}, TypeError),
    ],
)
def test_builders_name_the_argument_that_is_wrong(argument, value, error):
    for build in (
        lambda **given: jh.calculator(apply_fn, **given),
        lambda **given: jh.validator({"m": apply_fn}, **given),
        lambda **given: jh.handler(apply_fn, **given),
    ):
        with pytest.raises(error, match=f"{argument}: saw"):
            build(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("macrobatch_size", 0, ValueError),
        ("macrobatch_size", "big", ValueError),
        ("macrobatch_size", 1.5, TypeError),
        ("read_ahead", -1, ValueError),
        ("on_macrobatch_start", 1, TypeError),
        ("on_macrobatch_finish", "x", TypeError),
        ("sharding", "data", TypeError),
        ("shuffle", "all", ValueError),
        ("shuffle", "rows", ValueError),
        ("out", 3, TypeError),
    ],
)
def test_runs_name_the_argument_that_is_wrong(argument, value, error):
    visit = jh.handler(lambda carry, x: (carry, x))
    name = "key" if (argument, value) == ("shuffle", "rows") else argument
    with pytest.raises(error, match=f"{name}: saw"):
        visit.handle_from_host((), np.zeros(4, np.float32), **{argument: value})
    assert visit.program.plans.stats().compiles == 0


def test_ten_million_rows_of_a_tenth_have_a_mean_of_a_tenth():
    class Tenths:
        shape, dtype = (10_000_000,), np.dtype(np.float32)

        def __getitem__(self, rows):
            return np.full(len(range(*rows.indices(self.shape[0]))), 0.1, np.float32)

    val = jh.validator({"loss": lambda params, x: x, "mean": lambda params, x: x.mean()})
    metrics = val.validate_from_host((), Tenths(), macrobatch_size=500_000)
    assert metrics == pytest.approx({"loss": 0.1, "mean": 0.1}, abs=1e-6)
