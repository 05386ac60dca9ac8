"""Clients that leave: their upstream sockets are closed within 100 ms, whatever the route and the moment."""

from __future__ import annotations

import asyncio
import json
import random
from typing import NamedTuple

import pytest
from loadkit import BODIES, STREAMS, Client, connect, many, over, quantile, request, run, upstream_log, upstream_stats
from station import Station, until


class Leave(NamedTuple):
    """One way to leave: where, when, and how."""

    dialect: str
    stream: bool
    moment: str
    reset: bool
    model: str


# The moment, and what the upstream is told to do so that the client can leave in it.
OF_STREAMS = {
    "before head": "fault-hang-before-head",
    "after head": "fault-hang-after-head",
    "mid stream, silent": "paced-8-5+fault-hang-mid",
    "mid stream, flowing": "paced-2000-20",
    "mid stream, fast": "paced-300-2-2000",
}
OF_PLAIN = {
    "before head": "fault-hang-before-head",
    "after head": "fault-hang-after-head",
    "mid body": "fault-hang-mid",
}


def ways(count: int) -> list[Leave]:
    """Deal the leaves over every route, moment and kind of close; shuffled, always alike."""
    kinds = [(d, True, moment, mode) for d in STREAMS for moment, mode in OF_STREAMS.items()]
    kinds += [(d, False, moment, mode) for d in BODIES for moment, mode in OF_PLAIN.items()]
    found = []
    for number in range(count):
        dialect, stream, moment, mode = kinds[number % len(kinds)]
        reset = number // len(kinds) % 2 == 1
        found.append(Leave(dialect, stream, moment, reset, f"{mode}+number-{number}"))
    random.Random(7).shuffle(found)
    return found


async def leave(port: int, way: Leave, dice: random.Random) -> Client:
    """Ask, wait until the moment has come, and leave."""
    client = await connect(port, request(way.dialect, way.model, way.stream))
    if way.moment.startswith("mid stream"):
        await client.first
        await asyncio.sleep(dice.uniform(0.0, 0.2))
    else:
        # NOTE: nothing tells a client that its request reached the upstream; 0.2 s and the log's own count do.
        await asyncio.sleep(dice.uniform(0.2, 0.5))
    assert not client.ended.done(), (way, client.status, client.body[:300])
    client.leave(way.reset)
    return client


async def disconnects(port: int, url: str, count: int, others: int, at_once: int) -> dict[str, float]:
    """Let clients leave while others stream; returns when each model's client left.

    One client after another leaves the upstream itself: what the machine and
    the clocks add without a gateway.
    """
    dice = random.Random(11)
    ended: dict[str, float] = {}
    queue = ways(count)
    whole = await many(port, request("chat", "paced-2000-20", True), others)
    for client in whole:
        client.ask()
    await asyncio.gather(*(client.first for client in whole))

    async def worker() -> None:
        while queue:
            way = queue.pop()
            ended[way.model] = (await leave(port, way, dice)).closed_at

    async def control() -> None:
        direct = int(url.rpartition(":")[2])
        number = 0
        while queue:
            way = Leave("chat", True, "before head", number % 2 == 1, f"fault-hang-before-head+control-{number}")
            client = await connect(direct, request(way.dialect, way.model, True))
            await asyncio.sleep(0.03)
            client.leave(way.reset)
            ended[way.model] = client.closed_at
            number += 1

    await asyncio.gather(control(), *(worker() for _ in range(at_once)))
    assert not [client for client in whole if client.ended.done()], "the other streams were harmed"
    for client in whole:
        client.leave(False)
    await over(whole, 10)
    return ended


def measure(station: Station, url: str, count: int, others: int, at_once: int) -> None:
    """Run, and compare the clients' clock with the upstream's."""
    left = run(disconnects(station.port, url, count, others, at_once))
    until(lambda: upstream_stats(url)["open_streams"] == 0, 10, "the end of all streams")
    log = {line["model"]: line for line in upstream_log(url) if line["model"] in left}
    delays: dict[str, list[float]] = {}
    controls = [log[model]["closed_by_peer_at"] - left[model] for model in left if "+control-" in model]
    for way in ways(count):
        line = log[way.model]
        assert line["closed_by_peer_at"] is not None, (way, line)
        kind = f"{way.moment} ({'stream' if way.stream else 'plain'})"
        delays.setdefault(kind, []).append(line["closed_by_peer_at"] - left[way.model])
    every = [delay for some in delays.values() for delay in some]
    print(f"\n{len(every)} clients left while {others} streamed; from their close to the upstream's, in ms:")
    for kind, some in sorted(delays.items()):
        print(f"  {kind:30} {len(some):5}  p50 {quantile(some, 0.5) * 1e3:6.2f}  max {max(some) * 1e3:6.2f}")
    print(f"  {'all':30} {len(every):5}  p99 {quantile(every, 0.99) * 1e3:6.2f}  max {max(every) * 1e3:6.2f}")
    print(f"  {'without a gateway':30} {len(controls):5}  max {max(controls) * 1e3:6.2f}")
    assert len(every) == count
    assert max(every) <= 0.1 + max(controls)
    noted(station, count)


def noted(station: Station, count: int) -> None:
    """See that the access log holds each departure."""

    def lines() -> list[dict[str, object]]:
        found = [json.loads(line) for line in station.access.read_text().splitlines()]
        return [line for line in found if "+number-" in str(line["model"])]

    until(lambda: len(lines()) == count, 5, "the log of all departures")
    wrong = [
        x for x in lines() if (x["status"], x["outcome"], x["error"]) != (499, "client_gone", "client_closed_request")
    ]
    assert not wrong, wrong[:3]


def test_eighty_clients_leave_and_their_upstreams_close(loaded: Station, fake_upstream: str) -> None:
    measure(loaded, fake_upstream, 82, 20, 16)


@pytest.mark.long
def test_a_thousand_clients_leave_and_their_upstreams_close(loaded: Station, fake_upstream: str) -> None:
    measure(loaded, fake_upstream, 1025, 200, 24)


def test_clients_that_stopped_reading_leave_and_their_upstreams_close(loaded: Station, fake_upstream: str) -> None:
    model = "paced-2000-0-20000"  # 40 MB: the upstream is paused when these clients leave

    async def go() -> list[float]:
        left = []
        for reset in (False, True, False, True):
            client = await connect(loaded.port, request("chat", model, True))
            await client.first
            client.transport.pause_reading()
            await asyncio.sleep(0.3)
            client.leave(reset)
            left.append(client.closed_at)
            await asyncio.sleep(0.2)
        return left

    left = run(go())
    until(lambda: upstream_stats(fake_upstream)["open_streams"] == 0, 10, "the end of all streams")
    closed = [line["closed_by_peer_at"] for line in upstream_log(fake_upstream) if line["model"] == model]
    delays = [there - here for there, here in zip(closed, left, strict=True)]
    print(f"\nclients that stopped reading: at most {max(delays) * 1e3:.2f} ms")
    assert max(delays) <= 0.1
