"""A stand-in for the worker and the demo, for tests of the supervisor.

Serves its sockets with one line per connection, tells what happens to it in a log file, and misbehaves as the
"fake" table of its configuration (JSON here) says: exit, mute, stubborn, hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def option(name: str, default: str = "") -> str:
    words = sys.argv[1:]
    return words[words.index(name) + 1] if name in words else default


def read_config() -> dict[str, Any]:
    return json.loads(Path(option("-c")).read_text())


def describe() -> int:
    text = sys.stdin.read()
    try:
        plan = json.loads(text)
    except ValueError:
        print(f"{option('--name')}:3: this is the third line's fault", file=sys.stderr)
        return 78
    plan.pop("fake", None)
    plan.pop("note", None)
    print(json.dumps(plan))
    return 0


class Fake:
    def __init__(self, name: str, socks: list[socket.socket], log: str) -> None:
        self.name, self.socks, self.log = name, socks, log
        self.beat_fd = int(option("--beat-fd", "-1"))
        self.control_fd = int(option("--control-fd", option("--parent-fd", "-1")))
        self.wake, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, lambda *_: None)

    def say(self, event: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{event} {self.name} {os.getpid()}\n")

    def serve(self, fake: dict[str, Any]) -> int:
        self.say("start")
        if fake.get("exit") is not None:
            return int(fake["exit"])
        for sock in self.socks:
            sock.setblocking(False)
        if self.beat_fd >= 0 and not fake.get("unready"):
            os.write(self.beat_fd, b"R")
        while True:
            ready, _, _ = select.select([self.wake, self.control_fd, *self.socks], [], [], 0.1)
            if self.beat_fd >= 0 and not fake.get("mute"):
                with contextlib.suppress(BrokenPipeError):
                    os.write(self.beat_fd, b".")
            if self.control_fd in ready and not os.read(self.control_fd, 100):
                self.say("orphan")
                return 0
            numbers = os.read(self.wake, 100) if self.wake in ready else b""
            if signal.SIGHUP in numbers:
                self.say(f"hup-{read_config().get('note')}")
            told = [n for n in numbers if n in (signal.SIGTERM, signal.SIGUSR2)]
            if told and not fake.get("stubborn"):
                self.say("term" if signal.SIGTERM in told else "roll")
                while fake.get("hold") and os.path.exists(fake["hold"]):
                    if select.select([self.wake], [], [], 0.01)[0] and signal.SIGTERM in os.read(self.wake, 100):
                        self.say("hurry")
                self.say("end")
                return 0
            for sock in self.socks:
                if sock in ready:
                    self.answer(sock)

    def answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = sock.accept()
            client.sendall(f"{self.name} {os.getpid()}\n".encode())
            client.close()


def main() -> int:
    if "--describe" in sys.argv:
        return describe()
    if "--fd" in sys.argv:
        log = os.environ["FAKE_DEMO_LOG"]
        return Fake("demo", [socket.socket(fileno=int(option("--fd")))], log).serve({})
    fake = read_config()["fake"]
    socks = [socket.socket(fileno=int(fd)) for fd in option("--fds").split(",")]
    return Fake(option("--slot"), socks, fake["log"]).serve(fake)


if __name__ == "__main__":
    sys.exit(main())
