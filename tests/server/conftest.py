"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serverkit import Bench

from nbgate.server.listener import Settings


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Make benches; each must be without leaks when the test is over."""
    made: list[Bench] = []

    def make(app: Any, **settings: Any) -> Bench:
        made.append(Bench(app, Settings(**({"tick_s": 3600.0} | settings))))
        return made[-1]

    yield make
    for one in made:
        one.close()
