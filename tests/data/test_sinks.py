"""Sinks: what is written comes back, and what is not whole is never taken for whole."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import h5py
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import zarr

import jaxhandler as jh
from jaxhandler import files
from jaxhandler.checksums import checksum
from jaxhandler.data.memory_sinks import BlockSink
from jaxhandler.data.sinks import FileSink, check_sink, open_sink
from tests.data.formats import ENDINGS, read_back

ROOT = Path(jh.__file__).parents[1]

refusal = pytest.mark.usefixtures("compiles_nothing")
# Tracing counts as compiling.
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))


def specs_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def rows_of(tree, start, stop, axis=0):
    before = (slice(None),) * axis
    return jax.tree.map(lambda leaf: leaf[(*before, slice(start, stop))], tree)


def write_all(sink, tree, axis=0):
    sink.write(0, [tree])
    return sink.finish()


def write_file(path, array):
    return write_all(open_sink(path, specs_of(array)), array)


@pytest.fixture
def x():
    return np.arange(12, dtype=np.float32).reshape(6, 2)


# Round trips.


@st.composite
def outputs_in_pieces(draw):
    """A tree of outputs, its row axis, and how its rows are cut into writes of several pieces."""
    axis = draw(st.integers(0, 1))
    rows, members = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    lead = (members,) * axis + (rows,)
    shapes = draw(
        st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=3)
    )
    dtypes = [np.float32, np.int32, np.bool_, np.complex64, np.float16]
    rng = np.random.default_rng(0)
    tree = {
        f"leaf{number}": rng.integers(0, 2, (*lead, *shape)).astype(draw(st.sampled_from(dtypes)))
        for number, shape in enumerate(shapes)
    }
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=5)))
    ranges = list(zip([0, *cuts], [*cuts, rows], strict=True))
    writes = []
    while ranges:
        count = draw(st.integers(1, len(ranges)))
        writes.append(ranges[:count])
        ranges = ranges[count:]
    return tree, axis, rows, writes


def write_in_pieces(sink, tree, axis, writes, make=lambda leaf: leaf):
    for pieces in writes:
        parts = [jax.tree.map(make, rows_of(tree, *piece, axis)) for piece in pieces]
        sink.write(pieces[0][0], parts)
    return sink.finish()


@hypothesis.given(case=outputs_in_pieces(), make=st.sampled_from([np.asarray, jnp.asarray]))
def test_outputs_come_back_from_host_memory(case, make):
    tree, axis, _, writes = case
    sink = open_sink(None, specs_of(tree), row_axis=axis)
    result = write_in_pieces(sink, tree, axis, writes, make)
    jax.tree.map(np.testing.assert_array_equal, result, tree)
    assert jax.tree.map(lambda leaf: leaf.dtype, result) == jax.tree.map(
        lambda leaf: leaf.dtype, tree
    )


@hypothesis.given(case=outputs_in_pieces(), make=st.sampled_from([np.asarray, jnp.asarray]))
def test_outputs_come_back_from_the_device(case, make):
    tree, axis, _, writes = case
    sink = open_sink("device", specs_of(tree), row_axis=axis)
    result = write_in_pieces(sink, tree, axis, writes, make)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result))
    jax.tree.map(np.testing.assert_array_equal, result, tree)


@hypothesis.given(case=outputs_in_pieces(), make=st.sampled_from([np.asarray, jnp.asarray]))
def test_outputs_come_back_from_a_folder(case, make, tmp_path_factory):
    tree, axis, rows, writes = case
    folder = tmp_path_factory.mktemp("sink") / "out"
    sink = open_sink(folder, specs_of(tree), row_axis=axis)
    write_in_pieces(sink, tree, axis, writes, make)
    for name, leaf in tree.items():
        loaded = np.load(folder / f"{name}.npy")
        assert (loaded.shape, loaded.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(loaded, leaf)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert (manifest["rows"], manifest["row_axis"]) == (rows, axis)
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    assert sorted(os.listdir(folder)) == sorted(["manifest.json", *manifest["files"]])
    assert os.listdir(folder.parent) == ["out"]


@hypothesis.given(case=outputs_in_pieces())
def test_a_single_output_comes_back_from_a_npy_file(case, tmp_path_factory):
    tree, axis, _, writes = case
    array = {"leaf0": tree["leaf0"]}
    path = tmp_path_factory.mktemp("sink") / "out.npy"
    sink = open_sink(str(path), specs_of(array), row_axis=axis)
    write_in_pieces(sink, array, axis, writes)
    loaded = np.load(path)
    assert loaded.dtype == tree["leaf0"].dtype
    np.testing.assert_array_equal(loaded, tree["leaf0"])
    entry = files.read_manifest(files.manifest_of(path))["files"]["out.npy"]
    assert entry == {"bytes": path.stat().st_size, "crc32": checksum(path)}
    assert sorted(os.listdir(path.parent)) == ["out.npy", "out.npy.manifest.json"]


@hypothesis.given(case=outputs_in_pieces())
def test_blocks_are_given_back_as_they_are_written(case):
    tree, axis, _, writes = case
    sink = BlockSink(axis)
    for pieces in writes:
        block = sink.write(pieces[0][0], [rows_of(tree, *piece, axis) for piece in pieces])
        expected = rows_of(tree, pieces[0][0], pieces[-1][1], axis)
        jax.tree.map(np.testing.assert_array_equal, block, expected)
    assert sink.finish() is None


def test_the_result_of_a_file_is_an_open_source_of_it(x, tmp_path):
    source = write_file(tmp_path / "out.npy", x)
    assert isinstance(source, jh.Source)
    np.testing.assert_array_equal(source.read(1, 4), x[1:4])


def test_a_folder_written_opens_as_a_dict_of_its_leaves(x, tmp_path):
    tree = {"a": {"b": x}, "c": [x[:, 0]]}
    write_all(open_sink(tmp_path / "out", specs_of(tree)), tree)
    rows = jh.open_source(tmp_path / "out").read(2, 3)
    np.testing.assert_array_equal(rows["a.b"], x[2:3])
    np.testing.assert_array_equal(rows["c.0"], x[2:3, 0])


def test_a_bare_array_in_a_folder_is_called_outputs(x, tmp_path):
    write_file(tmp_path / "out", x)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "outputs.npy"), x)


def test_bfloat16_stays_what_it_is_in_memory():
    array = np.arange(4).astype(ml_dtypes.bfloat16)
    result = write_all(open_sink(None, specs_of(array)), array)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, array)


def test_random_keys_stay_keys_on_the_device():
    keys = jax.random.split(jax.random.key(0), 4)
    sink = open_sink("device", specs_of(keys))
    sink.write(0, [keys[:3], keys[3:]])
    np.testing.assert_array_equal(jax.random.key_data(sink.finish()), jax.random.key_data(keys))


def test_a_write_of_more_pieces_than_one_system_call_takes_is_whole(tmp_path):
    array = np.arange(3000, dtype=np.int32)
    sink = open_sink(tmp_path / "out.npy", specs_of(array))
    sink.write(0, [array[row : row + 1] for row in range(3000)])
    sink.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), array)


# What is refused before any work.


@refusal
def test_a_tree_is_refused_by_a_single_npy_file(x, tmp_path):
    with pytest.raises(ValueError, match=r"out: saw 2 output leaves, expected one .*folder"):
        open_sink(tmp_path / "out.npy", specs_of({"a": x, "b": x}))
    assert os.listdir(tmp_path) == []


@refusal
def test_random_keys_are_refused_by_host_memory():
    with pytest.raises(TypeError, match=r"outputs\['key'\]: saw random keys.*key_data"):
        open_sink(None, {"key": KEYS})


@refusal
@pytest.mark.parametrize(
    "tree",
    [{"a/b": 0}, {"..": {"/x": 0}}, {"a.b": 0, "a": {"b": 0}}, {"": 0, "outputs": 0}],
    ids=str,
)
def test_leaf_names_that_make_no_file_names_are_refused(tree, tmp_path):
    specs = jax.tree.map(lambda _: jax.ShapeDtypeStruct((3,), np.float32), tree)
    with pytest.raises(ValueError, match="out: saw .* expected one file per leaf"):
        open_sink(tmp_path / "out", specs)
    assert os.listdir(tmp_path) == []


@refusal
@pytest.mark.parametrize("out", [3, np.zeros(3), ["out.npy"], b"out.npy"], ids=str)
def test_what_is_no_path_is_refused(out):
    with pytest.raises(TypeError, match="out: saw an? .*, expected a path, or None"):
        check_sink(out)


@refusal
def test_an_unknown_ending_is_refused(tmp_path):
    message = r"out: saw the ending '.csv', expected .npy, .*, or none for a folder"
    with pytest.raises(ValueError, match=message):
        check_sink(tmp_path / "out.csv")


@refusal
def test_a_sink_among_the_columns_that_are_read_is_refused(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    for data in (tmp_path, str(tmp_path), {"x": x, "y": [tmp_path]}):
        with pytest.raises(ValueError, match="out.npy in .*, expected a place outside the folder"):
            check_sink(tmp_path / "out.npy", data)


def test_what_is_read_is_not_written_to_by_whatever_name(x, tmp_path, monkeypatch):
    path, link = tmp_path / "x.npy", tmp_path / "link.npy"
    np.save(path, x)
    link.symlink_to(path)
    np.save(tmp_path / "y.npy", x)
    monkeypatch.chdir(tmp_path)
    source = jh.open_source(path)
    for data in (
        path,
        "x.npy",
        link,
        {"x": x, "y": [path]},
        source,
        {"y": source},
        jh.open_source({"x": x, "y": "x.npy"}),
        jh.concatenate(["y.npy", "x.npy"]),
        np.load(path, mmap_mode="r")[2:],
        jh.database({"x": path, "y": x}, splits={"some": [0, 2]}).source("some", ["x"]),
    ):
        for out in (path, "x.npy", link):
            with pytest.raises(
                ValueError, match=r"out: saw .*\.npy, which is read, expected .* no rows"
            ):
                check_sink(out, data)
    np.testing.assert_array_equal(np.load(path), x)


def test_open_files_and_stores_that_are_read_are_not_written_to(x, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
    write_file(tmp_path / "x.zarr", x)
    with h5py.File(tmp_path / "x.h5") as file:
        for data in (file, file["x"], {"x": jh.open_source(file["x"])}):
            with pytest.raises(ValueError, match="x.h5, which is read"):
                check_sink(tmp_path / "x.h5", data)
    for data in (zarr.open(str(tmp_path / "x.zarr"), mode="r"), str(tmp_path / "x.zarr")):
        with pytest.raises(ValueError, match="x.zarr, which is read"):
            check_sink(tmp_path / "x.zarr", data)


def test_a_file_of_others_may_be_replaced_where_it_is_not_read(x, tmp_path):
    np.save(tmp_path / "out.npy", x)
    check_sink(tmp_path / "out.npy", {"x": x, "y": tmp_path / "no.npy"})


@refusal
def test_a_sink_in_the_folder_of_an_opened_source_is_refused(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    source = jh.open_source(tmp_path)
    with pytest.raises(ValueError, match="out.npy in .*, expected a place outside the folder"):
        check_sink(tmp_path / "out.npy", source)


def test_a_sink_beside_files_that_are_read_one_by_one_is_fine(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    check_sink(tmp_path / "out.npy", {"x": tmp_path / "x.npy"})


@pytest.mark.parametrize("out", ["out", "out.zarr", "out.h5"])
def test_what_is_no_column_may_lie_in_the_folder_that_is_read(out, x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    check_sink(tmp_path / out, tmp_path)


@refusal
def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"the folder {tmp_path / 'no'} does not exist"):
        check_sink(tmp_path / "no" / "out.npy")


FOREIGN = {
    "a folder": ("out", "out/precious.txt"),
    "a folder where the rows will be written": ("out", "out.partial/precious.txt"),
    "a folder where the old output would wait": ("out", "out.replaced/precious.txt"),
    "a folder where a file shall be": ("out.npy", "out.npy/precious.txt"),
    "a file where a folder shall be": ("out", "out"),
    "a store": ("out.zarr", "out.zarr/zarr.json"),
    "a file where a store shall be": ("out.zarr", "out.zarr"),
    "a folder where a table shall be": ("out.parquet", "out.parquet/precious.txt"),
}


@refusal
@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_wrote_is_not_deleted(case, x, tmp_path):
    out, precious = FOREIGN[case]
    precious = tmp_path / precious
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    for attempt in (check_sink, lambda path: open_sink(path, specs_of(x))):
        with pytest.raises(FileExistsError, match=r"out: no earlier run wrote .* Name another"):
            attempt(tmp_path / out)
    assert precious.read_text() == "precious"


def test_an_empty_folder_may_be_taken(x, tmp_path):
    (tmp_path / "out").mkdir()
    np.testing.assert_array_equal(write_file(tmp_path / "out", x).read(0, 6)["outputs"], x)


# What is not whole.


NPY_OUTS = pytest.mark.parametrize("out", ["out.npy", "out"])
OUTS = pytest.mark.parametrize("out", [f"out{ending}" for ending in ENDINGS])
RESERVED = pytest.mark.parametrize("out", [f"out{end}" for end in ENDINGS if end != ".parquet"])


def read(path):
    """The rows of a `.npy` output of one leaf."""
    source = jh.open_source(path)
    rows = source.read(0, source.num_rows)
    return rows if path.suffix else rows["outputs"]


def write_anew(path, array):
    sink = FileSink(path, specs_of(array))
    sink.write(0, [array])
    sink.publish()


@refusal
@OUTS
def test_an_aborted_output_is_absent_and_is_refused_with_a_clear_message(out, x, tmp_path):
    sink = open_sink(tmp_path / out, specs_of(x))
    sink.write(0, [x[:4]])
    sink.abort()
    assert not (tmp_path / out).exists()
    with pytest.raises(ValueError, match=f"{out}: saw an interrupted output") as caught:
        jh.open_source(tmp_path / out)
    assert "expected all 6 rows" in str(caught.value)
    assert "Run what wrote it again" in str(caught.value)
    with pytest.raises(ValueError, match="saw an interrupted output"):
        jh.open_source(tmp_path / f"{out}.partial")


@OUTS
def test_an_output_is_absent_until_it_is_finished(out, x, tmp_path):
    sink = open_sink(tmp_path / out, specs_of(x))
    sink.write(0, [x])
    assert not (tmp_path / out).exists()
    sink.publish()
    np.testing.assert_array_equal(read_back(tmp_path / out)["outputs"], x)


@OUTS
def test_an_interrupted_output_is_written_anew(out, x, tmp_path):
    sink = open_sink(tmp_path / out, specs_of(x))
    sink.write(0, [-x])
    sink.abort()
    write_anew(tmp_path / out, x)
    np.testing.assert_array_equal(read_back(tmp_path / out)["outputs"], x)
    assert not (tmp_path / f"{out}.partial").exists()


@NPY_OUTS
def test_an_earlier_output_is_kept_until_the_new_one_is_whole(out, x, tmp_path):
    path = tmp_path / out
    write_file(path, x)
    sink = open_sink(path, specs_of(x[:3]))
    sink.write(0, [-x[:3]])
    with pytest.warns(UserWarning, match=f"{out} is the whole output of an earlier run"):
        np.testing.assert_array_equal(read(path), x)
    sink.finish()
    np.testing.assert_array_equal(read(path), -x[:3])


@NPY_OUTS
def test_an_earlier_output_survives_an_abort(out, x, tmp_path):
    path = tmp_path / out
    write_file(path, x)
    open_sink(path, specs_of(x)).abort()
    with pytest.warns(UserWarning, match=f"a later run was interrupted and left {out}.partial"):
        np.testing.assert_array_equal(read(path), x)


def test_columns_of_an_earlier_output_do_not_stay_behind(x, tmp_path):
    old, new = {"a": x, "b": x}, {"a": x}
    write_all(open_sink(tmp_path / "out", specs_of(old)), old)
    write_all(open_sink(tmp_path / "out", specs_of(new)), new)
    assert set(jh.open_source(tmp_path / "out").specs) == {"a"}


@refusal
def test_a_file_that_was_cut_since_is_refused_by_its_manifest(x, tmp_path):
    write_file(tmp_path / "out.npy", x)
    np.save(tmp_path / "out.npy", x[:3])
    with pytest.raises(ValueError, match=r"out.npy: saw 152 bytes, expected 176 bytes by its man"):
        jh.open_source(tmp_path / "out.npy")


@refusal
def test_a_folder_that_lost_a_column_is_refused_by_its_manifest(x, tmp_path):
    tree = {"a": x, "b": x}
    write_all(open_sink(tmp_path / "out", specs_of(tree)), tree)
    (tmp_path / "out" / "b.npy").unlink()
    with pytest.raises(ValueError, match="b.npy: saw no such file, expected 176 bytes"):
        jh.open_source(tmp_path / "out")


@refusal
def test_an_interrupted_folder_that_somebody_renamed_is_refused(x, tmp_path):
    open_sink(tmp_path / "out", specs_of(x)).abort()
    (tmp_path / "out.partial").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="kept: saw an interrupted output in kept"):
        jh.open_source(tmp_path / "kept")


@pytest.mark.parametrize(("out", "column"), [("out", "x.npy"), ("out.zarr", "x")])
def test_so_is_a_column_of_an_interrupted_output(out, column, x, tmp_path):
    sink = open_sink(tmp_path / out, specs_of({"x": x}))
    sink.write(0, [{"x": x[:4]}])
    sink.abort()
    assert (tmp_path / f"{out}.partial" / column).exists()
    with pytest.raises(ValueError, match=f"{column}: saw an interrupted output in {out}.partial"):
        jh.open_source(tmp_path / f"{out}.partial" / column)


def test_an_output_moved_elsewhere_with_its_manifest_opens_there(x, tmp_path):
    write_file(tmp_path / "out.npy", x)
    (tmp_path / "out.npy").rename(tmp_path / "moved.npy")
    (tmp_path / "out.npy.manifest.json").rename(tmp_path / "moved.npy.manifest.json")
    np.testing.assert_array_equal(read(tmp_path / "moved.npy"), x)


# Real processes, really killed; real disks, really full.


HEADER = """
import os, sys
from pathlib import Path
import jax, numpy as np
from jaxhandler.data.sinks import open_sink
x = np.arange(12, dtype=np.float32).reshape(6, 2)
specs = jax.ShapeDtypeStruct(x.shape, x.dtype)
path = Path(sys.argv[1])
"""
# Imports what writers need, which takes most of a second, and forks each of them.
NURSERY = """
import json, os, signal, sys, traceback
import h5py, pyarrow.parquet, zarr
import jaxhandler, tests.data.formats

for line in sys.stdin:
    code, log, *sys.argv[1:] = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.alarm(120)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        status = 1
        try:
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def start_child(script, *args, executable=None):
    """Starts a Python process that runs a script with this checkout's package."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        executable=executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def nursery():
    with start_child(NURSERY) as process:
        yield process
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.fixture
def run_child(nursery, tmp_path_factory):
    """Runs code in a process of its own, in which more was imported than it needs."""

    def run(code, *args, returncode=0):
        log = tmp_path_factory.mktemp("child") / "log"
        task = [HEADER + textwrap.dedent(code), *map(str, [log, *args])]
        print(json.dumps(task), file=nursery.stdin, flush=True)
        ended = nursery.stdout.readline()
        assert ended == f"{returncode}\n", ended + log.read_text()
        return log.read_text()

    return run


@OUTS
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "second"])
def test_a_process_killed_while_it_writes_leaves_no_half_output(
    out, earlier, x, tmp_path, run_child
):
    path = tmp_path / out
    if earlier:
        write_anew(path, -x)
    code = """
        import signal
        sink = open_sink(path, specs)
        sink.write(0, [x[:3]])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_child(code, path, returncode=-signal.SIGKILL)
    if earlier:
        np.testing.assert_array_equal(read_back(path)["outputs"], -x)
    else:
        assert not path.exists()
        with pytest.raises(ValueError, match="saw an interrupted output"):
            jh.open_source(path)
    write_anew(path, x)
    np.testing.assert_array_equal(read_back(path)["outputs"], x)


@OUTS
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "second"])
def test_killed_at_any_moment_an_output_is_the_old_one_or_the_new_one(
    out, earlier, tmp_path, run_child
):
    """Forks a writer for every look at the file system it makes, and kills it right there."""
    report = run_child(
        """
        import collections, itertools, json, signal, warnings
        import jaxhandler as jh
        from tests.data.formats import read_back

        LOOKS = ("open", "os.", "shutil.")

        def write(path, array, kill_at):
            looks = itertools.count()

            def hook(event, args):
                if event.startswith(LOOKS) and next(looks) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sink = open_sink(path, specs)
            if kill_at is not None:
                sys.addaudithook(hook)
            sink.write(0, [array[:4]])
            sink.write(4, [array[4:]])
            sink.publish()

        def outcome(path):
            try:
                jh.open_source(path)
            except FileNotFoundError:
                return "none"
            except ValueError as error:
                if "interrupted output" in str(error):
                    return "refused"
                if "by its manifest" in str(error):
                    return "broken"
            rows = read_back(path)["outputs"]
            if rows.shape == x.shape and (rows == x).all():
                return "new"
            return "old" if rows.shape == x.shape and (rows == -x).all() else "broken"

        warnings.simplefilter("ignore")
        outcomes, clean = [], []
        for kill_at in itertools.count():
            here = path / str(kill_at)
            here.mkdir()
            target = here / sys.argv[2]
            if sys.argv[3] == "True":
                write(target, -x, None)
            pid = os.fork()
            if not pid:
                write(target, x, kill_at)
                os._exit(0)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            outcomes.append(outcome(target))
            write(target, x, None)
            left = {name for name in os.listdir(here) if not name.startswith(".")}
            clean.append(outcome(target) == "new" and len(left) <= 2 - target.is_dir())
            if not killed:
                break
        print(json.dumps([outcomes, clean]))
        """,
        tmp_path,
        out,
        earlier,
    )
    outcomes, clean = json.loads(report)
    before = "old" if earlier else "refused"
    assert set(outcomes) == {before, "new"}
    assert outcomes == sorted(outcomes, key=[before, "new"].index)
    assert len(outcomes) > 8  # It was killed that often.
    assert all(clean)


@NPY_OUTS
def test_an_output_whose_last_rename_is_missing_is_whole(out, x, tmp_path):
    path = tmp_path / out
    write_file(path, x)
    partial = files.partial_of(path)
    if not path.is_dir():
        files.manifest_of(path).rename(files.manifest_of(partial))
    path.rename(partial)
    np.testing.assert_array_equal(read(path), x)
    assert not partial.exists()
    assert files.read_manifest(files.manifest_of(path))["complete"] is True


@NPY_OUTS
def test_writing_again_where_the_last_rename_is_missing_first_ends_it(out, x, tmp_path):
    path = tmp_path / out
    write_file(path, x)
    partial = files.partial_of(path)
    if not path.is_dir():
        files.manifest_of(path).rename(files.manifest_of(partial))
    path.rename(partial)
    open_sink(path, specs_of(x)).abort()
    with pytest.warns(UserWarning, match="later run was interrupted"):
        np.testing.assert_array_equal(read(path), x)


@pytest.fixture
def full_disk(run_child):
    """Runs code that fails with an OSError, and tells which."""

    def run(code, path):
        header = "import errno\ndef attempt():\n" + textwrap.indent(textwrap.dedent(code), "    ")
        footer = """
try:
    attempt()
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("no error")
"""
        return run_child(header + footer, path).strip()

    return run


@RESERVED
def test_a_disk_without_room_is_an_error_before_any_work(out, tmp_path, full_disk):
    path = tmp_path / out
    code = full_disk(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        open_sink(path, jax.ShapeDtypeStruct((10_000, 8), np.float32))
        """,
        path,
    )
    assert code == "EFBIG"
    with pytest.raises(ValueError, match="saw an interrupted output"):
        jh.open_source(path)


@OUTS
def test_a_write_that_fails_is_an_error_and_leaves_the_output_absent(out, tmp_path, full_disk):
    path = tmp_path / out
    code = full_disk(
        """
        import resource, signal
        big = np.random.default_rng(0).random((10_000, 8), np.float32)
        sink = open_sink(path, jax.ShapeDtypeStruct(big.shape, big.dtype))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            sink.write(0, [big])
        finally:
            sink.abort()
        """,
        path,
    )
    assert code == "EFBIG"
    assert not path.exists()
    with pytest.raises(ValueError, match="saw an interrupted output"):
        jh.open_source(path)


@RESERVED
def test_a_small_disk_that_is_full_is_an_error_and_no_signal(out, tmp_path):
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    try:
        works = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs Linux")
    if works.returncode:
        pytest.skip("may mount nothing here")
    code = """
        import errno, subprocess
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path.parent]
        subprocess.run(mount, check=True)
        try:
            open_sink(path, jax.ShapeDtypeStruct((100_000, 8), np.float32))
        except OSError as error:
            print(errno.errorcode[error.errno])
        open_sink(path, specs).write(0, [x])
        print("room again")
    """
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec unshare -Urm "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    script = HEADER + textwrap.dedent(code)
    with start_child(script, tmp_path / out, executable=str(python)) as process:
        report, err = process.communicate(timeout=120)
    assert report.split() == ["ENOSPC", "room", "again"], err
    assert process.returncode == 0, err


@OUTS
def test_of_two_runs_with_one_output_only_the_later_goes_on(out, x, tmp_path):
    path = tmp_path / out
    earlier, later = FileSink(path, specs_of(x)), FileSink(path, specs_of(x))
    with pytest.raises(FileExistsError, match="saw another run that writes there, expected one"):
        earlier.write(0, [-x])
    earlier.abort()
    later.write(0, [x])
    later.publish()
    np.testing.assert_array_equal(read_back(path)["outputs"], x)


@pytest.mark.parametrize("out", ["out.npy", "out.zarr", "out"])
def test_a_run_whose_output_another_has_replaced_leaves_no_mark_there(out, x, tmp_path):
    path = tmp_path / out
    earlier = FileSink(path, specs_of(x))
    earlier.write(0, [-x])
    later = FileSink(path, specs_of(x))
    with pytest.raises(FileExistsError, match="saw another run that writes there"):
        earlier.mark()
    earlier.abort()
    later.write(0, [x])
    later.publish()
    np.testing.assert_array_equal(read_back(path)["outputs"], x)


@OUTS
def test_a_run_whose_output_another_has_replaced_does_not_appear(out, x, tmp_path):
    path = tmp_path / out
    earlier = FileSink(path, specs_of(x))
    earlier.write(0, [-x])
    later = FileSink(path, specs_of(x))
    later.write(0, [x])
    with pytest.raises(FileExistsError, match="saw another run that writes there"):
        earlier.publish()
    earlier.abort()
    later.publish()
    np.testing.assert_array_equal(read_back(path)["outputs"], x)


def test_rows_that_are_missing_or_too_many_never_make_a_complete_output(tmp_path):
    specs = jax.ShapeDtypeStruct((5, 2), np.float32)
    short = open_sink(tmp_path / "short.npy", specs)
    short.write(0, [np.zeros((3, 2), np.float32)])
    with pytest.raises(ValueError, match=r"short.npy: saw 3 rows written, expected 5"):
        short.finish()
    short.abort()
    long = open_sink(tmp_path / "long.npy", specs)
    with pytest.raises(ValueError, match=r"long.npy: saw 6 rows written, expected 5"):
        long.write(0, [np.zeros((6, 2), np.float32)])
    long.abort()
    assert not (tmp_path / "short.npy").exists()
