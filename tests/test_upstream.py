"""The pool over real sockets: reuse, bounds, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket

import msgspec
import pytest
from upstream_script import (
    LIMITS,
    OK,
    REQUEST,
    STREAM_HEAD,
    TIMEOUTS,
    Taken,
    Upstream,
    answering,
    ask,
    free_port,
    pooled,
    read_request,
    refusal,
    rig,
    run,
    until,
)

from nbgate.server.waiter import Waiter
from nbgate.upstream import Connection, Endpoint, Pool
from nbgate.upstream_wire import Wire

replace = msgspec.structs.replace


async def serve_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await read_request(reader):
        writer.write(OK)


async def serve_silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)


def test_pool_sends_head_and_body_and_reuses_the_connection() -> None:
    async def main() -> None:
        seen = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while request := await read_request(reader):
                seen.append(request)
                writer.write(OK)

        async with rig(handle) as (pool, upstream):
            assert pool.idle(upstream.endpoint) is None
            first = await ask(pool, upstream.endpoint)
            assert (first.status, first.buffered, first.complete, first.reused) == (200, b"ok", True, False)
            assert 0 < first.sent_at <= first.first_byte_at <= first.head_at
            second = pool.idle(upstream.endpoint)
            assert second is not None and second.reused
            second.send(REQUEST, TIMEOUTS)
            await second.answer()
            assert second.buffered == b"ok" and upstream.connections == 1
            assert seen == [b"".join(REQUEST)] * 2

    run(main())


def test_pool_lends_the_warmest_connection_first() -> None:
    async def main() -> None:
        async with rig(serve_ok) as (pool, upstream):
            conns = [await pool.acquire(upstream.endpoint, 1) for _ in range(3)]
            wires = [conn._wire for conn in conns]
            for conn in conns:
                conn.release()
            lent = [pool.idle(upstream.endpoint) for _ in range(3)]
            assert [conn._wire for conn in lent if conn is not None] == wires[::-1]
            assert pool.idle(upstream.endpoint) is None and pool.lent == 3
            for conn in lent:
                assert conn is not None
                conn.abort()

    run(main())


def test_pool_drops_an_idle_connection_that_the_upstream_closed() -> None:
    async def main() -> None:
        async with rig(answering(OK, close=True)) as (pool, upstream):
            await ask(pool, upstream.endpoint)
            await until(lambda: pool.total == 0)
            assert pool.idle(upstream.endpoint) is None
            assert not (await ask(pool, upstream.endpoint)).reused

    run(main())


def test_pool_drops_an_idle_connection_on_unasked_bytes() -> None:
    async def main() -> None:
        more = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(OK)
            await more.wait()
            writer.write(OK)
            await reader.read()

        async with rig(handle) as (pool, upstream):
            await ask(pool, upstream.endpoint)
            more.set()
            await until(lambda: pool.total == 0)
            await until(lambda: upstream.gone == 1)

    run(main())


def test_pool_says_that_a_stale_connection_died_before_any_byte() -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(OK)
            await read_request(reader)

        async with rig(handle) as (pool, upstream):
            await ask(pool, upstream.endpoint)
            error = await refusal(pool, upstream.endpoint)
            assert (error.kind, error.reused, error.bytes_read) == ("lost", True, 0)
            assert 0 <= error.since_write_s < 1
            fresh = await pool.acquire(upstream.endpoint, 1, fresh=True)
            assert not fresh.reused
            fresh.abort()

    run(main())


def test_pool_dials_anew_for_who_wants_no_idle_connection() -> None:
    async def main() -> None:
        async with rig(serve_ok, replace(LIMITS, max_per_endpoint=1)) as (pool, upstream):
            await ask(pool, upstream.endpoint)
            conn = await pool.acquire(upstream.endpoint, 1, fresh=True)
            assert not conn.reused and pool.total == 1 and upstream.connections == 2
            conn.release()

    run(main())


def test_pool_closes_connections_that_idled_too_long() -> None:
    async def main() -> None:
        async with rig(serve_ok, replace(LIMITS, idle_s=0.05)) as (pool, upstream):
            await ask(pool, upstream.endpoint)
            await until(lambda: upstream.gone == 1)
            assert pool.total == 0

    run(main())


def test_pool_retire_closes_idle_ones_now_and_busy_ones_after_their_answer() -> None:
    async def main() -> None:
        async with rig(serve_ok) as (pool, upstream):
            busy = await pool.acquire(upstream.endpoint, 1)
            await ask(pool, upstream.endpoint)
            pool.retire(upstream.endpoint)
            assert pool.total == 1 and pool.idle(upstream.endpoint) is None
            busy.send(REQUEST, TIMEOUTS)
            await busy.answer()
            assert busy.buffered == b"ok" and pool.total == 0
            assert not (await ask(pool, upstream.endpoint)).reused

    run(main())


# bounds


@pytest.mark.parametrize("bound", ["max_per_endpoint", "max_connections"])
def test_pool_never_opens_more_than_its_bound(bound: str) -> None:
    async def main() -> None:
        at_once = most = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            try:
                await serve_ok(reader, writer)
            finally:
                at_once -= 1

        async with rig(handle, replace(LIMITS, wait_s=5, **{bound: 3})) as (pool, upstream):
            done = await asyncio.gather(*(ask(pool, upstream.endpoint) for _ in range(40)))
            assert [conn.buffered for conn in done] == [b"ok"] * 40
            assert most <= 3 and pool.total <= 3 and upstream.connections <= 3 and pool.waiting == 0

    run(main())


def test_pool_refuses_who_waited_too_long_and_who_finds_the_queue_full() -> None:
    async def main() -> None:
        async with rig(serve_ok, replace(LIMITS, max_per_endpoint=1, max_waiters=1)) as (pool, upstream):
            busy = await pool.acquire(upstream.endpoint, 1)
            waiting = asyncio.create_task(refusal(pool, upstream.endpoint))
            await until(lambda: pool.waiting == 1)
            assert (await refusal(pool, upstream.endpoint)).kind == "busy"
            assert (await waiting).kind == "busy"
            assert pool.waiting == 0 and pool.refusals == 2
            busy.release()
            assert (await ask(pool, upstream.endpoint)).reused

    run(main())


def test_pool_serves_the_queue_in_order_and_after_an_abort() -> None:
    async def main() -> None:
        async with rig(serve_ok, replace(LIMITS, max_per_endpoint=1, wait_s=5)) as (pool, upstream):
            busy = await pool.acquire(upstream.endpoint, 1)
            order: list[int] = []

            async def queue(n: int) -> None:
                await ask(pool, upstream.endpoint)
                order.append(n)

            tasks = []
            for n in range(4):
                tasks.append(asyncio.create_task(queue(n)))
                await until(lambda: pool.waiting == len(tasks))
            tasks.pop(1).cancel()
            await until(lambda: pool.waiting == 3)
            busy.abort()
            await asyncio.gather(*tasks)
            assert order == [0, 2, 3] and pool.total == 1

    run(main())


def test_pool_evicts_another_endpoints_idle_connection_at_the_bound() -> None:
    async def main() -> None:
        limits = replace(LIMITS, max_connections=2, wait_s=5)
        async with Upstream(serve_ok).listening() as one, rig(serve_ok, limits) as (pool, two):
            for _ in range(2):
                conn = await pool.acquire(one.endpoint, 1, fresh=True)
                conn.release()
            held = await pool.acquire(two.endpoint, 1)
            again = await pool.acquire(one.endpoint, 1)
            assert again.reused and pool.total == 2
            waiting = asyncio.create_task(ask(pool, two.endpoint))
            await until(lambda: pool.waiting == 1)
            again.release()  # goes idle in its lane, and makes room for the other lane
            assert (await waiting).buffered == b"ok"
            held.release()

    run(main())


@pytest.mark.parametrize("bound", ["max_per_endpoint", "max_connections"])
def test_pool_finds_a_connection_again_that_took_the_last_ones_place(bound: str) -> None:
    async def main() -> None:
        async with rig(serve_ok, replace(LIMITS, **{bound: 1})) as (pool, upstream):
            pool.retire(upstream.endpoint)
            await ask(pool, upstream.endpoint)
            pool.retire(upstream.endpoint)
            await ask(pool, upstream.endpoint)
            busy = await pool.acquire(upstream.endpoint, 1)
            pool.retire(upstream.endpoint)
            fresh = asyncio.create_task(pool.acquire(upstream.endpoint, 1, fresh=True))
            await until(lambda: pool.waiting == 1)
            busy.release()
            (await fresh).release()
            (await pool.acquire(upstream.endpoint, 1, fresh=True)).release()
            conn = pool.idle(upstream.endpoint)
            assert conn is not None and pool.total == 1
            conn.release()

    run(main())


# dial and cancellation


def test_acquire_fails_with_dial_when_nobody_listens() -> None:
    async def main() -> None:
        async with pooled() as pool:
            error = await refusal(pool, Endpoint("http", "127.0.0.1", free_port()))
            assert (error.kind, error.bytes_read, error.since_write_s) == ("dial", 0, 0.0)
            assert pool.total == 0 and pool.dial_failures == 1

    run(main())


def test_acquire_cancelled_leaves_its_dial_to_the_next() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def resolve(host: str, port: int) -> list[tuple[int, object]]:
            await gate.wait()
            return [(socket.AF_INET, ("127.0.0.1", port))]

        async with Upstream(serve_ok).listening() as upstream, pooled(resolve=resolve) as pool:
            task = asyncio.create_task(pool.acquire(upstream.endpoint, 1))
            await until(lambda: pool.dials)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            heir = asyncio.create_task(pool.acquire(upstream.endpoint, 1))
            await asyncio.sleep(0)
            gate.set()
            (await heir).release()
            assert pool.dials == 1 and pool.total == 1

    run(main())


def test_acquire_cancelled_after_it_was_served_gives_the_connection_back() -> None:
    async def main() -> None:
        async with rig(serve_ok, replace(LIMITS, max_per_endpoint=1, wait_s=5)) as (pool, upstream):
            busy = await pool.acquire(upstream.endpoint, 1)
            waiting = asyncio.create_task(pool.acquire(upstream.endpoint, 1))
            await until(lambda: pool.waiting == 1)
            busy.release()  # serves the claim; its task has not run yet
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            again = pool.idle(upstream.endpoint)
            assert again is not None
            again.release()

    run(main())


def test_acquire_tells_every_waiter_when_shared_dials_fail() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def resolve(host: str, port: int) -> list[tuple[int, object]]:
            await gate.wait()
            raise OSError("no such name")

        async with pooled(resolve=resolve) as pool:
            endpoint = Endpoint("http", "nowhere", 80)
            gone = [asyncio.create_task(pool.acquire(endpoint, 5)) for _ in range(3)]
            await until(lambda: pool.dials == 3)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            heirs = [asyncio.create_task(refusal(pool, endpoint)) for _ in range(5)]
            await until(lambda: pool.dials == 5)
            gate.set()
            assert [error.kind for error in await asyncio.gather(*heirs)] == ["dns"] * 5
            assert pool.total == 0

    run(main())


@pytest.mark.parametrize("when", ["before the answer", "in a stream"])
def test_abort_closes_the_socket_at_once(when: str) -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            if when == "in a stream":
                writer.write(STREAM_HEAD + b"1\r\na\r\n")
            assert await reader.read() == b""

        async with rig(handle) as (pool, upstream):
            conn = await pool.acquire(upstream.endpoint, 1)
            conn.send(REQUEST, TIMEOUTS, lambda conn: True)
            if when == "in a stream":
                await conn.answer()
                conn.attach(Taken())
            else:
                task = asyncio.create_task(_answer(conn))
                await until(lambda: conn._waiter is not None)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            began = asyncio.get_running_loop().time()
            conn.abort()
            await until(lambda: upstream.gone == 1)
            assert asyncio.get_running_loop().time() - began < 0.1
            assert pool.total == 0 and pool.idle(upstream.endpoint) is None

    run(main())


async def _answer(conn: Connection) -> None:
    await conn.answer()


def test_every_answer_is_ones_own_when_calls_are_cancelled_at_random_points() -> None:
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while request := await read_request(reader):
                name = request.rpartition(b"\r\n")[2]
                writer.write(STREAM_HEAD + b"2\r\n" + name[:2] + b"\r\n")
                await asyncio.sleep(0)
                writer.write(b"2\r\n" + name[2:4] + b"\r\n0\r\n\r\n")

        chance = random.Random(7)
        right = 0

        async def call(pool: Pool, endpoint: Endpoint, n: int) -> None:
            nonlocal right
            conn = pool.idle(endpoint) or await pool.acquire(endpoint, 5)
            try:
                conn.send([REQUEST[0].replace(b"th: 2", b"th: 4"), b"%04d" % n], TIMEOUTS)
                await conn.answer()
                assert conn.buffered == b"%04d" % n
                right += 1
            finally:
                conn.abort()

        async with rig(handle, replace(LIMITS, max_per_endpoint=8, wait_s=10)) as (pool, upstream):
            tasks = []
            for n in range(1000):
                tasks.append(asyncio.create_task(call(pool, upstream.endpoint, n)))
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
                if chance.random() < 0.4:
                    chance.choice(tasks[-20:]).cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(each) for each in results} <= {type(None), asyncio.CancelledError}
            assert right > 300 and pool.total <= 8 and pool.waiting == 0

    run(main())


def test_acquire_and_answer_run_without_a_task() -> None:
    """Drive a coroutine as the server's eager driver does."""

    async def main() -> None:
        ended = asyncio.get_running_loop().create_future()

        async def call(pool: Pool, upstream: Upstream) -> None:
            for _ in range(3):
                conn = await pool.acquire(upstream.endpoint, 1)
                conn.send(REQUEST, TIMEOUTS)
                await conn.answer()
                assert conn.buffered == b"ok"
            ended.set_result(pool.dials)

        async with rig(serve_ok) as (pool, upstream):
            coro = call(pool, upstream)

            def step() -> None:
                with contextlib.suppress(StopIteration), contextlib.ExitStack() as stack:
                    stack.callback(setattr, Waiter, "driven", False)
                    Waiter.driven = True
                    waiter = coro.send(None)
                    assert isinstance(waiter, Waiter), "eager apps meet waiters alone, outside any task"
                    waiter.resume = step

            asyncio.get_running_loop().call_soon(step)
            assert await ended == 1

    run(main())


# leaving


def test_close_ends_everything_under_way() -> None:
    async def main() -> None:
        async with rig(serve_silence, replace(LIMITS, max_per_endpoint=1, wait_s=5)) as (pool, upstream):
            answering_ = asyncio.create_task(refusal(pool, upstream.endpoint))
            waiting = asyncio.create_task(refusal(pool, upstream.endpoint))
            await until(lambda: pool.waiting == 1 and upstream.connections == 1)
            await pool.close()
            assert (await answering_).kind == "lost" and (await waiting).kind == "dial"
            assert (await refusal(pool, upstream.endpoint)).kind == "dial"

    run(main())


def test_pool_leaves_no_cycles_and_no_sockets() -> None:
    async def main() -> None:
        async with rig(serve_ok) as (pool, upstream):
            await ask(pool, upstream.endpoint)
            before = len(os.listdir("/proc/self/fd"))
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    conn = await pool.acquire(upstream.endpoint, 1, fresh=True)
                    conn.send(REQUEST, TIMEOUTS)
                    await conn.answer()
                    assert conn.complete
                    other = pool.idle(upstream.endpoint)
                    assert other is not None
                    other.abort()
                    del conn, other
                await until(lambda: upstream.gone == 20)
                await until(lambda: sum(isinstance(each, Wire) for each in gc.get_objects()) == 1)
            finally:
                gc.enable()
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(main())
