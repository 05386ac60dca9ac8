"""The eager driver and its wake-ups: cancellation, futures, nesting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from serverkit import GET, Bench, answer, eager, read_body

from nbgate.server.waiter import Waiter

Make = Callable[..., Bench]


@pytest.mark.parametrize("how", ["eof", "lose"])
@pytest.mark.parametrize("what", ["waiter", "future", "sleep0", "event"])
def test_eager_app_is_cancelled_wherever_it_sleeps_when_its_client_leaves(bench: Make, how: str, what: str) -> None:
    log: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            if what == "waiter":
                await Waiter()
            elif what == "future":
                await asyncio.get_running_loop().create_future()
            elif what == "event":
                await asyncio.Event().wait()
            else:
                while True:  # noqa: ASYNC110  bare yields are what is tested
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise

    client = bench(app).connect().send(GET)
    getattr(client, how)()
    assert log == ["cancelled"] and client.out == b""


def test_eager_app_that_catches_its_cancellation_may_send_and_sleep_in_vain(bench: Make) -> None:
    log: list[str] = []
    second = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            await Waiter()
        except asyncio.CancelledError:
            await answer(send)
            log.append((await receive())["type"])
            await second
            await send({"type": "http.response.body", "body": b"x"})
            log.append("end")

    one = bench(app)
    client = one.connect().send(GET)
    client.lose()
    assert log == ["http.disconnect"] and one.server.stats.active_requests == 1
    one.call(second.wake)
    assert log[-1] == "end" and client.out == b""


def test_eager_app_awaits_futures_of_asyncio_and_bare_yields(bench: Make) -> None:
    futures: list[asyncio.Future[bytes]] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        future = asyncio.get_running_loop().create_future()
        futures.append(future)
        await answer(send, await future)

    one = bench(app)
    client = one.connect().send(GET)
    one.spin(10)
    one.call(futures[0].set_result, b"later")
    assert client.read()[0].body == b"later"


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_eager_app_whose_future_ends_badly_is_a_500(bench: Make, end: str) -> None:
    futures: list[asyncio.Future[bytes]] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        futures.append(asyncio.get_running_loop().create_future())
        await futures[0]

    one = bench(app)
    client = one.connect().send(GET)
    if end == "cancel":
        one.call(futures[0].cancel)
    else:
        one.call(futures[0].set_exception, ValueError("no"))
    assert client.statuses() == [500]


def test_eager_app_awaits_a_task_that_awaits_a_waiter(bench: Make) -> None:
    waiter = Waiter()

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def inner() -> bytes:
            await waiter
            return b"inner"

        await answer(send, await asyncio.ensure_future(inner()))

    one = bench(app)
    client = one.connect().send(GET)
    one.call(waiter.wake)
    assert client.read()[0].body == b"inner"


def test_eager_app_woken_inside_a_task_may_sleep_again_and_be_cancelled_there(bench: Make) -> None:
    waiters = [Waiter(), Waiter()]
    log: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await waiters[0]
        try:
            await waiters[1]
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        await answer(send)

    async def wake() -> None:
        waiters[0].wake()

    one = bench(app)
    client = one.connect().send(GET)
    one.run(wake())
    client.lose()
    one.call(waiters[1].wake)
    assert log == ["cancelled"]

    waiters[:] = [Waiter(), Waiter()]
    client = one.connect().send(GET)
    one.run(wake())
    one.call(waiters[1].wake)
    assert client.statuses() == [200]


def test_wake_runs_the_sleeper_before_it_returns_under_the_eager_driver(bench: Make) -> None:
    waiter = Waiter()
    log: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await waiter
        log.append("app")
        await answer(send)

    one = bench(app)
    one.connect().send(GET)
    one.call(lambda: (waiter.wake(), waiter.wake(), log.append("waker")))
    assert log == ["app", "waker"]


def test_wakes_that_wake_others_do_not_recurse_without_bound(bench: Make) -> None:
    waiters = [Waiter() for _ in range(3000)]

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        number = int(scope["path"][1:])
        await waiters[number]
        await answer(send)
        if number + 1 < len(waiters):
            waiters[number + 1].wake()

    one = bench(app)
    clients = [one.connect().send(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % n) for n in range(len(waiters))]
    one.call(waiters[0].wake)
    one.spin(400)
    assert all(c.out.startswith(b"HTTP/1.1 200") for c in clients)
    assert Waiter._depth == 0


def test_sleeper_cancelled_between_a_deep_wake_and_its_turn_is_not_run_twice(bench: Make) -> None:
    deep = [Waiter() for _ in range(40)]
    log: list[str] = []

    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        number = int(scope["path"][1:])
        try:
            await deep[number]
        except asyncio.CancelledError:
            log.append(f"cancelled {number}")
            await Waiter()
        log.append(f"woken {number}")
        if number + 1 < len(deep):
            deep[number + 1].wake()
        if number == 15:
            last.transport.closed = True
            last.transport._lose()

    one = bench(app)
    clients = [one.connect().send(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % n) for n in range(18)]
    last = clients[16]
    one.call(deep[0].wake)
    assert log[:16] == [f"woken {n}" for n in range(16)]
    assert log[16:] == ["cancelled 16"]
    for protocol in [c.protocol for c in clients]:
        if protocol.cycle is not None and protocol.cycle._coro is not None:
            one.call(protocol.cycle._cancel)


def test_waiter_under_a_task_resumes_in_a_later_turn(bench: Make) -> None:
    async def main() -> list[str]:
        waiter, log = Waiter(), []

        async def sleeper() -> None:
            await waiter
            log.append("sleeper")

        task = asyncio.ensure_future(sleeper())
        await asyncio.sleep(0)
        waiter.wake()
        log.append("waker")
        await task
        await waiter  # woken already: returns at once
        return log

    assert asyncio.run(main()) == ["waker", "sleeper"]


def test_waiter_outlives_the_cancellation_of_its_task() -> None:
    async def main() -> None:
        waiter = Waiter()

        async def sleeper() -> None:
            await waiter

        task = asyncio.ensure_future(sleeper())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        waiter.wake()
        waiter.wake()
        assert waiter.done

    asyncio.run(main())


def test_waiter_woken_before_it_is_awaited_does_not_sleep() -> None:
    waiter = Waiter()
    waiter.wake()

    async def sleeper() -> str:
        await waiter
        return "through"

    with pytest.raises(StopIteration) as caught:
        sleeper().send(None)
    assert caught.value.value == "through"


def test_plain_app_runs_in_a_task_with_timeouts_and_subtasks(bench: Make) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        async with asyncio.timeout(5):
            data = await read_body(receive)
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0))
        await answer(send, data)

    client = bench(app).connect().send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc" * 3)
    client.bench.spin(40)
    assert [r.body for r in client.read()] == [b"abc"] * 3


def test_plain_app_that_is_kept_waiting_by_a_client_that_left_is_let_go(bench: Make) -> None:
    ended: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not ended:
            await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
            if len(client.out) > 60_000 and client.transport.lost:
                ended.append("end")

    one = bench(app)
    client = one.connect()
    client.transport.stuck = True
    client.send(GET)
    assert client.protocol.paused and not ended
    client.lose()
    assert ended == ["end"]
