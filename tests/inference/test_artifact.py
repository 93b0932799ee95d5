"""Saving an inferer, and loading it where its code is not."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxhandler as jh
from jaxhandler.files import partial_of, replaced_of, write_manifest
from jaxhandler.inference import exporting
from jaxhandler.inference.artifact import MODEL, PARAMS, describe

Change = Callable[[dict[str, Any]], object]
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


IMAGES = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
KERNEL = IMAGES[:2, :, :3, :3].copy()


def convolve(kernel: Any, images: Any) -> Any:
    return jax.lax.conv(images, kernel, (1, 1), "SAME")


def dense(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


def an_inferer(scale: float = 1.0, **options: Any) -> jh.MemoizingInferer:
    params = {"w": scale * X[:3, :2], "b": np.zeros(2, np.float32)}
    return jh.memoizing_inferer(dense, params, X[:1], **options)


def rewrite(folder: Path, change: Change) -> None:
    """Changes a manifest and its digest, as somebody who knows the format would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    write_manifest(path, manifest)


def test_a_loaded_inferer_computes_the_same_for_any_number_of_rows(tmp_path: Path) -> None:
    infer = an_inferer()
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    for rows in (0, 1, 5):
        np.testing.assert_allclose(loaded(X[:rows]), infer(X[:rows]), rtol=1e-6)
    assert loaded.input_specs == infer.input_specs
    assert loaded.output_specs == infer.output_specs


@pytest.mark.parametrize(("platform", "natively"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_convolutions_are_fast_on_cpus_and_as_written_elsewhere(
    monkeypatch: pytest.MonkeyPatch, platform: str, natively: bool
) -> None:
    monkeypatch.setattr(exporting, "_PLATFORMS", (platform,))
    infer = jh.memoizing_inferer(convolve, KERNEL, IMAGES)
    text = exporting.exported_model(infer.engine, infer.params).mlir_module()
    assert ("stablehlo.convolution" in text) == natively


LAYOUT = ("NHWC", "HWIO", "NHWC")


def layered(kernel: Any, images: Any) -> Any:
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def sensitivity(kernel: Any, images: Any) -> Any:
    # The gradient by the kernel, which nobody uses, has the rows for its channels.
    return jax.grad(lambda *args: jnp.tanh(layered(*args)).sum(), (0, 1))(kernel, images)[1]


def rows_as_lines(kernel: Any, rows: Any) -> Any:
    image = layered(kernel, rows[None, :, :, None])
    window = (1, 2, 2, 1)
    pooled = jax.lax.reduce_window(image, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "SAME")
    return image[0] + pooled[0]


@pytest.mark.parametrize(
    ("model", "kernel_shape", "shape"),
    [
        (sensitivity, (3, 3, 1, 4), (4, 8, 8, 1)),
        (rows_as_lines, (1, 3, 1, 4), (4, 9)),
        (rows_as_lines, (1, 3, 1, 16), (4, 9)),
    ],
    ids=["gradients", "few channels", "channels"],
)
def test_rows_may_stand_anywhere_in_a_convolution(
    tmp_path: Path, model: Any, kernel_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    numbers = np.random.default_rng(0)
    kernel, rows = (numbers.normal(size=each).astype("float32") for each in (kernel_shape, shape))
    jh.memoizing_inferer(model, kernel, rows).save(tmp_path / "model")
    found = jh.load_inferer(tmp_path / "model")(rows)
    np.testing.assert_allclose(found, model(kernel, rows), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_hash_is_saved(tmp_path: Path) -> None:
    @dataclass
    class Net:
        scale: float

        def __call__(self, kernel: Any, images: Any) -> Any:
            return self.scale * convolve(kernel, images)

    infer = jh.memoizing_inferer(Net(2.0), KERNEL, IMAGES)
    infer.save(tmp_path / "model")
    found = jh.load_inferer(tmp_path / "model")(IMAGES)
    np.testing.assert_allclose(found, infer(IMAGES), rtol=1e-5, atol=1e-5)


def test_an_artifact_for_all_platforms_computes_what_the_inferer_computes(tmp_path: Path) -> None:
    infer = jh.memoizing_inferer(convolve, KERNEL, IMAGES)
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    np.testing.assert_allclose(loaded(IMAGES), infer(IMAGES), rtol=1e-5, atol=1e-5)
    assert " convolution(" not in loaded.engine.plan(len(IMAGES)).as_text()


def test_trees_come_back_with_their_empty_parts(tmp_path: Path) -> None:
    params = [(X[:3, :2], np.ones(2, np.float32)), (), {"scale": np.float32(2), "none": None}]
    example = {"obs": (X, [X])}

    def model(params: Any, inputs: Any) -> Any:
        first, (second,) = inputs["obs"]
        return {"y": [first @ params[0][0] + params[0][1], ()], "z": second * params[2]["scale"]}

    infer = jh.memoizing_inferer(model, params, example)
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    assert jax.tree.structure(loaded(example)) == jax.tree.structure(infer(example))
    jax.tree.map(np.testing.assert_allclose, loaded(example), infer(example))
    doubled = loaded.with_params(jax.tree.map(lambda leaf: 2 * leaf, params))
    np.testing.assert_allclose(doubled(example)["z"], 4 * X, rtol=1e-6)


def test_fields_of_other_nodes_become_dicts_and_keep_their_places(tmp_path: Path) -> None:
    class Pair(NamedTuple):
        second: Any
        first: Any

    def model(params: Pair, inputs: Pair) -> Pair:
        return Pair(inputs.second * params.second, inputs.first * params.first)

    infer = jh.memoizing_inferer(model, Pair(np.float32(2), np.float32(3)), Pair(X, X + 1))
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    assert {name: float(leaf) for name, leaf in loaded.params.items()} == {"second": 2, "first": 3}
    found = loaded({"second": X, "first": X + 1})
    np.testing.assert_allclose(found["second"], 2 * X)
    np.testing.assert_allclose(found["first"], 3 * (X + 1))


def test_random_keys_are_stored_as_numbers(tmp_path: Path) -> None:
    def model(params: Any, x: Any) -> Any:
        return x + jax.random.normal(params["key"], x.shape[1:])

    infer = jh.memoizing_inferer(model, {"key": jax.random.key(3)}, X)
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    assert loaded.params["key"].dtype == np.uint32
    np.testing.assert_array_equal(loaded(X), infer(X))


def test_low_precision_and_weak_types_compute_as_before(tmp_path: Path) -> None:
    infer = jh.memoizing_inferer(
        lambda params, x: x * params["weak"] + params["b"],
        {"weak": 2.0, "b": jnp.ones(3, jnp.bfloat16)},
        X.astype(jnp.bfloat16),
    )
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    assert loaded.params["b"].dtype == jnp.bfloat16
    found = loaded(X.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, infer(X.astype(jnp.bfloat16)))


def test_other_libraries_read_the_parameters(tmp_path: Path) -> None:
    an_inferer().save(tmp_path / "model")
    found = safetensors.numpy.load_file(tmp_path / "model" / PARAMS)
    np.testing.assert_array_equal(found["w"], X[:3, :2])


def test_settings_come_back(tmp_path: Path) -> None:
    infer = an_inferer(
        policy=jh.policies.multiples(4, 16), max_plans=3, background=True, freeze=True
    )
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    assert loaded.policy.spec == infer.policy.spec
    engine = loaded.engine
    assert (engine.max_plans, engine.background, engine.frozen is not None) == (3, True, True)


def test_settings_can_be_replaced(tmp_path: Path) -> None:
    an_inferer(freeze=True, background=True, max_plans=1).save(tmp_path / "model")
    loaded = jh.load_inferer(
        tmp_path / "model",
        policy=jh.policies.single(),
        max_plans=2,
        background=False,
        freeze=False,
    )
    assert loaded.policy.spec["name"] == "single"
    engine = loaded.engine
    assert (engine.max_plans, engine.background, engine.frozen) == (2, False, None)


def test_observed_sizes_can_be_preloaded(tmp_path: Path) -> None:
    infer = an_inferer()
    for rows in (2, 2, 5, 0):
        infer(X[:rows])
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model", preload="observed")
    assert loaded.stats().compiles == 2
    loaded.seal()
    assert len(loaded(X[:5])) == 5


def test_an_unknown_preload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preload: saw 'all'"):
        jh.load_inferer(tmp_path, preload="all")


def test_a_learned_policy_goes_on_where_it_was(tmp_path: Path) -> None:
    learned = jh.policies.from_spec({"name": "adaptive", "max_plans": 4, "sizes": [3, 8]})
    an_inferer(policy=learned).save(tmp_path / "model")
    assert jh.load_inferer(tmp_path / "model").policy.sizes == (3, 8)


def test_an_ensemble_is_saved_with_its_row_axes(tmp_path: Path) -> None:
    params = {"w": X[:4, None] * np.ones((1, 2, 1), np.float32)}

    def model(params: Any, x: Any) -> Any:
        return jnp.einsum("bi,eji->ebj", x, params["w"])

    infer = jh.memoizing_inferer(model, params, X, row_axis=(0, 1))
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    assert loaded(X[:5]).shape == (4, 5, 2)
    np.testing.assert_allclose(loaded(X[:5]), infer(X[:5]), rtol=1e-6)


def test_a_calculator_runs_the_loaded_model(tmp_path: Path) -> None:
    infer = an_inferer()
    infer.save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    calc = jh.calculator(loaded.apply_fn, batch_size=3)
    found = calc.calc_from_host(loaded.params, X, macrobatch_size=6)
    np.testing.assert_allclose(found, infer(X), rtol=1e-6)


def test_a_loaded_inferer_can_be_saved_again(tmp_path: Path) -> None:
    infer = an_inferer()
    infer.save(tmp_path / "first")
    jh.load_inferer(tmp_path / "first").save(tmp_path / "second")
    np.testing.assert_allclose(jh.load_inferer(tmp_path / "second")(X), infer(X), rtol=1e-6)


def test_a_model_is_exported_for_all_platforms(tmp_path: Path) -> None:
    an_inferer().save(tmp_path / "model")
    assert describe(tmp_path / "model")["platforms"] == ["cpu", "cuda", "tpu"]


def test_a_model_that_one_platform_lacks_is_exported_for_the_others(tmp_path: Path) -> None:
    def model(params: Any, x: Any) -> Any:
        return x + jnp.real(jax.lax.linalg.schur(params)[0]).sum()

    infer = jh.memoizing_inferer(model, X[:3], X)
    infer.save(tmp_path / "model")
    assert describe(tmp_path / "model")["platforms"] == ["cpu"]
    np.testing.assert_allclose(jh.load_inferer(tmp_path / "model")(X), infer(X), rtol=1e-5)


def test_a_model_that_needs_to_know_the_rows_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    infer = jh.memoizing_inferer(lambda _, x: sum(x[i] for i in range(len(x))) + x, (), X)
    with pytest.raises(ValueError, match=r"infer: saw a model that it refuses .* Write it so that"):
        infer.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_artifact_is_replaced(tmp_path: Path) -> None:
    for scale in (1.0, 2.0):
        an_inferer(scale).save(tmp_path / "model")
    loaded = jh.load_inferer(tmp_path / "model")
    np.testing.assert_array_equal(loaded.params["w"], 2 * X[:3, :2])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="saw something else that lies there"):
        an_inferer().save(tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "plans/of_mine"])
def test_files_of_somebody_else_in_an_artifact_are_not_deleted(tmp_path: Path, name: str) -> None:
    an_inferer(1.0).save(tmp_path / "model")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name.split('/')[0]}: saw what is no part"):
        an_inferer(2.0).save(tmp_path / "model")
    assert (tmp_path / "model" / name).read_text() == "mine"
    np.testing.assert_array_equal(jh.load_inferer(tmp_path / "model").params["w"], X[:3, :2])


@pytest.mark.parametrize("name", [MODEL, PARAMS])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    an_inferer().save(tmp_path / "model")
    data = bytearray((tmp_path / "model" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: saw \d+ bytes of another SHA-256"):
        jh.load_inferer(tmp_path / "model")


@pytest.mark.parametrize("name", [MODEL, PARAMS])
@pytest.mark.parametrize("size", [10, 2**42], ids=["cut", "longer than memory"])
def test_a_file_of_another_size_is_refused_by_name(tmp_path: Path, name: str, size: int) -> None:
    an_inferer().save(tmp_path / "model")
    os.truncate(tmp_path / "model" / name, size)
    with pytest.raises(ValueError, match=rf"{name}: saw {size} bytes where the manifest says \d+"):
        jh.load_inferer(tmp_path / "model")


@pytest.mark.parametrize("name", [MODEL, PARAMS])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    an_inferer().save(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: saw no such file"):
        jh.load_inferer(tmp_path / "model")


@pytest.mark.parametrize(
    ("old", "new"), [('"freeze": false', '"freeze": true'), ('"rows"', '"rowz"'), ("{", "{{")]
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, old: str, new: str) -> None:
    infer = an_inferer(policy=jh.policies.exact())
    infer.save(tmp_path / "model")
    path = tmp_path / "model" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace(old, new, 1) if old in text else text[:-20])
    with pytest.raises(ValueError, match=r"manifest\.json: saw"):
        jh.load_inferer(tmp_path / "model")


CHANGES: dict[str, Change] = {
    "newer": lambda manifest: manifest.update(layout=2),
    "no layout": lambda manifest: manifest.pop("layout"),
    "outside": lambda manifest: manifest["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
    "another file": lambda manifest: manifest["files"].update({"x": {"bytes": 1, "sha256": ""}}),
    "files": lambda manifest: manifest.update(files=[]),
    "settings": lambda manifest: manifest.update(settings=None),
    "policy": lambda manifest: manifest["settings"].update(policy={"name": "system"}),
    "buckets": lambda manifest: manifest["settings"].update(
        policy={"name": "adaptive", "max_plans": 3, "sizes": [0]}
    ),
    "tree": lambda manifest: manifest["settings"]["params"].update(tree={"code": []}),
    "leaves": lambda manifest: manifest["settings"]["params"]["leaves"].pop(),
    "shape": lambda manifest: manifest["settings"]["inputs"]["leaves"][0].update(shape=[-1]),
    "dtype": lambda manifest: manifest["settings"]["params"]["leaves"][0].update(dtype="linalg"),
    "axis": lambda manifest: manifest["settings"].update(row_axis=0),
    "object dtype": lambda manifest: manifest["settings"]["inputs"]["leaves"][0].update(dtype="O"),
}
SETTINGS: dict[str, list[Any]] = {
    "background": ["no", 1, None],
    "freeze": [3, None],
    "max_plans": ["x", 0, True],
    "platforms": ["cpu", [1], {}],
    "row_axis": [[0], [0, "1"], [0, -1], [0, 1, 2]],
    "sizes": [[1], {"a": 1}, {"-3": 1}, {"3": "x"}, {"3": True}],
    "versions": [None, {"jax": 1}],
    "policy": [[1], None],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_missing_or_of_another_type_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "model"
    an_inferer().save(path)
    whole = (path / "manifest.json").read_bytes()
    changes: list[Change] = [lambda manifest: manifest["settings"].pop(name)]
    for value in SETTINGS[name]:
        changes.append(lambda manifest, value=value: manifest["settings"].update({name: value}))
    for change in changes:
        (path / "manifest.json").write_bytes(whole)
        rewrite(path, change)
        # Also for `python -m jaxhandler describe`.
        for look in (jh.load_inferer, describe):
            with pytest.raises(
                ValueError, match=rf"manifest\.json: saw settings .*{name}"
            ) as error:
                look(path)
            assert "Save the inferer again" in str(error.value)


def first_column(params: Any, x: Any) -> Any:
    return x[:, :1] * params["w"].sum() + params["b"].sum()


OTHER_MODELS = {
    "takes float32[3], expected float32[2]": (first_column, X[:1], 3),
    "takes float32[rows, 2], expected float32[rows, 3]": (first_column, X[:1, :2], 2),
    "takes bfloat16[rows, 3], expected float32[rows, 3]": (
        lambda params, x: dense(params, x.astype(jnp.float32)), X[:1].astype(jnp.bfloat16), 2
    ),
    "gives float32[rows, 1], expected float32[rows, 2]": (first_column, X[:1], 2),
    "gives float32[rows, 2], expected nothing more": (
        lambda params, x: [dense(params, x)] * 2, X[:1], 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", OTHER_MODELS)
def test_a_model_of_another_artifact_is_refused_by_name(tmp_path: Path, said: str) -> None:
    model, example, width = OTHER_MODELS[said]
    params = {"w": X[:3, :2], "b": np.zeros(width, np.float32)}
    jh.memoizing_inferer(model, params, example).save(tmp_path / "other")
    an_inferer().save(tmp_path / "model")
    shutil.copy(tmp_path / "other" / MODEL, tmp_path / "model" / MODEL)
    entry = describe(tmp_path / "other")["files"][MODEL]
    rewrite(tmp_path / "model", lambda manifest: manifest["files"].update({MODEL: entry}))
    with pytest.raises(ValueError, match=f"{MODEL}: saw a model that {re.escape(said)}"):
        jh.load_inferer(tmp_path / "model")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_makes_no_sense_is_refused_by_name(tmp_path: Path, change: Change) -> None:
    an_inferer().save(tmp_path / "model")
    rewrite(tmp_path / "model", change)
    with pytest.raises(ValueError, match=r"manifest\.json: saw"):
        jh.load_inferer(tmp_path / "model")


def test_a_model_of_another_kind_of_file_is_refused_by_name(tmp_path: Path) -> None:
    an_inferer().save(tmp_path / "model")
    (tmp_path / "model" / MODEL).write_bytes(b"junk")
    said = {"bytes": 4, "sha256": hashlib.sha256(b"junk").hexdigest()}
    rewrite(tmp_path / "model", lambda manifest: manifest["files"][MODEL].update(said))
    with pytest.raises(ValueError, match=f"{MODEL}: saw what jax .* cannot read"):
        jh.load_inferer(tmp_path / "model")


def test_a_model_for_other_platforms_is_refused(tmp_path: Path) -> None:
    an_inferer().save(tmp_path / "model")
    rewrite(tmp_path / "model", lambda manifest: manifest["settings"].update(platforms=["tpu"]))
    with pytest.raises(ValueError, match="saw the platform cpu, expected one that"):
        jh.load_inferer(tmp_path / "model")


def test_wide_parameters_need_wide_types(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        jh.memoizing_inferer(dense, {"w": np.ones((3, 2)), "b": np.ones(2)}, np.ones((1, 3))).save(
            tmp_path / "model"
        )
        found = jh.load_inferer(tmp_path / "model")(np.ones((4, 3)))
        assert found.dtype == np.float64
    with pytest.raises(TypeError, match="dtype float64, expected dtypes that JAX has now"):
        jh.load_inferer(tmp_path / "model")


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saw something else, expected an artifact"):
        jh.load_inferer(tmp_path)
    with pytest.raises(FileNotFoundError, match="saw nothing there"):
        jh.load_inferer(tmp_path / "nowhere")


def test_what_a_kill_leaves_is_the_old_artifact_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    an_inferer(1.0).save(path)
    # Killed while files were written: the old one.
    shutil.copytree(path, partial_of(path))
    (partial_of(path) / "manifest.json").unlink()
    np.testing.assert_array_equal(jh.load_inferer(path).params["w"], X[:3, :2])
    # Killed between the two renames of the folders: the new one.
    an_inferer(2.0).save(tmp_path / "new")
    shutil.rmtree(partial_of(path))
    os.rename(path, replaced_of(path))
    os.rename(tmp_path / "new", partial_of(path))
    np.testing.assert_array_equal(jh.load_inferer(path).params["w"], 2 * X[:3, :2])


SAVING = """
import sys, itertools, numpy as np, jaxhandler as jh
example = np.zeros((1, 3), np.float32)
inferers = [jh.memoizing_inferer(lambda w, x: x * w, s * np.ones(3, np.float32), example)
            for s in (1, 2)]
for infer in itertools.cycle(inferers):
    infer.save(sys.argv[1])
    print("saved", flush=True)
"""


def test_a_killed_save_leaves_a_whole_artifact(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVING, str(tmp_path / "model")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline() == b"saved\n"
        process.send_signal(signal.SIGKILL)
    loaded = jh.load_inferer(tmp_path / "model")
    assert loaded(X[:1, :3]).tolist() in (X[:1].tolist(), (2 * X[:1]).tolist())
