"""What holds for every test of a reader: it compiles nothing and takes less than a second."""

import time
from collections.abc import Iterator

import jax
import pytest

SECONDS = 1.0


@pytest.fixture(autouse=True)
def _compiles_nothing_and_is_quick() -> Iterator[None]:
    events: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.process_time()  # Of this process only: others may be at work.
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert time.process_time() - start < SECONDS
    assert [event for event in events if "compile" in event] == []
