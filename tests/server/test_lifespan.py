"""The app's lifespan, and the ticker that outlives a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from serverkit import GET, Bench, answer, eager, under_uvloop

from nbgate.server.listener import Server, Settings


def test_lifespan_runs_startup_before_and_shutdown_after_the_requests() -> None:
    log: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for word in ("startup", "shutdown"):
            message = await receive()
            log.append(message["type"])
            await send({"type": f"lifespan.{word}.complete"})

    async def main() -> None:
        server = Server(app, Settings(tick_s=0.02))
        await server.start([])
        assert log == ["lifespan.startup"]
        await server.stop()

    under_uvloop(main())
    assert log == ["lifespan.startup", "lifespan.shutdown"]


@pytest.mark.parametrize("raises", [ValueError, AssertionError, KeyError, asyncio.CancelledError])
def test_app_without_lifespan_is_served_all_the_same(raises: type[BaseException]) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise raises("http only")

    async def main() -> None:
        server = Server(app, Settings(tick_s=0.02))
        await server.start([])
        await server.stop()

    under_uvloop(main(), timeout_s=3.0)


def test_app_that_fails_to_start_stops_the_server() -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    async def main() -> None:
        with pytest.raises(RuntimeError, match="no database"):
            await Server(app).start([])

    under_uvloop(main(), timeout_s=3.0)


@pytest.mark.parametrize("when", ["after startup", "in shutdown", "failed"])
def test_app_whose_lifespan_ends_badly_does_not_hang_the_stop(when: str) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if when == "after startup":
            raise ValueError("died")
        await receive()
        if when == "failed":
            await send({"type": "lifespan.shutdown.failed"})
        else:
            raise ValueError("died")

    async def main() -> None:
        server = Server(app, Settings(tick_s=0.02))
        await server.start([])
        await asyncio.sleep(0)
        await server.stop()

    under_uvloop(main(), timeout_s=3.0)


def test_ticker_goes_on_after_a_failure_in_one_tick(bench: Callable[..., Bench]) -> None:
    @eager
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send)

    one = bench(app)
    client = one.connect().send(GET)

    def broken(now: float, crowded: bool) -> None:
        raise ValueError("tick")

    class Protocol:
        tick = staticmethod(broken)

    odd: Any = Protocol()
    one.server.connections.add(odd)
    with pytest.raises(ValueError, match="tick"):
        one.tick()
    assert one.server._ticker is not None and not one.server._ticker.cancelled()
    one.server.connections.discard(odd)
    one.advance(100.0)
    assert client.transport.closed
