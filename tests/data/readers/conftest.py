"""What holds for every test of a reader: it compiles nothing and takes less than a second."""

import time
from collections.abc import Iterator

import pytest

SECONDS = 1.0


@pytest.fixture(autouse=True)
def _compiles_nothing_and_is_quick(compiles_nothing: None) -> Iterator[None]:
    start = time.process_time()  # Of this process only: others may be at work.
    yield
    assert time.process_time() - start < SECONDS
