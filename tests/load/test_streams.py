"""Thousands of streams through one worker: every byte, little memory, and nobody pays for a slow reader."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Self

import pytest
from loadkit import STREAMS, SlowReader, connect, many, over, quantile, request, run, upstream_stats
from station import Station, rss_bytes

MIB = 1 << 20
FAST = "paced-20000-0-2000"  # 40 MB, as fast as they are read


class Peak:
    """The highest resident memory of a process while this is open."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.before = self.bytes = rss_bytes(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, rss_bytes(self.pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


async def expected(url: str, dialect: str, model: str) -> bytes:
    """Ask the upstream itself."""
    client = await connect(int(url.rpartition(":")[2]), request(dialect, model, True))
    await over([client], 60)
    assert (client.status, client.whole) == (200, True)
    return client.body


async def once(port: int, raw: bytes) -> int:
    """Send a request on a connection of its own; return the status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()


async def volley(port: int, model: str, count: int, right: bytes) -> float:
    """Run so many streams at once; each must be right. Return the median time of one.

    A volley before may have made the loop so late that new calls are refused for a second.
    """
    ready = b"GET /readyz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    for _ in range(100):
        if await once(port, ready) == 200:
            break
        await asyncio.sleep(0.1)
    clients = await many(port, request("chat", model, True), count)
    for client in clients:
        client.ask()
    await over(clients, 120)
    wrong = [c for c in clients if not c.whole or c.body != right]
    assert not wrong, f"{len(wrong)} of {count} are wrong: {wrong[0].status} {wrong[0].body[-200:]!r}"
    return quantile([c.took_s for c in clients], 0.5)


async def streams(port: int, url: str, pid: int, count: int) -> dict[str, float]:
    """Measure memory per stream, then the difference that a slow reader makes.

    The second is measured at a pace that leaves the processor idle half the
    time: where it is short, times say how the kernel dealt it out. The better
    of two runs counts: other work of the machine can only lengthen one.
    """
    dense, calm = "paced-51-20", "paced-21-100" if count > 500 else "paced-11-50"
    right = {model: await expected(url, "chat", model) for model in (dense, calm, "paced-51-5")}
    for _ in range(2):
        await volley(port, "paced-51-5", 20, right["paced-51-5"])
    with Peak(pid) as first:
        dense_s = await volley(port, dense, count, right[dense])
    with Peak(pid) as alone:
        alone_s = min([await volley(port, calm, count, right[calm]) for _ in range(2)])
    before = rss_bytes(pid)
    slow = SlowReader(port, request("chat", FAST, True))
    try:
        await asyncio.sleep(0.5)
        after = rss_bytes(pid)
        with Peak(pid) as beside:
            beside_s = min([await volley(port, calm, count, right[calm]) for _ in range(2)])
        assert 0 < slow.received < 100_000
    finally:
        await slow.stop()
    return {
        "kib_per_stream": (first.bytes - first.before) / count / 1024,
        "slow_reader_mib": max(after - before, beside.bytes - max(first.bytes, alone.bytes)) / MIB,
        "dense_s": dense_s,
        "alone_s": alone_s,
        "beside_s": beside_s,
    }


def check(found: dict[str, float], name: str, kib: float) -> None:
    ratio = found["beside_s"] / found["alone_s"]
    kib_each, more = found["kib_per_stream"], found["slow_reader_mib"]
    print(f"\n{name}: {kib_each:.1f} KiB per open stream; a slow reader adds {more:.2f} MiB")
    print(
        f"  median time of a stream: {found['alone_s']:.3f} s alone, {found['beside_s']:.3f} s beside it ({ratio:.3f})"
    )
    print(f"  and of 51 chunks, one each 20 ms: {found['dense_s']:.3f} s")
    assert found["kib_per_stream"] <= kib
    assert found["slow_reader_mib"] <= 4
    assert ratio <= 1.2


def test_a_hundred_streams_are_whole_and_a_slow_reader_harms_nobody(loaded: Station, fake_upstream: str) -> None:
    found = run(streams(loaded.port, fake_upstream, loaded.worker(), 100))
    # Whole megabytes of the heap are shared out among only a hundred: the true figure needs the long run.
    check(found, "100 streams", kib=48)


@pytest.mark.long
def test_two_thousand_streams_are_whole_and_a_slow_reader_harms_nobody(loaded: Station, fake_upstream: str) -> None:
    found = run(streams(loaded.port, fake_upstream, loaded.worker(), 2000))
    check(found, "2000 streams", kib=16)
    at_once = upstream_stats(fake_upstream)["max_parallel"]
    print(f"at most {at_once} at once")
    assert at_once >= 1900


# what the upstream does to its streams


def test_a_dribbling_upstream_still_gives_whole_frames(loaded: Station, fake_upstream: str) -> None:
    async def go() -> list[Any]:
        clients = await asyncio.gather(
            *(connect(loaded.port, request(d, "paced-3-0+fault-dribble-1", True)) for d in STREAMS)
        )
        await over(clients, 60)
        return [(c, await expected(fake_upstream, d, "paced-3-0")) for c, d in zip(clients, STREAMS, strict=True)]

    for client, right in run(go()):
        assert client.whole
        # The demo's model name is part of each frame.
        assert client.body.replace(b"+fault-dribble-1", b"") == right
        assert len(client.parts) >= 3
        for part in client.parts:
            assert part.endswith(b"\n\n")
            assert part.startswith((b"data: ", b"event: "))


@pytest.mark.parametrize("fault", ["reset-mid", "close-mid", "garbage"])
def test_a_cut_upstream_ends_each_dialect_with_its_error_and_no_done(loaded: Station, fault: str) -> None:
    model = f"paced-20-5+fault-{fault}"

    async def go() -> dict[str, list[Any]]:
        started = {d: await many(loaded.port, request(d, model, True), 10) for d in STREAMS}
        for client in (c for clients in started.values() for c in clients):
            client.ask()
        await over([c for clients in started.values() for c in clients], 60)
        return started

    for dialect, clients in run(go()).items():
        marks = {"chat": b'data: {"error":', "completions": b'data: {"error":'}
        for client in clients:
            assert (client.status, client.whole) == (200, True)
            frames = client.body.split(b"\n\n")
            assert frames[-1] == b""
            assert frames[-2].startswith(marks.get(dialect, b"event: error\ndata: {")), frames[-2]
            assert b'"upstream_error"' in frames[-2]
            assert b"[DONE]" not in client.body
            assert b"message_stop" not in client.body
            assert b"response.completed" not in client.body
            assert len(frames) >= 11


def test_frames_are_never_held_back(loaded: Station) -> None:
    async def go() -> list[float]:
        client = await connect(loaded.port, request("chat", "paced-6-100", True))
        await over([client], 30)
        return client.gaps

    began = time.monotonic()
    gaps = run(go())
    assert time.monotonic() - began < 5
    assert len(gaps) >= 5
    assert max(gaps[:5]) < 0.2
