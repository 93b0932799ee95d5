"""The command line, called as a function, and once as a process."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.inference.artifact import PARAMS
from jaxhandler.inference.cli import main

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """An artifact of `{"x": [3]} -> [2]` that has seen requests of 2 and 5 rows."""
    infer = jh.memoizing_inferer(
        lambda w, inputs: inputs["x"] @ w,
        X[:3, :2],
        {"x": X[:1]},
        policy=jh.policies.powers_of_two(8),
    )
    for rows in (2, 5, 5):
        infer({"x": X[:rows]})
    infer.save(tmp_path / "model")
    return str(tmp_path / "model")


def test_describe_prints_what_the_artifact_is(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", model]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["inputs"] == "x: float32[rows, 3]"
    assert lines["outputs"] == "float32[rows, 2]"
    assert lines["parameters"] == "6 in 1 arrays"
    assert lines["policy"] == "powers_of_two(largest=8), any number of plans"
    assert lines["sizes"] == "seen  2 (1), 5 (2)"
    assert lines["platforms"] == "cpu, cuda, tpu"


def test_describe_prints_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"] == {"2": 1, "5": 2}


def test_describe_finds_a_damaged_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(model) / PARAMS).write_bytes(b"")
    assert main(["describe", model]) == 1
    found = capsys.readouterr()
    assert not found.out
    assert f"{PARAMS}: saw 0 bytes where the manifest says" in found.err


def test_run_writes_the_predictions_for_a_folder_of_columns(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").mkdir()
    np.save(tmp_path / "rows" / "x.npy", X)
    np.save(tmp_path / "rows" / "label.npy", np.arange(10, dtype=np.int32))
    sizes = ["--batch-size", "3", "--macrobatch-size", "6", "--quiet"]
    assert main(["run", model, str(tmp_path / "rows"), str(tmp_path / "y.npy"), *sizes]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), X @ X[:3, :2], rtol=1e-5)
    found = capsys.readouterr()
    assert not found.out
    assert not found.err


def test_run_draws_a_bar(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "rows.npz", x=X, y=X)
    assert main(["run", model, str(tmp_path / "rows.npz"), str(tmp_path / "y.npy")]) == 0
    found = capsys.readouterr()
    assert "10/10 rows" in found.out + found.err


def test_run_refuses_rows_that_the_model_does_not_take(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "rows.npz", x=X[:, :2], y=X)
    assert main(["run", model, str(tmp_path / "rows.npz"), str(tmp_path / "y.npy")]) == 1
    assert capsys.readouterr().err == (
        f"jaxhandler run: {tmp_path / 'rows.npz'}: inputs['x']: saw shape [10, 2], "
        "expected [rows, 3].\n"
    )
    assert not (tmp_path / "y.npy").exists()


def test_run_refuses_to_replace_its_source(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "same.npy").symlink_to(tmp_path / "x.npy")
    assert main(["run", model, str(tmp_path / "x.npy"), str(tmp_path / "same.npy")]) == 1
    assert "same.npy: saw the source, expected a sink." in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), X)


@pytest.fixture
def ensemble(tmp_path: Path) -> str:
    """An artifact of three members, `[rows, 3] -> {"y": [3, rows, 3], "top": [3, rows]}`."""
    scales = np.arange(1, 4, dtype=np.float32)

    def apply_fn(scales: Any, x: Any) -> Any:
        y = scales[:, None, None] * x
        return {"y": y, "top": y.max(axis=2)}

    infer = jh.memoizing_inferer(apply_fn, scales, X[:1], row_axis=(0, 1))
    infer.save(tmp_path / "ensemble")
    return str(tmp_path / "ensemble")


@pytest.mark.parametrize("num_rows", [3, 10], ids=["as many rows as members", "more rows"])
@pytest.mark.parametrize("batch_size", [2, 3], ids=["smaller batches", "a batch of as many"])
def test_run_writes_an_ensembles_outputs_with_rows_first(
    ensemble: str, tmp_path: Path, num_rows: int, batch_size: int
) -> None:
    np.save(tmp_path / "x.npy", X[:num_rows])
    sizes = ["--batch-size", str(batch_size), "--macrobatch-size", "6", "--quiet"]
    assert main(["run", ensemble, str(tmp_path / "x.npy"), str(tmp_path / "out"), *sizes]) == 0
    expected = X[:num_rows, None] * np.arange(1, 4, dtype=np.float32)[:, None]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "y.npy"), expected)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "top.npy"), expected.max(axis=2))


@pytest.mark.parametrize("num_rows", [2, 10], ids=["as many rows as members", "more rows"])
def test_run_gives_a_model_its_rows_on_the_axis_where_it_has_them(
    num_rows: int, tmp_path: Path
) -> None:
    """Two members, each with rows of its own; in files rows come first."""
    scales = np.float32([1, 2])
    infer = jh.memoizing_inferer(
        lambda scales, x: (scales[:, None, None] * x).sum(axis=2),
        scales,
        np.zeros((2, 1, 3), np.float32),
        row_axis=1,
    )
    infer.save(tmp_path / "members")
    rows = np.arange(num_rows * 6, dtype=np.float32).reshape(num_rows, 2, 3)
    np.save(tmp_path / "x.npy", rows)
    paths = [str(tmp_path / name) for name in ("members", "x.npy", "y.npy")]
    assert main(["run", *paths, "--batch-size", "2", "--quiet"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), scales * rows.sum(axis=2))


def test_run_refuses_rows_of_another_shape_wherever_the_model_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = np.zeros((2, 1, 3), np.float32)
    infer = jh.memoizing_inferer(lambda _, x: 2 * x, (), example, row_axis=1)
    infer.save(tmp_path / "members")
    np.save(tmp_path / "x.npy", np.zeros((10, 1, 3), np.float32))
    paths = [str(tmp_path / name) for name in ("members", "x.npy", "y.npy")]
    assert main(["run", *paths]) == 1
    assert "saw shape [1, 10, 3], expected [2, rows, 3]" in capsys.readouterr().err
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "MemoryError"), (RuntimeError("no device"), "no device")],
)
def test_what_the_machine_cannot_do_is_one_line_too(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("jaxhandler.inference.cli.load_inferer", fails)
    assert main(["run", model, "x.npy", "y.npy"]) == 1
    assert capsys.readouterr().err == f"jaxhandler run: {said}\n"


def test_run_keeps_plans_where_it_is_told(model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=X, y=X)
    folder = tmp_path / "plans"
    arguments = [str(tmp_path / "rows.npz"), str(tmp_path / "y.npy"), "--quiet"]
    try:
        assert main(["run", model, *arguments, "--plan-store", str(folder)]) == 0
    finally:
        jh.enable_plan_store(None)
    assert [path for path in folder.rglob("*") if path.is_file()]


def test_benchmark_prints_a_table_and_buckets_for_the_sizes_seen(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "speed.png"
    arguments = ["--sizes", "1,4", "--rounds", "2", "--max-plans", "1", "--plot", str(plot)]
    assert main(["benchmark", model, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["1", "4"]
    assert all(float(cell.replace(",", "")) >= 0 for line in lines[1:3] for cell in line.split())
    assert "for the sizes seen: jh.policies.buckets((5,))" in lines
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "said"), [("speed.txt", "'.*speed.txt', expected one of .*.png"),
                                           ("no/speed.png", "no folder '.*no'")])  # fmt: skip
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_timed(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert main(["benchmark", model, "--plot", str(tmp_path / name)]) == 1
    found = capsys.readouterr()
    assert not found.out
    assert re.search(f"--plot: saw {said}", found.err)


def test_version_tells_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert f"jax {jax.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [["benchmark", "model", "--sizes", "1,many"], ["benchmark", "model", "--rounds", "many"],
     ["run", "m", "x", "y", "--macrobatch-size", "many"],
     ["run", "m", "x", "y", "--batch-size", "many"]],
)  # fmt: skip
def test_a_number_that_is_none_is_named_as_it_was_written(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    said = f"argument {argv[-2]}: 'many' is no whole number of at least 1"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["serve"], ["run", "m", "x", "y", "--batch-size", "0"],
     ["benchmark", "model", "--sizes", "0"], ["run", "model"],
     ["benchmark", "model", "--rounds", "many"], ["run", "m", "x", "y", "--macrobatch-size", "-1"]],
)  # fmt: skip
def test_arguments_that_make_no_sense_exit_with_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: python -m jaxhandler" in capsys.readouterr().err


def test_as_a_process_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxhandler", "describe", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.splitlines() == [
        f"jaxhandler describe: {tmp_path / 'nowhere'}: saw nothing there, expected an artifact. "
        "Write it with infer.save."
    ]
