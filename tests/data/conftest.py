"""What holds wherever something is refused: nothing was compiled for it."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def compiles_nothing() -> Iterator[None]:
    """Fails a test in which anything was compiled."""
    events: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [event for event in events if "compile" in event] == []
