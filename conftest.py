"""What holds for every test and doctest: strict settings, and no thread left alive.

It stands at the root because a conftest holds only for what lies below its folder.
"""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Threads of asyncio's and Zarr's pools, which live as long as the process.
LIBRARY_THREADS = ("asyncio_", "zarr_io")
SECONDS_TO_END = 5.0

os.environ.setdefault("MPLBACKEND", "Agg")

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "jaxhandler", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("jaxhandler")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> None:
    """Keeps what is alive out of later collections, of which tests of memory ask for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Fails a test that leaves a thread of Python's alive, after a moment for it to end."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + SECONDS_TO_END
    while left := _threads_since(before):
        if time.monotonic() > deadline:
            names = ", ".join(repr(thread.name) for thread in left)
            pytest.fail(f"threads left alive: {names}", pytrace=False)
        left[0].join(0.05)


def _threads_since(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before
        and not isinstance(thread, threading._DummyThread)  # XLA's own, seen from a callback
        and not thread.name.startswith(LIBRARY_THREADS)
    ]


@pytest.fixture(autouse=True)
def _own_folder_for_examples(request: pytest.FixtureRequest) -> None:
    """Runs each doctest in an empty folder, so that it may read and write short paths."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(folder)
