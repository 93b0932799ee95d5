"""The plan store: what a process compiled, the next one does not."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxhandler as jh

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
COMPILED = "/jax/compilation_cache/cache_misses"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A plan store, in use."""
    folder = jh.enable_plan_store(tmp_path / "plans")
    assert folder is not None
    yield folder
    jh.enable_plan_store(None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An artifact."""
    infer = jh.memoizing_inferer(lambda w, x: {"y": x @ w, "x": x}, X[:3], X[:1])
    infer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def events() -> Iterator[list[str]]:
    """The names of what JAX reports meanwhile."""
    seen: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        seen.append(event)

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_listener(listen)
    jax.monitoring.unregister_event_duration_listener(listen)


def lowered(events: list[str]) -> int:
    """How many programs were compiled, or looked up in JAX's cache to be compiled."""
    return events.count("/jax/core/compile/backend_compile_duration")


RESTARTED = """
import sys, jax, numpy as np, jaxhandler as jh
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jh.enable_plan_store(sys.argv[1])
infer = jh.load_inferer(sys.argv[2])
x = np.arange(15, dtype=np.float32).reshape(5, 3)
total = sum(float(infer(x[:rows])["y"].sum()) for rows in (1, 2, 5))
looked_up = events.count("/jax/core/compile/backend_compile_duration")
for _ in range(40):
    infer(x)
infer.wait()
print(total, looked_up, events.count("/jax/compilation_cache/cache_misses"),
      events.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_process_that_starts_again_compiles_nothing(tmp_path: Path, model: Path) -> None:
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", RESTARTED, str(tmp_path / "plans"), str(model)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        total, *counts = done.stdout.split()
        found.append((float(total), *map(int, counts)))
    (first, compiled, misses, hits), (second, looked_up, misses_again, hits_again) = found
    assert (compiled, misses, hits) == (3, 3, 0)
    # The first results need no program at all; then one was loaded, from JAX's cache.
    assert (looked_up, misses_again, hits_again) == (0, 0, 1)
    assert first == second


def test_a_stored_plan_gives_what_the_plan_gave(store: Path, model: Path) -> None:
    found = [jh.load_inferer(model)(X) for _ in range(2)]
    assert len(list(store.glob("*.plan"))) == 1
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_stored_plan_takes_arrays_of_both_kinds(store: Path, model: Path) -> None:
    jh.load_inferer(model)(X)
    infer = jh.load_inferer(model)
    np.testing.assert_array_equal(infer(X)["x"], infer(jax.device_put(X))["x"])
    assert isinstance(infer(X, device=True)["y"], jax.Array)


def test_a_stored_plan_and_what_replaces_it_take_rows_from_other_devices(
    store: Path, model: Path
) -> None:
    expected = jh.load_inferer(model)(X)["y"]
    infer = jh.load_inferer(model)
    elsewhere = jax.device_put(X, jax.devices()[1])
    for _ in range(40):
        np.testing.assert_array_equal(infer(elsewhere)["y"], expected)
    infer.wait()
    for _ in range(2):
        np.testing.assert_array_equal(infer(elsewhere)["y"], expected)
    assert infer.stats().compiles == 1


def test_a_stored_plan_is_replaced_once_it_is_used_often(
    store: Path, model: Path, events: list[str]
) -> None:
    before = jh.load_inferer(model)(X)
    infer = jh.load_inferer(model)
    events.clear()
    for _ in range(31):
        infer(X)
    infer.wait()
    assert lowered(events) == 0
    for _ in range(5):
        infer(X)
    infer.wait()
    after = infer(X)
    assert lowered(events) == 1
    assert COMPILED not in events
    assert infer.stats().compiles == 1
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_threads_share_a_stored_plan_while_it_is_replaced(store: Path, model: Path) -> None:
    expected = jh.load_inferer(model)(X)["y"]
    infer, wrong = jh.load_inferer(model), []

    def work() -> None:
        for _ in range(60):
            if not np.array_equal(infer(X)["y"], expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    infer.wait()
    assert not wrong


def test_other_parameters_share_stored_plans(
    store: Path, model: Path, tmp_path: Path, events: list[str]
) -> None:
    infer = jh.load_inferer(model)
    infer(X)
    infer.with_params(2 * X[:3]).save(tmp_path / "other")
    events.clear()
    other = jh.load_inferer(tmp_path / "other")
    np.testing.assert_allclose(other(X)["y"], 2 * infer(X)["y"], rtol=1e-6)
    assert len(list(store.glob("*.plan"))) == 1


def test_frozen_parameters_are_part_of_a_stored_plan(
    store: Path, model: Path, tmp_path: Path
) -> None:
    infer = jh.load_inferer(model)
    infer.with_params(2 * X[:3]).save(tmp_path / "other")
    one = jh.load_inferer(model, freeze=True)(X)["y"]
    two = jh.load_inferer(tmp_path / "other", freeze=True)(X)["y"]
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    np.testing.assert_array_equal(jh.load_inferer(model, freeze=True)(X)["y"], one)
    assert len(list(store.glob("*.plan"))) == 2


def test_settings_of_jax_are_part_of_a_stored_plan(store: Path, model: Path) -> None:
    jh.load_inferer(model)(X)
    with jax.default_matmul_precision("bfloat16"):
        jh.load_inferer(model)(X)
    assert len(list(store.glob("*.plan"))) == 2


def test_parameters_on_another_device_are_compiled_for(
    store: Path, model: Path, events: list[str]
) -> None:
    infer = jh.load_inferer(model)
    expected = infer(X)["y"]
    device = jax.devices()[1]
    moved = jh.memoizing_inferer(infer.apply_fn, jax.device_put(infer.params, device), X[:1])
    moved.engine.compile_fn = infer.engine.compile_fn
    np.testing.assert_allclose(moved(X)["y"], expected, rtol=1e-6)
    assert moved(X, device=True)["y"].devices() == {device}
    assert len(list(store.glob("*.plan"))) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_stored_plan_that_is_damaged_is_compiled_again(
    store: Path, model: Path, damage: str
) -> None:
    import hashlib

    expected = jh.load_inferer(model)(X)["y"]
    (path,) = store.glob("*.plan")
    whole = path.read_bytes()
    junk = b"no executable"
    path.write_bytes(
        {
            "cut": whole[:-9],
            "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            "foreign": hashlib.sha256(junk).digest() + junk,
        }[damage]
    )
    np.testing.assert_array_equal(jh.load_inferer(model)(X)["y"], expected)
    content = path.read_bytes()
    assert hashlib.sha256(content[32:]).digest() == content[:32]
    assert len(content) > 1000


def test_a_model_in_code_is_not_compiled_again_either(store: Path, events: list[str]) -> None:
    counts = []
    for _ in range(2):
        infer = jh.memoizing_inferer(lambda w, x: x * w + 0.125, 3.0, X[:1])
        events.clear()
        infer(X)
        counts.append(events.count(COMPILED))
    assert counts == [1, 0]


def test_a_sealed_inferer_may_use_stored_plans_that_it_holds(store: Path, model: Path) -> None:
    jh.load_inferer(model)(X)
    infer = jh.load_inferer(model, preload=(8,))
    infer.seal()
    assert len(infer(X)["y"]) == 8
    with pytest.raises(jh.SealedError):
        infer(X[:2])


def test_turned_off_it_leaves_jax_as_it_was(tmp_path: Path, model: Path) -> None:
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = [getattr(jax.config, name) for name in names]
    folder = jh.enable_plan_store(tmp_path / "plans")
    assert folder is not None
    assert [getattr(jax.config, name) for name in names] == [str(folder / "xla"), 0.0, -1]
    assert jh.enable_plan_store(tmp_path / "others") != folder
    assert jh.enable_plan_store(None) is None
    assert [getattr(jax.config, name) for name in names] == before
    jh.load_inferer(model)(X)
    assert not list(tmp_path.rglob("*.plan"))


posix = pytest.mark.skipif(os.name != "posix", reason="folders have owners and permissions")


@posix
def test_the_folder_is_its_owners_alone(store: Path) -> None:
    for folder in (store, store.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("mode", [0o770, 0o722])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=r"plans: saw permissions drwx"):
        jh.enable_plan_store(folder)
    assert jax.config.jax_compilation_cache_dir is None


@posix
def test_a_folder_that_others_can_rename_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "all"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(PermissionError, match="all: saw a folder that everybody can write to"):
        jh.enable_plan_store(open_to_all / "plans")
    open_to_all.chmod(0o1777)
    assert jh.enable_plan_store(open_to_all / "plans") is not None
    jh.enable_plan_store(None)


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs to be root")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError, match="saw a folder of user 12345"):
        jh.enable_plan_store(folder)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: saw a file, expected a folder"):
        jh.enable_plan_store(tmp_path / "file")
