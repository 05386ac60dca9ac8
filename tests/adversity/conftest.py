"""One gateway for all attacks of a module; what it said and wrote is judged at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import LoopThread
from hostile import House


@pytest.fixture(scope="module")
def house(loop_thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Serve with planted secrets; none may appear anywhere when all tests are over."""
    one = House(loop_thread, tmp_path_factory.mktemp("house"))
    yield one
    one.stop()
