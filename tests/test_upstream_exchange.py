"""One exchange over real sockets: deadlines, readiness, pace, bad ends."""

from __future__ import annotations

import asyncio
import random
import struct

import msgspec
import pytest
from upstream_script import (
    OK,
    REQUEST,
    STREAM_HEAD,
    TIMEOUTS,
    Taken,
    Upstream,
    answering,
    ask,
    pooled,
    read_request,
    refusal,
    rig,
    run,
    until,
)

from nbgate.upstream import Connection, UpstreamError

replace = msgspec.structs.replace

# deadlines


@pytest.mark.parametrize(
    ("kind", "answer", "bounds"),
    [
        ("timeout_first_byte", b"", {"first_byte_s": 0.1}),
        ("timeout_first_byte", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2", {"first_byte_s": 0.1}),
        ("timeout_idle", STREAM_HEAD + b"1\r\na\r\n", {"idle_s": 0.1}),
        ("timeout_total", STREAM_HEAD + b"1\r\na\r\n", {"total_s": 0.1}),
        ("timeout_total", b"", {"answer_s": 0.1, "first_byte_s": 0}),
    ],
)
def test_connection_times_out(kind: str, answer: bytes, bounds: dict[str, float]) -> None:
    async def main() -> None:
        async with rig(answering(answer)) as (pool, upstream):
            began = asyncio.get_running_loop().time()
            error = await refusal(pool, upstream.endpoint, replace(TIMEOUTS, **bounds))
            assert error.kind == kind and 0.09 <= asyncio.get_running_loop().time() - began < 0.4
            assert error.since_write_s >= 0.1 and bool(error.bytes_read) == bool(answer)
            await until(lambda: upstream.gone == 1)

    run(main())


def test_connection_that_moves_does_not_time_out_as_idle() -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(STREAM_HEAD)
            for _ in range(10):
                await asyncio.sleep(0.03)
                writer.write(b"1\r\na\r\n")
            writer.write(b"0\r\n\r\n")

        async with rig(handle) as (pool, upstream):
            assert (await ask(pool, upstream.endpoint, replace(TIMEOUTS, idle_s=0.15))).buffered == b"a" * 10

    run(main())


def test_connection_timeout_fails_the_sink() -> None:
    async def main() -> None:
        async with rig(answering(STREAM_HEAD + b"1\r\na\r\n")) as (pool, upstream):
            conn = await pool.acquire(upstream.endpoint, 1)
            conn.send(REQUEST, replace(TIMEOUTS, idle_s=0.1), lambda conn: True)
            await conn.answer()
            sink = Taken()
            conn.attach(sink)
            await until(lambda: sink.ends)
            assert isinstance(sink.ends[0], UpstreamError) and sink.ends[0].kind == "timeout_idle"

    run(main())


def test_answer_returns_when_ready_is_late() -> None:
    async def main() -> None:
        async with rig(answering(STREAM_HEAD + b"3\r\n: c\r\n")) as (pool, upstream):
            conn = await pool.acquire(upstream.endpoint, 1)
            conn.send(REQUEST, TIMEOUTS, lambda conn: False, 0.1)
            await conn.answer()
            assert conn.status == 200 and not conn.complete and conn.buffered == b": c"
            conn.abort()

    run(main())


def test_answer_returns_as_soon_as_ready() -> None:
    async def main() -> None:
        async with rig(answering(STREAM_HEAD + b"3\r\nabc\r\n")) as (pool, upstream):
            conn = await pool.acquire(upstream.endpoint, 1)
            conn.send(REQUEST, TIMEOUTS, lambda conn: b"abc" in conn.buffered)
            await conn.answer()
            assert conn.buffered == b"abc" and conn.received == 3
            conn.abort()
            with pytest.raises(UpstreamError):
                await conn.answer()

    run(main())


# pace


def test_paused_connection_reads_no_more_and_does_not_time_out_as_idle() -> None:
    async def main() -> None:
        written = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            await read_request(reader)
            writer.write(STREAM_HEAD)
            for _ in range(2000):
                writer.write(b"8000\r\n" + bytes(32768) + b"\r\n")
                written += 32768
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await reader.read()

        class Slow(Taken):
            got = 0

            def feed(self, data: bytes) -> None:
                self.got += len(data)
                if self.got > 100_000 and not stopped:
                    stopped.append(True)
                    conn.pause()

        async with rig(handle) as (pool, upstream):
            stopped: list[bool] = []
            conn = await pool.acquire(upstream.endpoint, 1)
            conn.send(REQUEST, replace(TIMEOUTS, idle_s=0.15), lambda conn: True)
            await conn.answer()
            sink = Slow()
            conn.attach(sink)
            await until(lambda: stopped)
            got = sink.got
            await asyncio.sleep(0.35)
            assert sink.got == got < 1 << 20 and not sink.ends
            assert written < 20 << 20, "the upstream feels the pause"
            conn.resume()
            await until(lambda: sink.ends)
            assert sink.ends == ["finish"] and sink.got == 2000 * 32768
            assert pool.idle(upstream.endpoint) is not None
            pool.retire(upstream.endpoint)

    run(main())


def test_pool_reads_an_early_answer_and_does_not_reuse() -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
            await asyncio.Event().wait()

        async with Upstream(handle).listening(limit=1000) as upstream, pooled() as pool:
            conn = await pool.acquire(upstream.endpoint, 1)
            size = 32 << 20
            head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size
            conn.send([head, bytes(size)], TIMEOUTS)
            await conn.answer()
            assert (conn.status, conn.buffered) == (413, b"big") and pool.total == 0

    run(main())


@pytest.mark.parametrize("reset", [False, True])
def test_connection_cut_in_mid_body_is_lost(reset: bool) -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
            if reset:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER
                writer.transport.abort()

        async with rig(handle) as (pool, upstream):
            error = await refusal(pool, upstream.endpoint)
            assert error.kind == "lost" and not error.reused
            assert error.bytes_read > 0 or reset

    run(main())


def test_pool_settles_random_answers_over_sockets() -> None:
    async def main() -> None:
        chance = random.Random(3)
        parts = [OK, STREAM_HEAD, b"1\r\na\r\n", b"0\r\n\r\n", b"\r\n", b"HTTP/1.1 ", b"200 OK\r\n", b"\0", b"a: b"]

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await read_request(reader):
                for _ in range(chance.randrange(5)):
                    writer.write(chance.choice([*parts, chance.randbytes(9)]))
                if chance.random() < 0.5:
                    return

        async with rig(handle) as (pool, upstream):
            bounds = replace(TIMEOUTS, first_byte_s=0.1, idle_s=0.1)
            for _ in range(10):
                calls = [ask(pool, upstream.endpoint, bounds) for _ in range(20)]
                for each in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(each, UpstreamError | Connection), each

    run(main())
