"""A station with one worker before the fake upstream, for loads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loadkit import KEY
from station import Station

_CONFIG = """
[channels.fake]
type = "station"
base_url = "{url}"
keys = ["up-secret-fake"]
models = ["*"]
[[keys]]
key = "{key}"
account = "load"
rpm = 100000000
"""


@pytest.fixture(scope="session")
def loaded(fake_upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """Serve through one worker; every model goes to the fake upstream."""
    with Station(tmp_path_factory.mktemp("loaded"), _CONFIG.format(url=fake_upstream, key=KEY)) as one:
        yield one
