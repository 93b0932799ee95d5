"""Profiles of chosen macrobatches: real traces, ended whatever happens."""

import gzip
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh

DATA = np.ones((10, 3), np.float32)


def run(profile, *, hooks=("on_macrobatch_start", "on_macrobatch_finish"), fail=False):
    def finish(progress):
        if "on_macrobatch_finish" in hooks:
            profile(progress)
        if fail and progress.macrobatch == 2:
            raise RuntimeError("stopped by the test")

    start = profile if "on_macrobatch_start" in hooks else None
    total = jh.handler(lambda carry, x: (carry + x.sum(), x), batch_size=2, outputs=None)
    with profile:
        return total.handle_from_host(
            jnp.zeros(()),
            DATA,
            macrobatch_size=2,
            on_macrobatch_start=start,
            on_macrobatch_finish=finish,
        )


# In a process of its own: once it failed at the end of a long run of tests, and never alone.
TRACED = """
import sys
import jax.numpy as jnp, numpy as np
import jaxhandler as jh
profile = jh.callbacks.Profile(sys.argv[1], first=2, num_macrobatches=2, perfetto=True)
total = jh.handler(lambda carry, x: (carry + x.sum(), x), batch_size=2, outputs=None)
hooks = {"on_macrobatch_start": profile, "on_macrobatch_finish": profile}
with profile:
    total.handle_from_host(
        jnp.zeros(()), np.ones((10, 3), np.float32), macrobatch_size=2, **hooks
    )
assert profile.profiled == 2
"""


def test_a_trace_of_the_chosen_macrobatches_names_the_stages(tmp_path):
    subprocess.run([sys.executable, "-c", TRACED, str(tmp_path)], check=True, timeout=120)
    assert list(tmp_path.rglob("*.xplane.pb"))
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("jaxhandler_macrobatch") for name in names) == 2
    assert "jaxhandler_read" in names
    assert "jaxhandler_write" in names


def test_a_run_shorter_than_the_profile_ends_it(tmp_path):
    profile = jh.callbacks.Profile(tmp_path, first=4, num_macrobatches=10)
    run(profile)
    assert profile.profiled == 2
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_an_error_in_the_run_ends_the_trace_and_comes_out(tmp_path):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run(jh.callbacks.Profile(tmp_path / "first", first=1), fail=True)
    with jax.profiler.trace(tmp_path / "second"):
        pass
    assert list((tmp_path / "first").rglob("*.xplane.pb"))


def test_a_profile_that_saw_nothing_warns(tmp_path):
    with pytest.warns(UserWarning, match="profile: saw a run of 5 macrobatches, expected macrob"):
        run(jh.callbacks.Profile(tmp_path, first=6))
    with pytest.warns(UserWarning, match="Pass it as on_macrobatch_start and on_macrobatch_fin"):
        run(jh.callbacks.Profile(tmp_path), hooks=("on_macrobatch_finish",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["first", "num_macrobatches"])
def test_numbers_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: saw 0"):
        jh.callbacks.Profile(tmp_path, **{name: 0})
