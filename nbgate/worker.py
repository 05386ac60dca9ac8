"""A worker process: one event loop, one server, one app, started by the supervisor.

Purpose: turn arguments and a configuration snapshot into a running data plane, and end it well.
Lives here: the loop, signals, limits of the process, the map from configuration to server bounds.
Must not: requests, SQL, restarts. Heat: cold, but for the sampler of lag and memory (10 a second).

`--describe` only validates a file and prints what the supervisor must know of it, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from nbgate.children import BEAT, EX_CONFIG, READY
from nbgate.config import Config, ConfigError, load, parse_listen, restart_only

if TYPE_CHECKING:
    from nbgate.app import App
    from nbgate.server.listener import Server, Settings

BEAT_S: Final = 2.0
LAG_SAMPLE_S: Final = 0.1
ORPHAN_DRAIN_S: Final = 5.0  # when the supervisor is gone
# PERF: cyclic garbage is rare by design; 50,000 allocations between young collections instead of 700.
GC_THRESHOLDS: Final = (50_000, 20, 20)
MAX_CONNECTIONS: Final = 20_000
RELIEF_S: Final = 10.0  # between two attempts to give memory back

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

logger = logging.getLogger("nbgate.worker")


def describe(config: Config) -> dict[str, Any]:
    """Say what the supervisor must know; the fields of `plan.Plan`."""
    server = config.server
    demo_models = (m for c in config.channels.values() if c.type == "demo" and c.enabled for m in c.models)
    plain = [name for name in (*demo_models, *config.models) if not set(name) & set("*?[")]
    return {
        "listen": [tuple(parse_listen(text)) for text in server.listen],
        "workers": workers(config),
        "data_dir": server.data_dir,
        "drain_s": server.drain_s,
        "drain_streams_s": server.drain_streams_s,
        "drain_roll_s": roll_s(config),
        "demo": config.has_demo,
        "demo_key": config.demo.key,
        "demo_model": plain[0] if plain else "gpt-4o",
        "admin_key": bool(config.admin.key),
        "restart": restart_only(config),
    }


def workers(config: Config) -> int:
    """Count the workers: as configured, or one per usable core."""
    return config.server.workers or len(os.sched_getaffinity(0))


def roll_s(config: Config) -> float:
    """Say how long an answer may take at most: so long a worker gives way in a roll."""
    totals = (channel.timeouts.total_s for channel in config.channels.values() if channel.enabled)
    return max([config.server.drain_streams_s, *totals])


def memory_bytes(config: Config) -> int:
    """Bound of one worker's memory: as configured, or its share of half the RAM."""
    if config.server.memory_mb:
        return config.server.memory_mb << 20
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return ram // 2 // workers(config)


def settings(config: Config) -> Settings:
    """Translate the configuration into the server's bounds."""
    from nbgate.server.listener import Settings

    server = config.server
    third = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3
    return Settings(
        max_line_bytes=server.max_line_kb << 10,
        max_head_bytes=server.max_head_kb << 10,
        max_headers=server.max_headers,
        max_body_bytes=server.max_body_mb << 20,
        max_upload_bytes=server.max_upload_mb << 20,
        body_memory_bytes=memory_bytes(config) // 4,
        head_timeout_s=server.head_timeout_s,
        body_timeout_s=server.body_timeout_s,
        body_min_bytes_per_s=server.body_min_bytes_per_s,
        keepalive_s=server.keepalive_s,
        max_connections=server.max_connections or min(third, MAX_CONNECTIONS),
        max_connections_per_address=server.max_connections_per_address,
        max_requests_per_connection=server.max_requests_per_connection,
        write_high_bytes=server.write_high_kb << 10,
        write_timeout_s=server.write_timeout_s,
        stream_keepalive_s=config.streaming.keepalive_s,
        trusted_proxies=server.trusted_proxies,
    )


def resident_bytes() -> int:
    """Read the resident memory of this process; 0 where it cannot be read."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def relieve() -> None:
    """Give back what is free but held: no worker may refuse calls for it for ever."""
    import ctypes

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every libc has it
        ctypes.CDLL(None).malloc_trim(0)


class Worker:
    """One running worker; lives as long as its process."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.args = args
        self.config = config
        self.loop: asyncio.AbstractEventLoop
        self.app: App
        self.server: Server
        self.told: asyncio.Event  # to end, or to give way
        self.ended: asyncio.Event
        self.orphaned = False
        self._relieve_at = 0.0
        self._reloading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until SIGTERM, SIGUSR2 or the supervisor's death, then drain."""
        from nbgate.app import App
        from nbgate.server.listener import Server

        self.loop = asyncio.get_running_loop()
        self.told, self.ended = asyncio.Event(), asyncio.Event()
        self.app = App(self.config, slot=self.args.slot, workers=self.args.workers, run_dir=self.args.run_dir)
        self.server = Server(self.app, settings(self.config))
        self.app.attach(self.server)
        self.app.overload.memory_bytes = memory_bytes(self.config)
        # Signal handlers only set a flag or start the work in the loop.
        self.loop.add_signal_handler(signal.SIGTERM, self._on_term)
        self.loop.add_signal_handler(signal.SIGUSR2, self.told.set)
        self.loop.add_signal_handler(signal.SIGHUP, self._on_hup)
        self.loop.add_reader(self.args.control_fd, self._on_control)
        await self.server.start([socket.socket(fileno=fd) for fd in self.args.fds])
        # What lives now lives for good: out of the collector's sight.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._sample(self.loop.time())
        self._write(READY)
        self._beat()
        await self.told.wait()
        if not self.ended.is_set():
            await self._give_way()
        await self._end()

    async def _give_way(self) -> None:
        """Let all answers end while the successor serves; SIGTERM cuts it short."""
        longest = roll_s(self.config)
        drain = self.loop.create_task(self.server.drain(longest, longest, queued=False))
        ended = self.loop.create_task(self.ended.wait())
        await asyncio.wait((drain, ended), return_when=asyncio.FIRST_COMPLETED)
        for task in (drain, ended):
            task.cancel()
        await asyncio.wait((drain, ended))

    async def _end(self) -> None:
        # The successor answers for a worker that gave way: /readyz speaks of the node.
        self.app.ready = self.app.ready and not self.ended.is_set()
        bounds = self.config.server
        longest = ORPHAN_DRAIN_S if self.orphaned else bounds.drain_streams_s
        await self.server.drain(min(bounds.drain_s, longest), longest)
        if self._reloading is not None:
            self._reloading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reloading
        await self.server.stop()

    def _sample(self, due: float) -> None:
        """Measure how late the loop is and what memory is held, ten times a second."""
        now = self.loop.time()
        self.app.watch(now, max(0.0, now - due), resident_bytes())
        if self.app.overload.memory and now >= self._relieve_at:
            self._relieve_at = now + RELIEF_S
            relieve()
        self.loop.call_at(now + LAG_SAMPLE_S, self._sample, now + LAG_SAMPLE_S)

    def _beat(self) -> None:
        self._write(BEAT)
        self.loop.call_later(BEAT_S, self._beat)

    def _write(self, byte: bytes) -> None:
        # A full pipe means a stopped supervisor: it will find the beats later.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self.args.beat_fd, byte)

    def _on_term(self) -> None:
        self.ended.set()
        self.told.set()

    def _on_control(self) -> None:
        if not os.read(self.args.control_fd, 4096):
            self.loop.remove_reader(self.args.control_fd)
            self.orphaned = True
            self._on_term()

    def _on_hup(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = self.loop.create_task(self._reload())
        else:
            self._reloading.add_done_callback(lambda _: self._on_hup())

    async def _reload(self) -> None:
        """Swap to the snapshot that the supervisor validated."""
        from nbgate import logs

        try:
            config = await self.loop.run_in_executor(None, load, self.args.config, None, self.args.name)
            self.app.swap(config)
            # Whoever rotates the log says so by SIGHUP.
            self.app.access.reopen()
        except Exception as exc:
            logger.error("reload failed, the old configuration stays: %s", exc)
            return
        self.config = config
        self.app.overload.memory_bytes = memory_bytes(config)
        logs.setup(config.logging.level)
        self.server.settings = settings(config)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nbgate.worker", description="Started by nbgate's supervisor.")
    parser.add_argument("-c", "--config", required=True)
    parser.add_argument("--name", default="", help="the file's name in messages")
    parser.add_argument("--describe", action="store_true", help="validate, print the plan as JSON, exit")
    parser.add_argument("--slot", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fds", type=lambda text: [int(fd) for fd in text.split(",") if fd], default=[])
    parser.add_argument("--beat-fd", type=int, default=-1)
    parser.add_argument("--control-fd", type=int, default=-1)
    parser.add_argument("--run-dir", default="")
    return parser.parse_args(argv)


def _set_limits() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # APPSEC: a core file would hold keys.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(argv: Sequence[str] | None = None) -> int:
    """Describe a file, or serve as one worker; return the exit code."""
    args = _arguments(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN if not args.describe else signal.SIG_DFL)
    try:
        config = load(args.config, name=args.name, made_keys=not args.describe)
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return EX_CONFIG
    if args.describe:
        print(json.dumps(describe(config)))
        return 0
    import uvloop

    from nbgate import logs

    _set_limits()
    logs.setup(config.logging.level)
    os.set_blocking(args.beat_fd, False)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Worker(args, config).run())
    except ConfigError as exc:
        # What only the app can find out, such as a ca_file that holds no certificate.
        print(exc, file=sys.stderr)
        return EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
