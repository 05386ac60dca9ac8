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

from nbgate.logs import BATCH

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


async def eventually(condition: Callable[[], Any], within_s: float, what: str) -> None:
    """Poll in the loop of the traffic, until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {within_s} s"
        await asyncio.sleep(0.02)


def logged(station: Station, wanted: int) -> Counter[str]:
    """Count the outcomes in the access log, once it holds so many whole calls."""

    def outcomes() -> Counter[str]:
        lines = [orjson.loads(line) for line in station.access.read_bytes().splitlines()]
        return Counter(f"{line['status']} {line['outcome']}" for line in lines)

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
    wanted = 1 + sum(traffic.done.values())  # and the one that told what to expect
    found = logged(station, wanted)
    assert found == {"200 complete": wanted}, found


# SIGKILL


async def kill_one(station: Station, dice: random.Random) -> tuple[float, set[int], int]:
    """Kill a worker; give when, whose connections it held, and its slot."""
    slot, pid = dice.choice(station.workers())
    # Stopped, it accepts nothing between our look at its connections and its end.
    os.kill(pid, signal.SIGSTOP)
    held = client_ports(pid, station.port)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        new = [other for place, other in station.workers() if place == slot and other != pid]
        return bool(new) and bool(client_ports(new[0], station.port))

    await eventually(replaced, 10, f"another worker in slot {slot}")
    return killed_at, held, slot


async def kills(station: Station) -> tuple[Traffic, list[tuple[float, set[int], int]], list[float]]:
    dice = random.Random(3)
    done, times = [], []
    async with Traffic(station.port) as traffic:
        for _ in range(KILLS):
            done.append(await kill_one(station, dice))
            times.append(time.monotonic() - done[-1][0])
            await eventually(lambda: len(station.workers()) == 2, 10, "two workers")
            await asyncio.sleep(dice.uniform(1.5, 4.0))
    return traffic, done, times


@pytest.mark.long
def test_twenty_kills_under_load_cost_only_the_calls_of_the_killed(station: Station) -> None:
    traffic, done, times = run(kills(station), 200)
    costs = [0] * len(done)
    strange = []
    for failure in traffic.failures:
        number = max((n for n, (at, _, _) in enumerate(done) if at <= failure.at), default=0)
        if failure.port in done[number][1] and "connection was lost" in failure.why:
            costs[number] += 1
        else:
            strange.append(failure)
    held = [len(ports) for _, ports, _ in done]
    print(f"\n{KILLS} kills of one of two workers: {traffic.says()}")
    print(f"  a kill cost {quantile(list(map(float, costs)), 0.5):.0f} calls (max {max(costs)}) of", end=" ")
    print(f"{quantile(list(map(float, held)), 0.5):.0f} connections; {len(strange)} calls of others")
    print(f"  replaced and serving after {quantile(times, 0.5):.2f} s (max {max(times):.2f})")
    assert not strange, (len(strange), strange[:5])
    assert min(held) > 0
    assert min(costs) > 0
    assert max(times) <= 2.0
    assert {slot for _, _, slot in done} == {0, 1}
    # What a worker had not written yet is lost with it.
    wanted = sum(traffic.done.values())
    found = logged(station, wanted - KILLS * BATCH)
    print(f"  {max(0, wanted - found['200 complete'])} lines of the access log were lost with them")
    assert set(found) <= {"200 complete", "499 client_gone"}, found


# SIGHUP


async def extra(station: Station) -> int:
    """Ask for the model that only the second channel has, on a connection of its own."""
    _, link = await asyncio.get_running_loop().create_connection(Link, "127.0.0.1", station.port)
    why = await link.ask(request("chat", "extra", False), lambda body: b'"usage"' in body)
    link.close()
    return int(why.split()[1].rstrip(":")) if why.startswith("status") else 200 if not why else 0


async def everywhere(station: Station, status: int) -> None:
    """Wait until each of many connections in a row finds this."""
    async with asyncio.timeout(5):
        row = 0
        while row < 16:
            row = row + 1 if await extra(station) == status else 0


async def reloads(station: Station, url: str, second: str) -> tuple[Traffic, list[float]]:
    """Reload again and again; each fifth time a channel comes or goes."""
    times = []
    async with Traffic(station.port) as traffic:
        for number in range(1, RELOADS + 1):
            more = second if number // 5 % 2 else ""
            station.file.write_text(station.head + text(url, 1 + number % 7, more, 100_000_000 + number))
            began = time.monotonic()
            station.process.send_signal(signal.SIGHUP)
            wanted = number
            await eventually(
                lambda: station.err.read_text().count("configuration reloaded") >= wanted,  # noqa: B023
                10,
                f"reload {number}",
            )
            times.append(time.monotonic() - began)
            if number % 5 == 0:
                await everywhere(station, 200 if more else 404)
        station.file.write_text(station.head + text(url, 1, second))
        station.process.send_signal(signal.SIGHUP)
        await everywhere(station, 200)
        faulty = station.head + text(url, 2).replace("weight = 2", 'weight = "heavy"')
        station.file.write_text(faulty)
        station.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "reload refused" in station.err.read_text(), 10, "the refusal")
        # The file has the second channel no more, the station has it still.
        await everywhere(station, 200)
    return traffic, times


@pytest.mark.long
def test_a_hundred_reloads_under_load_harm_no_call_and_a_faulty_file_changes_nothing(
    station: Station, fake_upstream: str, second_upstream: str
) -> None:
    workers = sorted(station.workers())
    traffic, times = run(reloads(station, fake_upstream, second_upstream), 200)
    lines = [orjson.loads(line) for line in station.access.read_bytes().splitlines()]
    channels = Counter(line.get("channel", "") for line in lines if line["model"] != "extra")
    print(f"\n{RELOADS} reloads: {traffic.says()}")
    print(f"  a reload took {quantile(times, 0.5):.2f} s (max {max(times):.2f}); calls by channel: {dict(channels)}")
    assert not traffic.failures, (len(traffic.failures), Counter(f"{f.kind}: {f.why}" for f in traffic.failures))
    assert sorted(station.workers()) == workers
    assert set(channels) == {"fake", "more"}
    assert min(channels.values()) > 100
    line = station.file.read_text().splitlines().index('weight = "heavy"') + 1
    refusal = station.err.read_text().partition("reload refused, nothing changed:\n")[2]
    assert re.match(rf"{re.escape(str(station.file))}:{line}: .*weight", refusal), refusal[:500]
