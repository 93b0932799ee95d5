"""How many executables XLA compiles while a test looks."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import pytest


@pytest.fixture
def compiles() -> Callable[[], contextlib.AbstractContextManager[Callable[[], int]]]:
    @contextlib.contextmanager
    def counted() -> Iterator[Callable[[], int]]:
        events: list[str] = []

        def listen(event: str, duration: float, **kwargs: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                events.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield lambda: len(events)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counted
