"""What expressions need: outputs, the columns these depend on, those they are compared with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.assembly.needs import columns_of

COLUMNS = {name: np.ones((6, 3), np.float32) for name in "abxyz"}
Y = jh.losses.mean(jh.pred("y"))


def needs(model, *expressions, specs=COLUMNS, params=1.0):
    return jh.determine_out_in_targ(*(expressions or (Y,)), model=model, params=params, specs=specs)


def through(fn):
    """A model whose outputs `y` of `x` and `u` of `z` come out of one function."""
    return lambda params, inputs: dict(zip("yu", fn(inputs["x"], inputs["z"]), strict=True))


def scanned(x, z):
    def step(carry, _):
        return (carry[0] * 2, carry[1] + z), None

    return jax.lax.scan(step, (x, z), None, length=3)[0]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, z: (2 * x, 3 * z),
        jax.jit(lambda x, z: (2 * x, 3 * z)),
        jax.jit(jax.jit(jax.vmap(lambda x, z: (2 * x, 3 * z)))),
        jax.checkpoint(lambda x, z: (jnp.sin(x), jnp.sin(z))),
        scanned,
        lambda x, z: jax.lax.map(lambda row: (2 * row[0], 3 * row[1]), (x, z)),
        lambda x, z: jax.lax.cond(jnp.arange(2)[0] > 0, lambda: (x, z), lambda: (2 * x, 3 * z)),
        lambda x, z: (jax.nn.relu(x), jax.nn.relu(z)),
        lambda x, z: (x + jnp.zeros_like(z), z),
    ],
    ids=["plain", "jit", "jit in jit", "checkpoint", "scan", "map", "cond", "custom_jvp", "shapes"],
)
def test_only_columns_that_an_output_depends_on_are_needed(fn):
    assert needs(through(fn)) == (["x"], ["y"], [])
    assert needs(through(fn), jh.losses.mean(jh.pred("u"))) == (["z"], ["u"], [])
    assert needs(through(fn), Y + jh.losses.mean(jh.pred("u"))) == (["x", "z"], ["u", "y"], [])


def test_targets_are_what_is_compared_with_masks_and_weights_too():
    loss = jh.losses.weighted_mse(jh.pred("y"), jh.true("y"), jh.true("b"), mask=jh.true("a"))
    assert needs(through(lambda x, z: (x, z)), loss) == (["x"], ["y"], ["a", "b", "y"])


def test_what_a_gradient_does_not_depend_on_is_not_needed():
    model = through(lambda x, z: ((x**2).sum(axis=1) + z.sum(axis=1), z))
    part = jh.gradient("y", wrt="x")
    assert needs(model, jh.losses.mean(part)) == (["x"], [str(part)], [])


def test_where_no_value_matters_the_smallest_column_counts_rows():
    specs = {"wide": np.ones((6, 100)), "x": np.ones((6, 3), np.float32), "bit": np.ones(6, bool)}
    linear = jh.losses.mean(jh.gradient("y", wrt="x"))
    assert needs(lambda params, i: {"y": i["x"].sum(axis=1)}, linear, specs=specs)[0] == ["bit"]


def test_columns_and_derived_outputs_are_seen_through():
    model = jh.model(
        lambda params, inputs: {"y": inputs["R"] ** 2, "u": inputs["z"]},
        columns={"R": "x"},
        derived={"f": -jh.gradient("y", wrt="R"), "k": jh.pred("u") * 2},
    )
    assert needs(model, jh.losses.mean(jh.pred("f"))) == (["x"], ["f"], [])
    assert needs(model, jh.losses.mean(jh.pred("k"))) == (["z"], ["k"], [])


def test_a_model_may_ask_whether_a_column_is_there():
    model = lambda params, i: {"y": i["x"] * i.get("charge", 1.0)}  # noqa: E731
    assert needs(model) == (["x"], ["y"], [])
    assert needs(model, specs={**COLUMNS, "charge": COLUMNS["x"]})[0] == ["charge", "x"]


def test_parameters_may_be_shapes_alone():
    spec = jax.ShapeDtypeStruct((3, 2), np.float32)
    model = lambda params, inputs: {"y": inputs["x"] @ params["w"]}  # noqa: E731
    assert needs(model, params={"w": spec, "b": None})[0] == ["x"]


def test_what_needs_no_output_needs_no_model():
    def model(params, inputs):
        raise AssertionError

    assert needs(model, jh.losses.std(jh.true("x")) + jh.losses.l2reg()) == ([], [], ["x"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda params, i: {"y": i["x"].sum()}, r"output 'y': saw \[\] for a batch of 6 rows, exp"),
        (lambda params, i: {"y": i["x"].T}, r"output 'y': saw \[3, 6\] for a batch of 6 rows"),
        (lambda params, i: {"y": {"z": i["x"]}}, "output 'y': saw a dict, expected rows first"),
        (lambda params, i: {"y": None}, "output 'y': saw a NoneType, expected rows first"),
        (lambda params, i: {"q": i["x"], "p": i["x"]}, "saw 'y', expected an output.*gives p, q"),
        (lambda params, i: {"y": i["coords"]}, "saw a look for 'coords'.*there are a, b, x, y, z"),
        (jh.model(through(lambda x, z: (x, z)), columns={"x": "coords"}), "no column 'coords' for"),
    ],
)
def test_what_a_model_lacks_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        needs(model)


def test_outputs_that_nobody_asks_for_may_be_anything():
    model = lambda params, i: {"y": i["x"], "sum": i["x"].sum(), "text": "y", "none": None}  # noqa: E731
    assert needs(model) == (["x"], ["y"], [])


def test_missing_targets_are_named_all_at_once():
    loss = jh.losses.mse(jh.pred("y"), jh.true("E")) + jh.losses.mse(jh.pred("y"), jh.true("F"))
    with pytest.raises(
        ValueError, match="specs: saw no column 'E' and 'F', expected one of a, b, x"
    ):
        needs(through(lambda x, z: (x, z)), loss)


def test_columns_come_from_anything_that_tells_shapes(tmp_path):
    x, y = COLUMNS["x"], np.arange(6)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    for specs in (
        {"x": x, "y": y},
        {"x": jnp.asarray(x), "y": jax.ShapeDtypeStruct((6,), np.int64)},
        jh.open_source({"x": x, "y": y}),
        tmp_path,
        str(tmp_path),
        jh.database({"x": x, "y": y}, splits={"train": [0]}),
    ):
        columns = columns_of(specs)
        assert sorted(columns.inputs) == sorted(columns.targets) == ["x", "y"]
        assert columns.specs["x"].shape == (6, 3)
        assert columns.specs["y"].dtype == np.int32


def test_columns_of_text_do_no_harm():
    specs = {**COLUMNS, "smiles": np.array(["C"] * 6), "when": np.zeros(6, "datetime64[s]")}
    assert needs(through(lambda x, z: (x, z)), specs={**specs, "version": np.int32(3)})[0] == ["x"]


def test_a_database_says_what_may_be_input_and_target():
    database = jh.database(COLUMNS, inputs=["x", "z"], targets=["y"], splits={"train": [0]})
    model = through(lambda x, z: (x, z))
    mse = lambda name: jh.losses.mse(jh.pred("y"), jh.true(name))  # noqa: E731
    assert needs(model, mse("y"), specs=database) == (["x"], ["y"], ["y"])
    with pytest.raises(ValueError, match="source: saw no column 'x', expected one of y"):
        needs(model, mse("x"), specs=database)
    with pytest.raises(ValueError, match="saw a look for 'y'.*there are x, z"):
        needs(lambda params, inputs: {"y": inputs["y"]}, specs=database)


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (COLUMNS["x"], TypeError, "specs: saw .*, expected columns by name"),
        (
            {"x": [1.0, 2.0]},
            TypeError,
            r"specs\['x'\]: saw a list, expected something with a shape",
        ),
        ({}, ValueError, "specs: saw no column of inputs"),
    ],
)
def test_specs_are_columns_by_name(specs, error, message):
    with pytest.raises(error, match=message):
        needs(through(lambda x, z: (x, z)), specs=specs)


def test_a_column_that_only_counts_the_structures_of_packs_is_an_input() -> None:
    """Else packs of another size would give outputs of the size that was assembled with."""
    data = {"num_atoms": np.tile([1, 3], 9), "charge": np.ones(36, np.float32)}
    database = jh.database(data, splits={})

    def charges(params, pack):
        slots = len(pack["structure_mask"])
        total = jax.ops.segment_sum(pack["charge"], pack["atom_structure"], slots)
        return {"total": params * total, "all": pack["charge"].sum()}

    model = jh.model(charges, per_row=True)

    def needed(name):
        loss = jh.losses.mean(jh.pred(name))
        few = database.packed(3)
        return jh.assemble_for_training(loss, [loss], model=model, params=1.0, specs=few)

    modules, db_info = needed("total")
    assert db_info["inputs"] == ["atom_structure", "charge", "structure_mask"]
    assert needed("all")[1]["inputs"] == ["charge"]
    many = database.packed(9)
    pack = many.source(columns=db_info).read(0, 1)
    total = modules.model(1.0, pack)["total"]
    assert total.shape == (1, many.packing.structures) != (1, database.packed(3).packing.structures)
    assert float(total.sum()) == np.nansum(pack["charge"])


@pytest.mark.parametrize("of", [lambda few: few.specs, lambda few: few.source()])
def test_specs_and_sources_of_packs_are_packs_as_their_database_is(of) -> None:
    data = {"num_atoms": np.tile([1, 3], 9), "charge": np.ones(36, np.float32)}
    database = jh.database(data, splits={})

    def charges(params, pack):
        slots = len(pack["structure_mask"])
        total = jax.ops.segment_sum(pack["charge"], pack["atom_structure"], slots)
        unread = pack["num_atoms"] + jnp.zeros(slots, jnp.int32)
        return {"total": params * jnp.nan_to_num(total), "unread": unread}

    mean = jh.losses.mean(jh.pred("total"), mask=jh.true("structure_mask"))
    modules, _ = jh.assemble_for_training(
        mean,
        {"mean": mean},
        model=jh.model(charges, per_row=True),
        params=1.0,
        specs=of(database.packed(3)),
    )
    assert modules.evaluator.program.batch_size == 1
    assert modules.evaluator.evaluate(1.0, database.packed(9)) == {"mean": 2.0}


def test_columns_that_only_training_looks_at_are_inputs():
    def model(params, inputs, *, key):
        y = inputs["x"] * params
        return {"y": y if key is None else y + inputs["z"] * jax.random.normal(key, y.shape)}

    assert needs(jh.model(model, has_key=True)) == (["x", "z"], ["y"], [])


def test_outputs_of_another_shape_in_training_are_refused():
    def model(params, inputs, *, key):
        return {"y": inputs["x"] if key is None else inputs["x"][:, :2]}

    text = r"model: saw y float32\[6, 2\] with a key, expected y float32\[6, 3\], as"
    with pytest.raises(ValueError, match=text):
        needs(jh.model(model, has_key=True))


def test_a_number_that_training_draws_and_evaluation_writes_out_is_the_same_output():
    def model(params, inputs, *, key):
        y = inputs["x"] * params
        scale = jnp.broadcast_to(1.0, (len(y),))
        return {"y": y, "s": scale if key is None else jax.random.normal(key, (len(y),))}

    scale = jh.losses.mean(jh.pred("s"))
    assert needs(jh.model(model, has_key=True), Y, scale)[1] == ["s", "y"]
