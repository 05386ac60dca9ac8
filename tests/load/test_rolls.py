"""Workers replaced, killed and reloaded while five hundred streams run: nobody is refused, and who may lose what."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from loadkit import KEY, quantile, request
from station import ROOT, Station, until
from traffic import Link, Traffic, client_ports, raise_fd_limit, run

ROLLS = KILLS = 20
RELOADS = 100
CONFIG = """
[channels.fake]
type = "station"
base_url = "{url}"
keys = ["up-secret-fake"]
models = ["paced-*", "json-*"]
weight = {weight}
{more}
[[keys]]
key = "{key}"
account = "load"
rpm = {rpm}
"""
MORE = """
[channels.more]
type = "station"
base_url = "{url}"
keys = ["up-secret-more"]
models = ["paced-*", "json-*", "extra"]
"""


def text(url: str, weight: int = 1, more: str = "", rpm: int = 100_000_000) -> str:
    return CONFIG.format(url=url, weight=weight, more=MORE.format(url=more) if more else "", rpm=rpm, key=KEY)


@pytest.fixture
def station(fake_upstream: str, tmp_path: Path) -> Iterator[Station]:
    """Serve with two workers that drain as long as a stream may take."""
    raise_fd_limit(8000)
    with Station(tmp_path, text(fake_upstream), workers=2, drain_s=20) as one:
        yield one


@pytest.fixture
def second_upstream() -> Iterator[str]:
    """Another upstream, at an address of its own."""
    argv = [sys.executable, str(ROOT / "bench" / "upstream.py"), "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().split()[1]}"
        process.terminate()


async def eventually(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Poll in the loop of the traffic, until the condition holds."""
    async with asyncio.timeout(within_s):
        while not (found := condition()):
            await asyncio.sleep(0.02)
    assert found, what
    return found


def logged(station: Station, traffic: Traffic) -> Counter[str]:
    """Count the outcomes in the access log, once it holds all that the clients saw whole."""

    def outcomes() -> Counter[str]:
        lines = [orjson.loads(line) for line in station.access.read_bytes().splitlines()]
        return Counter(f"{line['status']} {line['outcome']}" for line in lines)

    wanted = 1 + sum(traffic.done.values())  # and the one that told what to expect
    until(lambda: outcomes()["200 complete"] >= wanted, 5, f"the log of {wanted} calls")
    return outcomes()


# SIGUSR2


async def rolls(station: Station) -> tuple[Traffic, list[float], int]:
    """Roll again and again; give the traffic, the time of each roll, the most processes of one slot."""
    crowd = 0
    times = []

    def rolled(count: int) -> bool:
        nonlocal crowd
        crowd = max(crowd, *Counter(slot for slot, _ in station.workers()).values())
        return station.err.read_text().count("is now pid") >= count

    async with Traffic(station.port) as traffic:
        for number in range(1, ROLLS + 1):
            began = time.monotonic()
            station.process.send_signal(signal.SIGUSR2)
            await eventually(lambda: rolled(2 * number), 30, f"roll {number}")  # noqa: B023
            times.append(time.monotonic() - began)
    return traffic, times, crowd


@pytest.mark.long
def test_twenty_rolls_under_load_cut_nothing(station: Station) -> None:
    first = {pid for _, pid in station.workers()}
    traffic, times, crowd = run(rolls(station), 240)
    last = {pid for _, pid in station.workers()}
    until(lambda: len(station.workers()) == 2, 10, "the end of the last drain")
    print(f"\n{ROLLS} rolls of two workers: {traffic.says()}")
    print(f"  a roll took {quantile(times, 0.5):.1f} s (max {max(times):.1f}); at most {crowd} processes of a slot")
    assert not traffic.failures, (len(traffic.failures), Counter(f"{f.kind}: {f.why}" for f in traffic.failures))
    assert traffic.most >= 500
    assert crowd == 2
    assert not first & last
    found = logged(station, traffic)
    assert found == {"200 complete": 1 + sum(traffic.done.values())}, found
