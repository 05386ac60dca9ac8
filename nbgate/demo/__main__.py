"""Serve the demo upstream: `python -m nbgate.demo --fd N [--parent-fd N]`.

What lives here: the process. It serves the listening socket `--fd` (unix or
TCP) until SIGTERM, or until the other end of the pipe `--parent-fd` is closed,
so that it never outlives the process that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket

import uvloop

from nbgate.server.listener import Server, Settings

from .app import PACE_S, App

DRAIN_S = 2.0


async def serve(fd: int, parent_fd: int | None, pace_s: float) -> None:
    """Serve until told to stop, then let answers end for a moment."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is for the parent, which ends us

    def parent_spoke() -> None:
        if parent_fd is not None and not os.read(parent_fd, 4096):
            loop.remove_reader(parent_fd)
            stop.set()

    if parent_fd is not None:
        loop.add_reader(parent_fd, parent_spoke)
    server = Server(App(pace_s), Settings())
    await server.start([socket.socket(fileno=fd)])
    await stop.wait()
    await server.drain(DRAIN_S, DRAIN_S)
    await server.stop()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m nbgate.demo", description="Serve nbgate's demo upstream.")
    parser.add_argument("--fd", type=int, required=True, help="a listening socket, unix or TCP")
    parser.add_argument("--parent-fd", type=int, help="stop when this pipe ends")
    parser.add_argument("--pace-ms", type=float, default=PACE_S * 1000, help="pause before each word of a stream")
    args = parser.parse_args()
    uvloop.run(serve(args.fd, args.parent_fd, args.pace_ms / 1000))


if __name__ == "__main__":
    main()
