"""The data plane put together: state, dispatch, the doors of a request.

What lives here: `State`, one immutable generation of the configuration; `App`,
the ASGI callable and everything that outlives a generation. What must not: the
steps of a call (`relay`), processes (`worker`). Heat: R.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Final

from nbgate import deliver
from nbgate.allowance import Allowances, LocalSource
from nbgate.auth import Directory, Proxies
from nbgate.call import ORIGIN, Call, ClientGone, Receive, Send
from nbgate.channels import RetryBudget, Table
from nbgate.config import Config
from nbgate.errors import ERRORS, GateError, error_body, error_headers
from nbgate.local import LOCAL
from nbgate.logs import AccessLog, CallRecord
from nbgate.metrics import Metrics
from nbgate.outbound import Outbound
from nbgate.overload import Overload
from nbgate.pins import Pins
from nbgate.relay import relay
from nbgate.routes import find, methods
from nbgate.upstream import Pool, PoolLimits

if TYPE_CHECKING:
    from nbgate.server.listener import Server

logger = logging.getLogger("nbgate.app")

FLUSH_S: Final = 0.25
_TICKS_A_SNAPSHOT: Final = 4  # one second
_PREFLIGHT_S: Final = b"600"


class State:
    """One generation of the configuration; replaced whole, never changed."""

    def __init__(self, config: Config, run_dir: str, old: State | None = None) -> None:
        self.config = config
        self.made_at = time.time()
        self.site = config.site
        self.table: Table = Table(config, old.table if old is not None else None)
        for target in self.table.targets:
            target.wire = Outbound(target, os.path.join(run_dir, "demo.sock"))
        self.directory = Directory.from_config(config)
        self.proxies: Proxies = Proxies(config.server.trusted_proxies)
        self.metrics_networks = tuple(ip_network(n, strict=False) for n in config.admin.metrics_networks)
        self.allow_query_key = config.server.allow_query_key
        self.max_body_bytes = config.server.max_body_mb << 20
        self.hold_bytes = config.streaming.hold_kb << 10
        self.keepalive_s = config.streaming.keepalive_s
        self.tries = config.router.tries
        self.default_channel = config.router.default_channel
        defaults = config.router.default_models
        self.default_models = {"images": defaults.images, "moderations": defaults.moderations}
        self.cors = frozenset(origin.encode() for origin in config.cors.origins)
        self.public_models = self.models_of(("default",))

    def models_of(self, groups: tuple[str, ...]) -> list[str]:
        """List the models that callers of these groups can name."""
        named = self.table.models(groups)
        priced = [m for m in self.config.models if m not in named and self.table.knows(m, groups)]
        return named + priced


class App:
    """The ASGI application of one worker.

    `run_dir`: where the workers of a node meet (metrics, pins, the demo's
    socket); "" for a worker alone, as under another ASGI server.
    """

    nbgate_eager = True

    def __init__(self, config: Config, slot: int = 0, workers: int = 1, run_dir: str = "") -> None:
        self.slot = slot
        self.run_dir = run_dir
        self.state = State(config, run_dir)
        self.pool = Pool(_pool_limits(config))
        self.allowances = Allowances(LocalSource(slot, workers))
        self.budget = RetryBudget(config.router.retry_budget_percent)
        self.pins = Pins(run_dir, slot)
        self.metrics = Metrics(slot, run_dir)
        self.metrics.before = self._set_gauges
        self.access = AccessLog(config.logging.access)
        self.metrics.access_log = self.access
        self.ready = False
        self.loop_lag_s = 0.0
        self.overload = Overload()
        self.shedding = ""  # why new calls are refused; "" = they are not
        self.random = random.random
        self.wall = time.time
        self._server: Server | None = None
        self._prefix = secrets.token_hex(6)
        self._count = 0
        self._ticks = 0
        self._ticker: asyncio.TimerHandle | None = None

    # life

    def attach(self, server: Server) -> None:
        """Know the server, for its gauges and its drain."""
        self._server = server

    def swap(self, config: Config) -> None:
        """Serve new calls by a new configuration; calls under way keep theirs."""
        old = self.state
        made = State(config, self.run_dir, old)
        self.state = made
        self.budget.set_percent(config.router.retry_budget_percent)
        kept = {t.wire.endpoint for t in made.table.targets}
        for target in old.table.targets:
            if target.wire.endpoint not in kept:
                self.pool.retire(target.wire.endpoint)
        if config.logging.access != old.config.logging.access:
            self.access.close()
            self.metrics.access_log = self.access = AccessLog(config.logging.access)

    def watch(self, now: float, lag_s: float, resident_bytes: int) -> None:
        """Take the load of the process; whoever owns the loop calls this, ten times a second."""
        self.loop_lag_s = lag_s
        for line in self.overload.look(now, lag_s, resident_bytes):
            logger.warning(line)
        self.shedding = self.overload.refusing
        if self._server is not None:
            self._server.overloaded = self.overload.memory != 0

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.pool.start()
                self._tick()
                self.ready = True
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def shutdown(self) -> None:
        """Close what is open; logs and metrics are written."""
        self.ready = False
        if self._ticker is not None:
            self._ticker.cancel()
        await self.pool.close()
        self.pins.close()
        self.access.close()
        self.metrics.close()

    def _tick(self) -> None:
        self._ticks += 1
        self.access.flush()
        if self._ticks % _TICKS_A_SNAPSHOT == 0:
            self.metrics.write()
        self._ticker = asyncio.get_running_loop().call_later(FLUSH_S, self._tick)

    # a request

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._lifespan(receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        call = Call(self, scope, receive, send)
        try:
            match = find(scope["raw_path"], scope["method"])
            call.match = match
            route = match.route
            call.record.operation = route.operation
            if route.auth:
                call.authenticate(route.family)
            local = LOCAL.get(route.operation)
            if local is not None:
                await local(call)
            elif self.shedding:
                raise self._shed(self.shedding)
            elif "nbgate.splice" in scope.get("extensions", ()):
                await relay(call)
            else:
                await deliver.attended(call, relay)
        except GateError as exc:
            await self._refuse(call, exc)
        except (ClientGone, asyncio.CancelledError) as exc:
            self._note_gone(call)
            if isinstance(exc, asyncio.CancelledError):
                raise
        except Exception:
            logger.exception("call %s failed", call.request_id)
            if call.begun:
                call.record.error, call.record.error_source = "internal_server_error", "gate"
                raise
            await call.refuse(GateError("internal_server_error"))
        finally:
            call.close()

    def _shed(self, reason: str) -> GateError:
        """Count and word the refusal of a call for want of room."""
        self.metrics.totals.counts[f"shed_{reason}"] += 1
        wait_s = 1.0 + 2.0 * self.random()  # spread, or all of them would be back at once
        return GateError("service_unavailable", "The gateway is overloaded. Please retry soon.", retry_after_s=wait_s)

    async def _refuse(self, call: Call, exc: GateError) -> None:
        if call.begun:
            raise exc
        if call.scope["method"] == "OPTIONS" and call.values[ORIGIN] is not None:
            await self._preflight(call)
        else:
            await call.refuse(exc)

    async def _preflight(self, call: Call) -> None:
        """Answer a browser's question; needs no key (Fetch standard, CORS preflight)."""
        if not call.cors_lines():
            await call.refuse(GateError("permission_denied", "This origin is not allowed."))
            return
        allowed = ", ".join(methods(call.scope["raw_path"])) or "GET, POST"
        wanted = next((v for n, v in call.scope["headers"] if n == b"access-control-request-headers"), b"*")
        more = [
            (b"access-control-allow-methods", allowed.encode()),
            (b"access-control-allow-headers", wanted[:1024]),
            (b"access-control-max-age", _PREFLIGHT_S),
        ]
        await call.answer(204, b"text/plain", b"", more)

    def _note_gone(self, call: Call) -> None:
        log = call.record
        log.status = 499
        log.outcome = "client_gone"
        log.error, log.error_source = "client_closed_request", "client"

    def next_id(self) -> str:
        """Make a request id; a label, unique over processes."""
        self._count += 1
        return f"req_{self._prefix}{self._count:08x}"

    def note(self, record: CallRecord) -> None:
        """Take the record of a finished call."""
        self.access.add(record)
        self.metrics.observe(record)

    def nbgate_reject(self, status: int, code: str, message: str, target: bytes) -> tuple[bytes, bytes]:
        """Word and note what the server answers without the app."""
        error = GateError(code if code in ERRORS else "invalid_request_error", message)
        if status == 503:
            error.retry_after_s = 1.0
        request_id = self.next_id()
        family = "claude" if b"/messages" in target else "openai"
        lines = [b"content-type: application/json\r\nx-request-id: %b\r\n" % request_id.encode()]
        if family == "claude":
            lines.append(b"request-id: %b\r\n" % request_id.encode())
        lines += [b"%b: %b\r\n" % pair for pair in error_headers(error)]
        body = error_body(error, family, request_id)
        self.note(
            CallRecord(
                started=time.monotonic(),
                request_id=request_id,
                target=target,
                status=status,
                bytes_out=len(body),
                outcome="rejected",
                error=error.code,
                error_source=error.source,
            )
        )
        return b"".join(lines), body

    def _set_gauges(self) -> None:
        """Read the gauges of this worker."""
        gauges = self.metrics.gauges
        gauges.loop_lag_seconds = self.loop_lag_s
        gauges.overload_memory = self.overload.memory
        gauges.overload_lag = self.overload.lag
        gauges.upstream_in_use = self.pool.lent
        gauges.upstream_idle = self.pool.total - self.pool.lent
        gauges.upstream_waiting = self.pool.waiting
        if self._server is not None:
            stats = self._server.stats
            gauges.connections = stats.connections
            gauges.streams_open = stats.streams
            gauges.requests_active = stats.active_requests
            self.metrics.follow("refused", stats.refused)
            self.metrics.follow("timeouts", stats.timeouts)
            self.metrics.follow("stalled", stats.stalled)
            self.metrics.follow("rejected", stats.rejected)


def _pool_limits(config: Config) -> PoolLimits:
    upstream = config.upstream
    return PoolLimits(
        max_connections=upstream.max_connections,
        max_per_endpoint=upstream.max_per_channel,
        max_waiters=upstream.max_waiters,
        wait_s=upstream.wait_s,
        idle_s=upstream.idle_s,
        dns_cache_s=upstream.dns_cache_s,
        max_head_bytes=upstream.max_head_kb << 10,
    )
