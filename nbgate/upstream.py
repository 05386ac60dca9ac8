"""Pool upstream connections: reuse the warmest, dial within bounds.

What lives here: `Pool`, with its lanes (one per endpoint), its queue and its
one ticker. What must not: HTTP (`exchange.py`, `upstream_wire.py`), DNS and
TLS (`dial.py`). Heat: R for `idle` and `put`, K for the rest.

Law: a wire is in one place only: idle in its lane, or lent to one
`Connection`. A claim that waits has a place in the queue or is *due*, and a lane
has never more due claims than dials under way. Bounds count those dials, too.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import cast

import msgspec

from nbgate.dial import Clock, Dialer, Endpoint, Resolve, UpstreamError, resolve_by_loop
from nbgate.exchange import Connection, Sink, Timeouts
from nbgate.server.waiter import Waiter
from nbgate.upstream_wire import WANTED, Wire

__all__ = ["WANTED", "Connection", "Endpoint", "Pool", "PoolLimits", "Sink", "Timeouts", "UpstreamError"]

log = logging.getLogger("nbgate.upstream")


class PoolLimits(msgspec.Struct, frozen=True):
    """Bound a pool; names as in [upstream]. 0 = no bound, for the first two."""

    max_connections: int = 0
    max_per_endpoint: int = 0
    max_waiters: int = 1000
    wait_s: float = 5.0
    idle_s: float = 55.0
    dns_cache_s: float = 30.0
    max_head_bytes: int = 64 * 1024
    tick_s: float = 0.25


class Lane:
    """Keep the wires of one endpoint."""

    __slots__ = ("claims", "dialling", "due", "endpoint", "generation", "idle", "total", "wanted")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.wanted = WANTED | endpoint.extra
        self.generation = 0
        self.total = 0  # idle, lent and being dialled
        self.dialling = 0
        self.due = 0  # claims that a dial will serve
        self.idle: list[Wire] = []  # the warmest last
        self.claims: dict[Claim, None] = {}  # the oldest first


class Claim:
    """Wait for one wire."""

    __slots__ = ("connect_s", "deadline", "error", "lane", "waiter", "wire")

    def __init__(self, lane: Lane, connect_s: float) -> None:
        self.lane = lane
        self.connect_s = connect_s
        self.deadline = 0.0  # of the wait in the queue
        self.waiter = Waiter()
        self.wire: Wire | None = None
        self.error: UpstreamError | None = None


class Pool:
    """Lend connections to upstreams.

    Attributes for the metrics: `total` connections, `lent` and `waiting` now;
    `dials`, `dial_failures` and `refusals` so far.
    """

    def __init__(self, limits: PoolLimits, clock: Clock = time.monotonic, resolve: Resolve = resolve_by_loop) -> None:
        self.limits = limits
        self.clock = clock
        self.now = clock()  # as of the last tick
        self.total = 0
        self.dials = 0
        self.dial_failures = 0
        self.refusals = 0
        self._max_total = limits.max_connections or 1 << 62
        self._max_lane = limits.max_per_endpoint or 1 << 62
        self._lanes: dict[Endpoint, Lane] = {}
        self._wires: set[Wire] = set()
        self._queue: dict[Claim, None] = {}  # claims without a dial, the oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._dialer = Dialer(limits.dns_cache_s, clock, resolve)
        self._ticker: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Return how many callers wait for room."""
        return len(self._queue)

    @property
    def lent(self) -> int:
        """Return how many connections are at work."""
        return len(self._wires) - sum(len(lane.idle) for lane in self._lanes.values())

    async def start(self) -> None:
        """Start the ticker on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tick()

    async def close(self) -> None:
        """Abort every exchange, dial and claim, and wait for the dials."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        self._dialer.close()
        for lane in list(self._lanes.values()):
            for claim in list(lane.claims):
                self._refuse(claim, UpstreamError("dial", "shutting down"))
        for wire in list(self._wires):
            if wire.exchange is not None:
                wire.exchange.fail("lost", "shutting down")
            else:
                wire.close()
        if tasks:
            await asyncio.wait(tasks)

    # lending

    def idle(self, endpoint: Endpoint) -> Connection | None:
        """Lend the warmest idle connection, if there is one."""
        lane = self._lanes.get(endpoint)
        if lane is None or not lane.idle:
            return None
        return Connection(lane.idle.pop(), True)

    async def acquire(self, endpoint: Endpoint, connect_s: float, fresh: bool = False) -> Connection:
        """Lend an idle connection, dial one, or wait for room.

        `fresh`: not an idle one, for a second try after a stale connection.

        Raises:
            UpstreamError: the dial's failure; busy when the queue is full or
                the wait was too long.
        Cancellation: a dial goes on, for the next who asks.
        """
        lane = self.lane(endpoint)
        if lane.idle and not fresh:
            return Connection(lane.idle.pop(), True)
        if self._closed:
            raise UpstreamError("dial", "shutting down")
        claim = Claim(lane, connect_s)
        if lane.idle and lane.total >= self._max_lane:  # fresh, and no room but theirs
            lane.idle[0].close()
        if lane.due < lane.dialling:  # whoever asked for that dial was served by another or left
            lane.due += 1
        elif lane.total < self._max_lane and (self.total < self._max_total or self._evict()):
            self._dial(claim)
        elif len(self._queue) < self.limits.max_waiters:
            claim.deadline = self.clock() + self.limits.wait_s
            self._queue[claim] = None
        else:
            self.refusals += 1
            raise UpstreamError("busy", f"{self.limits.max_waiters} calls wait for a connection already")
        lane.claims[claim] = None
        try:
            await claim.waiter
        except asyncio.CancelledError:
            self._drop(claim)
            if claim.wire is not None:
                self.put(claim.wire)
            raise
        wire = claim.wire
        if wire is None:
            raise claim.error or UpstreamError("lost", "no connection")
        return Connection(wire, wire.idle_since > 0.0)

    def retire(self, endpoint: Endpoint) -> None:
        """Let no connection of this endpoint serve another call."""
        self._dialer.forget(endpoint)
        lane = self._lanes.get(endpoint)
        if lane is None:
            return
        lane.generation += 1
        for wire in list(lane.idle):
            wire.close()
        self._prune(lane)

    # what wires call

    def put(self, wire: Wire) -> None:
        """Take back a wire that is fit for another exchange."""
        lane = wire.lane
        if wire.gone:
            return
        if wire.generation != lane.generation or self._closed:
            wire.close()
            return
        wire.idle_since = self.now
        if lane.claims:
            self._serve(next(iter(lane.claims)), wire)
            return
        lane.idle.append(wire)
        if self._queue:
            self._fill()

    def forget(self, wire: Wire) -> None:
        """Strike a closed wire off the books."""
        if wire in self._wires:
            self._wires.remove(wire)
            lane = wire.lane
            if wire in lane.idle:
                lane.idle.remove(wire)
            self._give_room(lane)

    def lane(self, endpoint: Endpoint) -> Lane:
        """Return the endpoint's lane, made at need."""
        lane = self._lanes.get(endpoint)
        if lane is None:
            lane = self._lanes[endpoint] = Lane(endpoint)
        return lane

    # claims

    def _serve(self, claim: Claim, wire: Wire) -> None:
        self._drop(claim)
        claim.wire = wire
        claim.waiter.wake()

    def _refuse(self, claim: Claim, error: UpstreamError) -> None:
        self._drop(claim)
        claim.error = error
        claim.waiter.wake()

    def _drop(self, claim: Claim) -> None:
        lane = claim.lane
        if claim in lane.claims:
            del lane.claims[claim]
            if claim in self._queue:
                del self._queue[claim]
            else:
                lane.due -= 1

    def _give_room(self, lane: Lane) -> None:
        lane.total -= 1
        self.total -= 1
        if self._queue:
            self._fill()
        if lane.generation:
            self._prune(lane)

    def _fill(self) -> None:
        """Dial for those in the queue for whom there is room now."""
        for claim in list(self._queue):
            if self._closed:
                return
            if claim in self._queue and claim.lane.total < self._max_lane:
                if self.total >= self._max_total and not self._evict():
                    return
                self._queue.pop(claim, None)
                self._dial(claim)

    def _evict(self) -> bool:
        """Close the connection that has idled longest, of any lane."""
        oldest = min((lane.idle[0] for lane in self._lanes.values() if lane.idle), key=_idle_since, default=None)
        if oldest is None:
            return False
        queue, self._queue = self._queue, {}  # the room is the caller's, not the queue's
        oldest.close()
        self._queue = queue
        return True

    def _prune(self, lane: Lane) -> None:
        if not lane.total and not lane.claims and self._lanes.get(lane.endpoint) is lane:
            del self._lanes[lane.endpoint]

    # dialling

    def _dial(self, claim: Claim) -> None:
        lane = claim.lane
        self._lanes[lane.endpoint] = lane  # pruned, perhaps, when its last connection made room for this one
        lane.due += 1
        lane.dialling += 1
        lane.total += 1
        self.total += 1
        self.dials += 1
        wire = Wire(self, lane)
        task = self._loop.create_task(self._dialer.dial(lane.endpoint, cast(asyncio.Protocol, wire), claim.connect_s))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._dialled, claim, wire))

    def _dialled(self, claim: Claim, wire: Wire, task: asyncio.Task[None]) -> None:
        """Hand on what a dial came to; outside its task, for wakes run code."""
        self._tasks.discard(task)
        lane = claim.lane
        lane.dialling -= 1
        if claim not in lane.claims:  # gone: another claim may count on this dial
            heirs = (each for each in lane.claims if each not in self._queue)
            heir = next(heirs, None) if lane.due > lane.dialling else None
        else:
            heir = claim
        exc = None if task.cancelled() else task.exception()
        if task.cancelled() or exc is not None or wire.gone or self._closed:
            wire.close()  # not in the books yet
            self.dial_failures += 1
            self._give_room(lane)
            if heir is not None and heir in lane.claims:
                self._refuse(heir, _as_upstream_error(exc))
            return
        self._wires.add(wire)
        if heir is not None:
            self._serve(heir, wire)
        else:
            self.put(wire)

    # time

    def _tick(self) -> None:
        """Look at every deadline; the only timer there is."""
        self._ticker = self._loop.call_later(self.limits.tick_s, self._tick)
        self.now = now = self.clock()
        for wire in list(self._wires):
            exchange = wire.exchange
            if exchange is not None:
                exchange.check(now)
        stale = now - self.limits.idle_s
        for lane in list(self._lanes.values()):
            idle = lane.idle
            while idle and idle[0].idle_since <= stale:
                idle[0].close()
        for claim in list(self._queue):
            if claim.deadline <= now and claim in self._queue:
                self.refusals += 1
                self._refuse(claim, UpstreamError("busy", f"no connection free in {self.limits.wait_s:g} s"))


def _idle_since(wire: Wire) -> float:
    return wire.idle_since


def _as_upstream_error(exc: BaseException | None) -> UpstreamError:
    if isinstance(exc, UpstreamError):
        return exc
    if exc is None:
        return UpstreamError("dial", "closed at once")
    log.error("dial failed in an unforeseen way", exc_info=exc)
    return UpstreamError("dial", str(exc))
