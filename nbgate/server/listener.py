"""The server as a whole: sockets, the ticker, drain.

What lives here: `Server`, what all its connections share. What must not: the
state of one connection. Heat: K, and once a tick.

Law: time is looked at once a tick (`now`, coarse to `tick_s`) for every
connection, so no connection owns a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from .protocol import HttpProtocol
from .settings import Rejection, Settings, Stats, plain_rejection
from .splice import Splice

__all__ = ["Server", "Settings", "Stats"]

logger = logging.getLogger("nbgate.server")

App = Callable[..., Any]

BACKLOG: Final = 4096
NO_LINGER: Final = struct.pack("ii", 1, 0)
# Envoy's scaled timeouts: idle connections go sooner from here on, and soonest from there.
CROWDED_FROM: Final = 0.85
CROWDED_TO: Final = 0.95


class Server:
    """Serve one ASGI app on any number of listening sockets."""

    def __init__(self, app: App, settings: Settings | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self.settings = settings or Settings()
        self.eager = bool(getattr(app, "nbgate_eager", False))
        # An app may word the answers to what it never sees: see `settings.plain_rejection`.
        self.reject: Rejection = getattr(app, "nbgate_reject", plain_rejection)
        self.stats = Stats()
        self.draining = False
        self.overloaded = False  # set from outside: new requests get no keep-alive
        self.connections: set[HttpProtocol] = set()
        self.splices: set[Splice] = set()
        self.tasks: set[asyncio.Task[None]] = set()  # of apps that are not eager
        self.now = clock()
        self.date_line = _date_line()
        self.loop: asyncio.AbstractEventLoop
        self._clock = clock
        self._servers: list[asyncio.AbstractServer] = []
        self._socks: list[socket.socket] = []  # the same, to accept by hand
        self._ticker: asyncio.TimerHandle | None = None
        self._addresses: dict[str, int] = {}
        self._lifespan = Lifespan(app)

    async def start(self, socks: list[socket.socket]) -> None:
        """Start the app, then accept. Raises: RuntimeError if the app will not."""
        self.loop = asyncio.get_running_loop()
        await self._lifespan.startup()
        self._tick()
        for sock in socks:
            self._servers.append(await self.loop.create_server(self._protocol, sock=sock, backlog=BACKLOG))
            self._socks.append(sock)

    def _protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, HttpProtocol(self))

    def stop_accepting(self) -> None:
        """Close the listening sockets of this process."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._socks.clear()

    async def drain(self, plain_s: float, streams_s: float, *, queued: bool = True) -> None:
        """Let answers end: plain ones `plain_s`, streams `streams_s`.

        `queued`: also serve who waits in the accept queues, which end with the
        last process that holds them; False where another one goes on to accept.
        May be cancelled and begun again with other times.
        """
        self.draining = True
        waiting = self._take_queued() if queued else []
        self.stop_accepting()
        if waiting:
            made = (self.loop.connect_accepted_socket(self._protocol, sock) for sock in waiting)
            await asyncio.gather(*made, return_exceptions=True)
        self.now = self._clock()
        for protocol in tuple(self.connections):
            protocol.drain()
        start = self._clock()
        await self._until_empty(start + plain_s, streams=False)
        for protocol in tuple(self.connections):
            if protocol.cycle is None or protocol.cycle.splice is None:
                protocol.cut()
        await self._until_empty(start + streams_s, streams=True)
        for splice in tuple(self.splices):
            splice.drain()
        await self._until_empty(self._clock() + 1.0, streams=True)
        for protocol in tuple(self.connections):
            protocol.cut()

    def _take_queued(self) -> list[socket.socket]:
        """Accept whoever waits; closing the listeners would reset them."""
        found: list[socket.socket] = []
        for sock in self._socks:
            while len(found) < BACKLOG:
                try:
                    found.append(sock.accept()[0])
                except ConnectionError:  # that one has left
                    continue
                except OSError:  # none left, or no descriptor
                    break
        for sock in found:
            sock.setblocking(False)
        return found

    async def _until_empty(self, until: float, streams: bool) -> None:
        """Sleep until nothing is left, or `until`; streams may be left to wait."""
        while self.connections and self._clock() < until:
            if not streams and all(p.cycle is not None and p.cycle.splice is not None for p in self.connections):
                return
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End every connection and the app."""
        self.stop_accepting()
        if self._ticker is not None:
            self._ticker.cancel()
        for protocol in tuple(self.connections):
            protocol.cut()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=1.0)
        await self._until_empty(self._clock() + 1.0, streams=True)
        await self._lifespan.shutdown()

    # connections

    def admit(self, protocol: HttpProtocol) -> bool:
        """Count a new connection; False past a bound."""
        stats, settings = self.stats, self.settings
        stats.accepted += 1
        self.connections.add(protocol)
        stats.connections = held = len(self.connections)
        refused = held > settings.max_connections
        if settings.max_connections_per_address and protocol.peer is not None:
            address = protocol.peer[0]
            count = self._addresses[address] = self._addresses.get(address, 0) + 1
            refused = refused or count > settings.max_connections_per_address
        if refused:
            stats.refused += 1
        return not refused

    def forget(self, protocol: HttpProtocol) -> None:
        """A connection is gone."""
        self.connections.discard(protocol)
        self.stats.connections = len(self.connections)
        if self._addresses and protocol.peer is not None:
            address = protocol.peer[0]
            left = self._addresses.get(address, 0) - 1
            if left > 0:
                self._addresses[address] = left
            else:
                self._addresses.pop(address, None)

    def reset(self, protocol: HttpProtocol) -> None:
        """End a connection whose client reads nothing, by RST.

        NOTE: after a plain close the kernel would keep what was not read, megabytes, until it gives that client up
        (nginx: reset_timedout_connection).
        """
        sock = protocol.transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # a unix socket knows no RST
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        protocol.cut()

    def _tick(self) -> None:
        """Move the clock, look at every deadline, feed silent streams."""
        settings = self.settings
        self._ticker = self.loop.call_later(settings.tick_s, self._tick)  # first: whatever fails below, time goes on
        self.now = now = self._clock()
        self.date_line = _date_line()
        crowded_s = self._crowded_s()
        for protocol in tuple(self.connections):
            protocol.tick(now, crowded_s)
        for splice in tuple(self.splices):
            splice.tick(settings.tick_s, settings.stream_keepalive_s)

    def _crowded_s(self) -> float:
        """Give how long a connection may idle near the bound; 0 = as ever."""
        settings = self.settings
        share = len(self.connections) / settings.max_connections
        if share <= CROWDED_FROM:
            return 0.0
        room = max(0.0, (CROWDED_TO - share) / (CROWDED_TO - CROWDED_FROM))
        longest, shortest = settings.keepalive_s, min(settings.keepalive_s, settings.crowded_keepalive_s)
        return shortest + (longest - shortest) * room


class Lifespan:
    """Run the app's lifespan, if it has one."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._task: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._supported = True

    async def _run(self) -> None:
        scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
        receive: Callable[[], Awaitable[dict[str, Any]]] = self._inbox.get
        try:
            await self._app(scope, receive, self._outbox.put)
        except Exception:
            logger.debug("app without lifespan", exc_info=True)
        finally:
            self._supported = False
            self._outbox.put_nowait({"type": "lifespan.none"})

    async def startup(self) -> None:
        """Send startup; an app that knows no lifespan is fine."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        await self._inbox.put({"type": "lifespan.startup"})
        message = await self._outbox.get()
        if message["type"] == "lifespan.startup.failed":
            raise RuntimeError(f"the app failed to start: {message.get('message', '')}")

    async def shutdown(self) -> None:
        """Send shutdown and wait for the app."""
        if self._task is None or not self._supported:
            return
        await self._inbox.put({"type": "lifespan.shutdown"})
        await self._outbox.get()
        await self._task


def _date_line() -> bytes:
    return b"date: %b\r\n" % email.utils.formatdate(usegmt=True).encode()
