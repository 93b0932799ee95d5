"""The table of bad input: each is one exception, before anything compiles, that says where and why.

What is no error (a uint8 that wraps, labels outside the classes) stands below the table, with what
happens. Signals, full disks, resumes and damaged files have files of tests of their own.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zarr

import jaxhandler as jh

PLANS = jh.PlanCache()
X = np.arange(30, dtype=np.float32).reshape(10, 3)
Y = np.ones(10, np.float32)
MEMBERS = 8


class Case(NamedTuple):
    """A call that makes bad input in a folder and passes it on, and what it must raise."""

    call: Callable[[Path], object]
    error: type[BaseException]
    texts: tuple[str, ...]


def model(params: Any, rows: Any) -> Any:
    return {name: column * params for name, column in rows.items()}


def loss_fn(params: Any, rows: Any) -> Any:
    return (rows["x"].mean(axis=1) * params - 1) ** 2


CALC = jh.calculator(model, batch_size=4, plans=PLANS)
VAL = jh.validator({"loss": loss_fn}, batch_size=4, plans=PLANS)
TRAINER = jh.trainer(loss_fn, optax.sgd(0.01), batch_size=4, plans=PLANS)
OWN = jh.handler(lambda carry, rows: (carry, rows["x"]), batch_size=4, plans=PLANS)
ENSEMBLE = jh.ensemble(CALC, members=MEMBERS)
MODELS = jh.batch_models(lambda params, x: x @ params["w"] + params["b"])
W, B = np.ones((MEMBERS, 3, 2), np.float32), np.ones((MEMBERS, 2), np.float32)
INFER = jh.memoizing_inferer(model, np.float32(2), {"x": X[:1], "y": Y[:1]})
STATE = TRAINER.init(np.float32(1), key=jax.random.key(0))
KEYS = jax.random.split(jax.random.key(0), MEMBERS - 1)
P, PS = np.float32(2), np.ones(MEMBERS, np.float32)


# Rows: whatever takes them refuses them alike.

TAKERS: dict[str, Callable[[Any], object]] = {
    "calc": lambda rows: CALC.calc(P, rows),
    "calc_from_host": lambda rows: CALC.calc_from_host(P, rows),
    "iter_from_host": lambda rows: next(CALC.iter_from_host(P, rows)),
    "validate": lambda rows: VAL.validate(P, rows),
    "validate_from_host": lambda rows: VAL.validate_from_host(P, rows),
    "train": lambda rows: TRAINER.train(STATE, rows),
    "train_from_host": lambda rows: TRAINER.train_from_host(STATE, rows),
    "handle_from_host": lambda rows: OWN.handle_from_host(0.0, rows),
    "ensemble": lambda rows: ENSEMBLE.calc_from_host(PS, rows),
}


class Wrong(NamedTuple):
    rows: Any
    error: type[BaseException]
    texts: tuple[str, ...]


def of_dtype(array: Any, *texts: str) -> Wrong:
    return Wrong({"x": array}, TypeError, ("data['x']: saw", *texts))


MASKED = np.ma.masked_array(X[:2], mask=X[:2] > 3)
RAGGED = [[1.0, 2.0], [3.0, 4.0], [5.0]]
FIELDS = np.zeros(2, [("a", "f4")])
ROWS = {
    "leaves of 10 and 9 rows": Wrong(
        {"x": X, "y": Y[:9]}, ValueError, ("10 rows in data['x']", "9 rows in data['y']", "Cut")
    ),
    "a scalar leaf": Wrong(
        {"x": X, "g": {"y": Y[0]}}, (TypeError, ValueError), ("data['g']['y']", "saw a")
    ),
    "no leaves": Wrong({}, ValueError, ("data: saw no leaves", "at least one array")),
    "objects": of_dtype(np.array([1, "a"], object), "dtype object", ".astype"),
    "text": of_dtype(np.array(["a", "b"]), "dtype <U1", "Encode"),
    "bytes": of_dtype(np.array([b"a", b"b"]), "dtype |S1", "Encode"),
    "dates": of_dtype(np.array(["2020"], "M8[D]"), "datetime64[D]", "offset"),
    "durations": of_dtype(np.array([1], "m8[s]"), "timedelta64[s]", ".astype"),
    "fields": of_dtype(FIELDS, "('a', '<f4')", "Split the fields"),
    "big-endian": of_dtype(X.astype(">f4"), "byte order >f4", "newbyteorder"),
    "longdouble": of_dtype(X.astype(np.longdouble), "float128", "float64"),
    "a mask": of_dtype(MASKED, "a masked array", ".filled"),
    "random keys": of_dtype(KEYS, "random keys", "key_data"),
    "ragged lists": Wrong(
        {"x": RAGGED}, TypeError, ("data['x']", "row 2 has 1 entries where row 0 has 2")
    ),
    "a ragged array of lists": of_dtype(
        np.array(RAGGED, object), "row 2 has 1 entries where row 0 has 2"
    ),
    "int64 above int32": Wrong(
        {"x": np.array([1, 2**40 + 5])},
        OverflowError,
        ("data['x']: saw 1099511627781 in row 1", "int32"),
    ),
    "uint64 above uint32": Wrong(
        {"x": np.array([1, 2**63], np.uint64)},
        OverflowError,
        ("data['x']: saw 9223372036854775808 in row 1",),
    ),
}


def taken(take: Callable[[Any], object], rows: Any) -> Callable[[Path], object]:
    return lambda folder: take(rows)


def narrowed(rows: Any) -> Any:
    """Rows of float64 without the warning, which is a case of its own."""
    return jh.open_source(rows, narrowing="allow")


BY_ROWS = {
    f"{kind}, {taker}": Case(taken(take, wrong.rows), wrong.error, wrong.texts)
    for kind, wrong in ROWS.items()
    for taker, take in TAKERS.items()
}


# Arguments.


def counted(argument: str, call: Callable[[Any], object], least: int = 1) -> dict[str, Case]:
    """A count that is too small, a bool, a float, text."""
    said = (f"{argument}: saw", f"a whole number of at least {least}")
    wrong: dict[Any, Any] = {least - 1: ValueError, -7: ValueError, True: TypeError}
    wrong |= {2.5: TypeError, "4": ValueError if argument == "macrobatch_size" else TypeError}
    said_of = lambda value: said[:1] if value == "4" else said  # noqa: E731
    return {
        f"{argument}={value!r}": Case(lambda _, v=value: call(v), error, said_of(value))
        for value, error in wrong.items()
    }


ROWS_OK = {"x": X, "y": Y}
ARGUMENTS = {
    **counted("batch_size", lambda n: jh.calculator(model, batch_size=n)),
    **counted("macrobatch_size", lambda n: CALC.calc_from_host(P, ROWS_OK, macrobatch_size=n)),
    **counted("epochs", lambda n: TRAINER.train_from_host(STATE, ROWS_OK, epochs=n)),
    **counted("accumulate", lambda n: jh.trainer(loss_fn, optax.sgd(0.1), accumulate=n)),
    **counted("members", lambda n: jh.ensemble(CALC, members=n)),
    **counted("read_ahead", lambda n: CALC.calc_from_host(P, ROWS_OK, read_ahead=n), 0),
    **counted("sizes", lambda n: INFER.preload((n,))),
    **counted("max_plans", lambda n: jh.memoizing_inferer(model, P, {"x": X}, max_plans=n)),
    **counted("largest", lambda n: jh.policies.powers_of_two(n)),
}


# Parameters and states.


def params_case(params: Any, error: type[BaseException], *texts: str) -> dict[str, Case]:
    name = texts[0]
    calls: dict[str, Callable[[], object]] = {
        "calculator": lambda: CALC.calc_from_host(params, ROWS_OK),
        "validator": lambda: VAL.validate(params, ROWS_OK),
        "ensemble": lambda: ENSEMBLE.calc_from_host(params, ROWS_OK),
        "inferer": lambda: jh.memoizing_inferer(model, params, {"x": X}),
    }
    return {
        f"params of {name}, {who}": Case(lambda _, call=call: call(), error, ("params", *texts))
        for who, call in calls.items()
    }


PARAMS = {
    **params_case({"w": np.array([1, "a"], object)}, TypeError, "['w']: saw dtype object"),
    **params_case({"w": np.array(["a"])}, TypeError, "['w']: saw dtype <U1"),
    **params_case({"w": X.astype(">f4")}, TypeError, "['w']: saw byte order >f4"),
    **params_case({"w": np.array([2**40])}, OverflowError, "['w']: saw 1099511627776", "int32"),
    "params of 1e300, trainer": Case(
        lambda _: TRAINER.init({"w": np.array([1e300])}, key=STATE.key),
        OverflowError,
        ("params['w']: saw 1e+300", "a finite float32"),
    ),
    "a state of 1e300": Case(
        lambda _: TRAINER.train(STATE._replace(params=np.float64(1e300)), ROWS_OK),
        OverflowError,
        ("state.params: saw 1e+300", "a finite float32"),
    ),
    "a carry of text": Case(
        lambda _: OWN.handle({"a": "text"}, ROWS_OK), TypeError, ("carry['a']: saw dtype <U4",)
    ),
    "params for a state": Case(
        lambda _: TRAINER.train(P, ROWS_OK), TypeError, ("state: saw a", "trainer.init")
    ),
    "integer params, trainer": Case(
        lambda _: TRAINER.init({"w": np.ones(2, np.int32)}, key=STATE.key),
        TypeError,
        ("params['w']: saw dtype int32", "floating"),
    ),
    "a key that is a number": Case(
        lambda _: TRAINER.init(P, key=0), TypeError, ("key: saw an int", "jax.random.key(0)")
    ),
}


# Members of ensembles.

STACKED = {
    "stacked leaves of 8 and 7": Case(
        lambda _: jh.unstack({"w": W, "b": B[:7]}),
        ValueError,
        ("tree: saw 7 members in tree['b'], 8 members in tree['w']", "jh.stack"),
    ),
    "stacked leaves of 8 and 7, batch_models": Case(
        lambda _: MODELS({"w": W, "b": B[:7]}, X),
        ValueError,
        ("7 members in tree['b'], 8 members in tree['w']",),
    ),
    "stacked leaves of 8 and 7 under vmap": Case(
        lambda _: jax.vmap(MODELS)({"w": W[None], "b": B[None, :7]}, X[None]),
        ValueError,
        ("7 members in tree['b'], 8 members in tree['w']",),
    ),
    "a stacked scalar": Case(
        lambda _: MODELS({"w": W, "b": np.float32(1)}, X),
        ValueError,
        ("tree['b']: saw a scalar", "[E, ...]"),
    ),
    "trees of other shapes": Case(
        lambda _: jh.stack([{"w": W}, {"w": W[:7]}]),
        ValueError,
        ("trees[1]['w']: saw float32[7, 3, 2], expected float32[8, 3, 2]",),
    ),
    "inputs of 7 members": Case(
        lambda _: MODELS({"w": W, "b": B}, np.stack([X] * 7)),
        ValueError,
        ("inputs: saw float32[7, 10, 3], expected 8 members",),
    ),
    "params of 7 members": Case(
        lambda _: ENSEMBLE.calc_from_host({"w": PS[:7]}, ROWS_OK),
        ValueError,
        ("params['w']: saw float32[7], expected 8 members", "jh.replicate"),
    ),
    "params of no members": Case(
        lambda _: ENSEMBLE.calc_from_host({"w": P}, ROWS_OK),
        ValueError,
        ("params['w']: saw float32[], expected 8 members",),
    ),
    "keys of 7 members": Case(
        lambda _: jh.ensemble(TRAINER, members=MEMBERS).init(PS, key=KEYS),
        ValueError,
        ("key: saw keys [7], expected one key, or keys [8]",),
    ),
    "rows of 7 members": Case(
        lambda _: jh.ensemble(CALC, members=MEMBERS, member_data=True).calc_from_host(
            PS, {"x": np.ones((10, 7, 3), np.float32)}
        ),
        ValueError,
        ("data['x']: saw float32[4, 7, 3], expected 8 members",),
    ),
}


# Models whose outputs are no rows; data without rows.


def calculate(fn: Callable[..., Any], rows: Any = X, **options: Any) -> Any:
    return jh.calculator(fn, batch_size=4, plans=PLANS).calc_from_host((), rows, **options)


def infer_with(fn: Callable[..., Any]) -> object:
    return jh.memoizing_inferer(fn, (), X[:1])


OUTPUTS = {
    "a model that sums the rows up": Case(
        lambda _: calculate(lambda _, x: {"a": [x.sum()]}),
        ValueError,
        ("outputs['a'][0]: saw float32[] for a batch of 4 rows", "4 along axis 0"),
    ),
    "a model that moves the rows": Case(
        lambda _: calculate(lambda _, x: x.T), ValueError, ("outputs: saw float32[3, 4]",)
    ),
    "a model that leaves rows out": Case(
        lambda _: calculate(lambda _, x: x[::2]), ValueError, ("outputs: saw float32[2, 3]",)
    ),
    "a loss of another shape": Case(
        lambda _: jh.trainer(lambda p, r: p * r["x"], optax.sgd(0.1), plans=PLANS).train(
            STATE, ROWS_OK
        ),
        ValueError,
        ("loss_fn: saw float32[10, 3] for a batch of 10 rows", "[B]"),
    ),
    "no loss": Case(
        lambda _: jh.trainer(lambda p, r: None, optax.sgd(0.1), plans=PLANS).train(STATE, ROWS_OK),
        TypeError,
        ("loss_fn: saw a NoneType",),
    ),
    "a metric of another shape": Case(
        lambda _: jh.validator({"m": lambda p, r: r["x"]}, plans=PLANS).validate(P, ROWS_OK),
        ValueError,
        ("metric_fns['m']: saw float32[10, 3] for a batch of 10 rows",),
    ),
    "an inferer of a model that sums the rows up": Case(
        lambda _: infer_with(lambda _, x: x.sum()), ValueError, ("saw shape [] for", "axis 0")
    ),
    "no rows to validate": Case(
        lambda _: VAL.validate(P, {"x": X[:0]}), ValueError, ("data: saw 0 rows", "at least one")
    ),
    "no rows to train on": Case(
        lambda _: TRAINER.train_from_host(STATE, {"x": X[:0]}), ValueError, ("data: saw 0 rows",)
    ),
    "no whole batch": Case(
        lambda _: jh.calculator(model, batch_size=16, tail="drop").calc(P, ROWS_OK),
        ValueError,
        ('data: saw 10 rows with tail="drop", expected at least one batch of 16', "smaller"),
    ),
    "outputs that no memory holds": Case(
        lambda _: calculate(lambda _, x: jnp.tile(x, (1, 1000)), Endless()),
        MemoryError,
        ("outputs: saw 858,993,458,800,000 bytes for float32[2147483647, 100000]", "out="),
    ),
    "more rows than int32 numbers": Case(
        lambda _: calculate(lambda _, x: x, Endless(2**31)),
        ValueError,
        ("data: saw 2147483648 rows, expected at most 2147483647", "Split"),
    ),
}


class Endless:
    """More rows than any memory has room for, made as they are read."""

    dtype = np.dtype(np.float32)

    def __init__(self, rows: int = 2**31 - 1) -> None:
        self.shape = (rows, 100)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.zeros((rows.stop - rows.start, 100), np.float32)


# Labels.

LABELS = {
    "a label out of range": Case(
        lambda _: CALC.calc_from_host(P, jh.within({"x": np.int32([1, 7, -1])}, {"x": (0, 2)})),
        ValueError,
        ("data['x']: saw 7 in row 1, expected 0 to 2", "Mend the rows"),
    ),
    "a label out of range in a file": Case(
        lambda folder: TRAINER.train_from_host(STATE, jh.within(labelled(folder), {"y": (0, 2)})),
        ValueError,
        ("data['y']: saw -1 in row 9, expected 0 to 2",),
    ),
}


def labelled(folder: Path) -> dict[str, Any]:
    np.save(folder / "y.npy", np.int32([*range(3)] * 3 + [-1]))
    return {"x": X, "y": folder / "y.npy"}


# float64.

DOUBLE = X.astype(np.float64)


def wide(folder: Path) -> Path:
    np.save(folder / "x.npy", np.where(X < 25, DOUBLE, 1e300))
    return folder / "x.npy"


FLOATS = {
    "float64 where it is refused": Case(
        lambda _: jh.open_source({"x": DOUBLE}, narrowing="raise"),
        TypeError,
        ("data['x']: saw float64, expected float32", "narrowing"),
    ),
    "float64 that warns": Case(
        lambda _: CALC.calc_from_host(P, {"x": DOUBLE}),
        UserWarning,  # Warnings are errors here.
        ("data['x']: saw float64, expected float32", "It is narrowed"),
    ),
    "1e300": Case(
        lambda _: CALC.calc_from_host(P, narrowed({"x": np.where(X < 25, DOUBLE, 1e300)})),
        OverflowError,
        ("data['x']: saw 1e+300 in row 8, expected a finite float32", "Scale"),
    ),
    "1e300 in a file": Case(
        lambda folder: CALC.calc_from_host(P, {"x": narrowed(wide(folder))}),
        OverflowError,
        ("x.npy: saw 1e+300 in row 8",),
    ),
}


# Inputs of inferers.


def infer_case(inputs: Any, error: type[BaseException], *texts: str) -> Case:
    return Case(lambda _: INFER(inputs), error, texts)


def infer_of(narrowing: str, dtype: Any = np.float32) -> jh.MemoizingInferer:
    example = {"x": X[:1].astype(dtype)}
    return jh.memoizing_inferer(lambda _, rows: rows, (), example, narrowing=narrowing)


INPUTS = {
    "inferer: rows that disagree": infer_case(
        {"x": X, "y": Y[:9]}, ValueError, "10 rows in inputs['x'], 9 rows in inputs['y']"
    ),
    "inferer: no row axis": infer_case(
        {"x": X[0], "y": Y}, ValueError, "inputs['x']: saw shape [3], expected [rows, 3]"
    ),
    "inferer: another width": infer_case(
        {"x": X[:, :2], "y": Y}, ValueError, "inputs['x']: saw shape [10, 2], expected [rows, 3]"
    ),
    "inferer: another dtype": infer_case(
        {"x": X.astype(np.int32), "y": Y}, TypeError, "inputs['x']: saw dtype int32", ".astype"
    ),
    "inferer: float64 that warns": infer_case(
        {"x": DOUBLE, "y": Y}, UserWarning, "inputs['x']: saw float64, expected float32"
    ),
    "inferer: float64 where it is refused": Case(
        lambda _: infer_of("raise")({"x": DOUBLE}), TypeError, ("inputs['x']: saw float64",)
    ),
    "inferer: 1e300": Case(
        lambda _: infer_of("allow")({"x": np.where(X < 25, DOUBLE, 1e300)}),
        OverflowError,
        ("inputs['x']: saw 1e+300 in row 8, expected a finite float32",),
    ),
    "inferer: int64 above int32": Case(
        lambda _: infer_of("allow", np.int32)({"x": np.int64(X) + 2**40}),
        OverflowError,
        ("inputs['x']: saw 1099511627776 in row 0", "int32"),
    ),
    "inferer: text": infer_case(
        {"x": X.astype(str), "y": Y}, TypeError, "inputs['x']: saw dtype <U", "Encode"
    ),
    "inferer: a ragged list": infer_case(
        {"x": [[1.0, 2.0, 3.0], [1.0]], "y": Y},
        TypeError,
        "inputs['x']: saw a list (row 1 has 1 entries where row 0 has 3)",
    ),
    "inferer: a missing input": infer_case({"x": X}, ValueError, "inputs: saw no inputs['y']"),
    "inferer: one too many": infer_case(
        {"x": X, "y": Y, "z": Y}, ValueError, "saw inputs['z'], expected inputs['x'], inputs['y']"
    ),
    "inferer: other parameters": Case(
        lambda _: INFER.with_params(np.ones(3, np.float32)), ValueError, ("params: saw shape (3,)",)
    ),
}


# Files.


def cut(folder: Path) -> Path:
    np.save(folder / "x.npy", X)
    os.truncate(folder / "x.npy", 228)
    return folder / "x.npy"


def cut_once_open(folder: Path) -> object:
    np.save(folder / "x.npy", X)
    source = jh.open_source({"x": folder / "x.npy"})
    os.truncate(folder / "x.npy", 228)
    return CALC.calc_from_host(P, source)


def cut_once_mapped(folder: Path) -> object:
    np.save(folder / "x.npy", X)
    mapped = np.load(folder / "x.npy", mmap_mode="r", allow_pickle=False)
    os.truncate(folder / "x.npy", 100)
    return CALC.calc_from_host(P, {"x": mapped})


def chunks(folder: Path, damage: Callable[[Path], object]) -> Path:
    zarr.create_array(folder / "x.zarr", data=X, chunks=(2, 3))
    damage(folder / "x.zarr" / "c" / "2" / "0")
    return folder / "x.zarr"


def half_written(folder: Path) -> Path:
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", X.shape, X.dtype, chunks=(2, 3))[:4] = X[:4]
    return folder / "x.h5"


def reading(make: Callable[[Path], Any], key: str = "x") -> Callable[[Path], object]:
    return lambda folder: CALC.calc_from_host(P, {key: make(folder)})


def saved(folder: Path) -> Path:
    trained = jh.trainer(loss_fn, optax.sgd(0.01), batch_size=4)
    trained.train_from_host(STATE, ROWS_OK, checkpoint=jh.checkpoint(folder / "kept", every=0))
    return folder / "kept"


FILES = {
    "rows of HDF5 that were never written": Case(
        reading(half_written), ValueError, ("no chunk for rows 4 to 6", 'missing_chunks="fill"')
    ),
    "a .npy that was cut": Case(
        reading(cut), ValueError, ("x.npy: saw 228 bytes, expected at least 248 (row 8 is cut)",)
    ),
    "a .npy that is cut once it is open": Case(
        cut_once_open, ValueError, ("x.npy: saw 228 bytes, expected at least 248 (row 8 is cut)",)
    ),
    "a .npy that is cut once it is mapped": Case(
        cut_once_mapped, ValueError, ("data['x']: saw 100 bytes, expected at least 248",)
    ),
    "a Zarr chunk that is missing": Case(
        reading(lambda folder: chunks(folder, lambda path: path.unlink())),
        ValueError,
        ("x.zarr: saw no chunk c/2/0 for row 4", 'missing_chunks="fill"'),
    ),
    "a Zarr chunk that was cut": Case(
        reading(lambda folder: chunks(folder, lambda path: os.truncate(path, 10))),
        ValueError,
        ("x.zarr: saw no valid Zarr file", "rows 4 to 6, in c/2/0", "write it again"),
    ),
    "a file that is not there": Case(
        reading(lambda folder: folder / "no.npy"), FileNotFoundError, ("no.npy",)
    ),
    "an ending that is not known": Case(
        reading(lambda folder: write(folder / "x.csv", "1,2")), ValueError, ("'.csv'", ".npy")
    ),
    "a sink of an ending that is not known": Case(
        lambda folder: CALC.calc_from_host(P, {"x": X}, out=folder / "out.csv"),
        ValueError,
        ("out: saw the ending '.csv'", ".npy, .zarr"),
    ),
    "a sink for one array, and two outputs": Case(
        lambda folder: CALC.calc_from_host(P, ROWS_OK, out=folder / "out.npy"),
        ValueError,
        ("out: saw 2 output leaves, expected one for a .npy file",),
    ),
    "a sink in a folder that is not there": Case(
        lambda folder: CALC.calc_from_host(P, ROWS_OK, out=folder / "no" / "out"),
        FileNotFoundError,
        ("out: the folder", "Make it first"),
    ),
    "a sink where somebody else's folder is": Case(
        lambda folder: CALC.calc_from_host(P, ROWS_OK, out=write(folder / "a" / "b", "").parent),
        FileExistsError,
        ("out: no earlier run wrote",),
    ),
    "a sink that is a number": Case(
        lambda _: CALC.calc_from_host(P, ROWS_OK, out=3), TypeError, ("out: saw an int",)
    ),
    "a checkpoint that is a path": Case(
        lambda folder: CALC.calc_from_host(P, {"x": X}, out=folder / "x.npy", checkpoint="kept"),
        TypeError,
        ("checkpoint: saw a str", "jh.checkpoint"),
    ),
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


TABLE = BY_ROWS | ARGUMENTS | PARAMS | STACKED | OUTPUTS | LABELS | FLOATS | INPUTS | FILES


@contextlib.contextmanager
def compiling_nothing() -> Iterator[None]:
    """Fails if XLA compiles, or a plan is built, inside the block."""
    caches = (PLANS, INFER.engine.plans)
    before, events = [cache.stats().compiles for cache in caches], []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert events == []
    assert [cache.stats().compiles for cache in caches] == before


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused_before_anything_compiles(name: str, tmp_path: Path) -> None:
    """And soon: within a second of the processor's time, since others may want it as well."""
    case, before = TABLE[name], time.process_time()
    with compiling_nothing(), pytest.raises(case.error) as caught:
        case.call(tmp_path)
    assert time.process_time() - before < 1
    text = str(caught.value)
    assert [each for each in case.texts if each not in text] == [], text


def test_a_compilation_would_be_seen() -> None:
    with pytest.raises(AssertionError), compiling_nothing():
        CALC.calc_from_host(P, ROWS_OK)
    with pytest.raises(AssertionError), compiling_nothing():
        jax.jit(lambda x: x + 2)(X)


# States that were saved, and are asked for as something else.

LIKES = {
    "another shape": (
        lambda state: state._replace(params=np.ones(3, np.float32)),
        "float32[3] in like.params where float32[] is stored",
    ),
    "another dtype": (
        lambda state: state._replace(params=np.int32(1)),
        "int32[] in like.params where float32[] is stored",
    ),
    "a leaf too many": (
        lambda state: state._replace(model_state={"mean": Y}),
        "float32[10] in like.model_state['mean'] where nothing is stored",
    ),
    "a leaf too few": (
        lambda state: state._replace(key=()),
        "nothing in like.key where threefry2x32 keys[] is stored",
    ),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("change", LIKES)
def test_a_state_is_loaded_as_it_was_saved_or_not_at_all(change: str, kept: Path) -> None:
    make, text = LIKES[change]
    with compiling_nothing(), pytest.raises(ValueError, match="expected the tree") as caught:
        jh.load_state(kept, like=make(STATE))
    assert text in str(caught.value)


# What is no error.


def test_small_integers_wrap_as_in_numpy() -> None:
    rows = {"a": np.uint8([200]), "b": np.uint8([100])}
    assert calculate(lambda _, rows: rows["a"] + rows["b"], rows).tolist() == [44]


def test_labels_outside_the_classes_are_only_looked_for_if_asked() -> None:
    """Else, as `jax.nn.one_hot` has it, they are no class: zeros."""
    labels = np.int32([1, 7, -1])
    classes = calculate(lambda _, labels: jax.nn.one_hot(labels, 3), labels)
    assert classes.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("ending", ["memory", ".npy", "", ".zarr", ".h5", ".arrow", ".parquet"])
def test_no_rows_give_outputs_of_no_rows(ending: str, tmp_path: Path) -> None:
    out = None if ending == "memory" else tmp_path / f"out{ending}"
    with compiling_nothing():
        found = CALC.calc_from_host(P, {"x": X[:0]}, out=out)
    rows = found if out is None else found.read(0, 0)
    [array] = jax.tree.leaves(rows)
    assert (array.shape, array.dtype) == ((0, 3), np.float32)


def test_no_rows_are_served_as_none() -> None:
    with compiling_nothing():
        assert INFER({"x": X[:0], "y": Y[:0]})["x"].shape == (0, 3)


@pytest.mark.parametrize("rows", [2, 10_000])
def test_arrays_may_be_written_to_as_soon_as_a_call_returns(rows: int) -> None:
    data = {"x": np.ones((rows, 3), np.float32)}
    on_device = CALC.calc(P, data)
    data["x"][:] = 7
    from_host = CALC.calc_from_host(P, data)
    served = INFER({**data, "y": data["x"][:, 0]})
    data["x"][:] = 0
    assert np.unique(on_device["x"]).tolist() == [2]
    assert np.unique(from_host["x"]).tolist() == np.unique(served["x"]).tolist() == [14]


def test_leaves_of_numpy_scalars_and_without_a_value_are_kept(tmp_path: Path) -> None:
    """Orbax refuses both when they are saved."""
    carry = {"count": np.int64(3), "nothing": np.zeros((0, 2), np.float32)}
    counter = jh.handler(lambda carry, rows: ({**carry, "count": carry["count"] + 1}, rows["x"]),
                         outputs=None, batch_size=4)  # fmt: skip
    options = {"checkpoint": jh.checkpoint(tmp_path, every=0)}
    carry, _ = counter.handle_from_host(carry, ROWS_OK, **options)
    assert jh.load_state(tmp_path)["count"] == int(carry["count"]) == 6
    assert jh.load_state(tmp_path)["nothing"].shape == (0, 2)
