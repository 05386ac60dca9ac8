"""The supervisor: the parent of all nbgate processes, and nothing more.

Purpose: bind the sockets, start workers and the demo, restart what crashes, reload, roll and drain on signals.
Lives here: the loop, the signals, the order of start and end. Must not: the app, third parties, `config`
(a short-lived child reads the file), threads, requests. Heat: cold.

SIGTERM, SIGINT: drain all, then exit 0; a second SIGINT: at once. SIGHUP: validate, then swap in place.
SIGUSR2: replace the workers one slot after the other, the new one ready before the old drains; the old one is sent
SIGUSR2 and may finish every answer, since its successor serves and holds the same sockets.
Exit codes 77 and 78 mean "do not restart me": 77 an address, a folder or a lock cannot be had, 78 the
configuration is wrong. A worker that ends with one of them is not started again either.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from nbgate.children import EX_CONFIG, EX_NOPERM, FINAL_CODES, READY, Child, Launch, Slot, describe_code
from nbgate.notify import Notifier, forget
from nbgate.plan import DataDir, DataDirError, Plan, PlanError, banner, describe, write_private
from nbgate.sockets import BindError, Listeners, bind_unix

GRACE_S: Final = 5.0  # after the longest drain, before SIGKILL
TICK_S: Final = 1.0
HURRIED: Final = 130  # exit code after a second SIGINT, as shells have it
ADMIN_KEY_FILE: Final = "admin.key"
DEMO_KEY_FILE: Final = "demo.key"
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)


def _module(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *words)


@dataclass(frozen=True)
class Commands:
    """The programs that are started; tests put their own here."""

    describe: Sequence[str] = field(default_factory=lambda: _module("nbgate.worker", "--describe"))
    worker: Sequence[str] = field(default_factory=lambda: _module("nbgate.worker"))
    demo: Sequence[str] = field(default_factory=lambda: _module("nbgate.demo"))


class Supervisor:
    """One node's processes, from bind to the last exit."""

    def __init__(self, file: str, env: Mapping[str, str], commands: Commands | None = None) -> None:
        # Process
        self.file = file
        self.commands = commands or Commands()
        self.notifier = Notifier(dict(env), os.getpid())
        self.env = dict(env)
        self._systemd = {name: env[name] for name in ("LISTEN_PID", "LISTEN_FDS") if name in env}
        forget(self.env)
        self.listeners = Listeners()
        self.selector = selectors.DefaultSelector()
        self.wake, self._wake_write = os.pipe()
        # Configuration
        self.plan: Plan
        self.data: DataDir
        self.demo_key = self.admin_file = ""
        # Children
        self.slots: list[Slot] = []
        self.demo = Slot("demo")
        self.demo_socket: socket.socket | None = None
        # Life
        self.announced = False
        self.stopping = False
        self.exit_code = 0
        self.rolling: list[Slot] = []
        self._next_watchdog = 0.0

    # -- start

    def run(self) -> int:
        """Start, serve until told to stop; return the exit code."""
        try:
            self._prepare()
        except PlanError as exc:
            return self._refuse(EX_CONFIG, str(exc))
        except (BindError, DataDirError) as exc:
            self._close()
            return self._refuse(EX_NOPERM, f"nbgate: {exc}")
        try:
            self._catch_signals()
            self._tick()
            while not self._over():
                self._wait()
                self._tick()
        finally:
            self._close()
        return self.exit_code

    def _refuse(self, code: int, text: str) -> int:
        print(text, file=sys.stderr, flush=True)
        self.notifier.status(text.splitlines()[0])
        return code

    def _prepare(self) -> None:
        text, stamp = self._read_file()
        self.plan = describe(self.commands.describe, text, self.file, self.env)
        self.data = DataDir(self.plan.data_dir, self.env)
        self.data.open()
        write_private(self.data.snapshot, text, stamp)
        if self.listeners.adopt(self._systemd, os.getpid(), self.plan.workers):
            log("listening on the sockets that systemd passed; [server] listen is not used")
        else:
            self.listeners.bind(self.plan.listen, self.plan.workers)
        self._make_keys()
        self._open_demo()
        self.slots = [Slot(f"worker {index}") for index in range(self.plan.workers)]

    def _read_file(self) -> tuple[bytes, float]:
        try:
            with open(self.file, "rb") as file:
                return file.read(), os.fstat(file.fileno()).st_mtime
        except OSError as exc:
            raise PlanError(f"{self.file}: cannot read this file: {exc.strerror}") from None

    def _make_keys(self) -> None:
        try:
            self.demo_key = ""
            if self.plan.demo:
                self.demo_key = self.plan.demo_key or self.data.made_key(DEMO_KEY_FILE)
            if not self.plan.admin_key:
                self.data.made_key(ADMIN_KEY_FILE)
                self.admin_file = os.path.join(self.plan.data_dir, ADMIN_KEY_FILE)
        except OSError as exc:
            raise DataDirError(f"cannot keep a key in {self.plan.data_dir} ({exc.strerror})") from None

    def _open_demo(self) -> None:
        if self.plan.demo and self.demo_socket is None:
            # We hold the lock, so a file left there is nobody's.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.data.demo_socket)
            self.demo_socket = bind_unix(self.data.demo_socket, 0o600)

    def _catch_signals(self) -> None:
        os.set_blocking(self.wake, False)
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # The handler does nothing: the number arrives on the wake-up pipe.
            signal.signal(number, lambda *_: None)
        self.selector.register(self.wake, selectors.EVENT_READ)

    # -- the loop

    def _wait(self) -> None:
        for key, _ in self.selector.select(self._timeout()):
            if key.fd == self.wake:
                self._signals()
            else:
                self._beats(key.data)

    def _timeout(self) -> float:
        now = time.monotonic()
        due = [child.kill_at for slot in self._all_slots() for child in slot.children() if child.kill_at]
        if not self.stopping:
            due += [slot.start_at for slot in self._wanted_slots() if slot.empty()]
        limit = min(TICK_S, self.notifier.watchdog_s or TICK_S)
        return max(0.0, min([limit, *(moment - now for moment in due)]))

    def _all_slots(self) -> list[Slot]:
        return [*self.slots, self.demo]

    def _wanted_slots(self) -> list[Slot]:
        return self._all_slots() if self.plan.demo else self.slots

    def _signals(self) -> None:
        numbers = os.read(self.wake, 4096)
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(number)
        if self.stopping:
            return
        if signal.SIGHUP in numbers:
            self._reload()
        if signal.SIGUSR2 in numbers:
            self._roll()

    def _tick(self) -> None:
        now = time.monotonic()
        for slot in self._all_slots():
            for child in slot.children():
                if (code := child.poll()) is not None:
                    self._ended(slot, child, code)
                elif child.silent(now) and child.kill_at == 0.0:
                    log(f"{child.name} (pid {child.pid}) showed no sign of life for too long; killing it")
                    child.kill_at = now
                if child.kill_at and now >= child.kill_at:
                    child.signal(signal.SIGKILL)
                    child.kill_at = now + TICK_S
        if not self.stopping:
            self._fill(now)
            self._advance_roll()
            self._announce()
        elif not any(slot.children() for slot in self.slots):
            # The demo serves answers under way until the last worker has gone.
            self._end_demo()
        if self.notifier.watchdog_s and now >= self._next_watchdog:
            self._next_watchdog = now + self.notifier.watchdog_s
            self.notifier.watchdog()

    def _over(self) -> bool:
        if any(slot.children() for slot in self._all_slots()):
            return False
        if not self.stopping and all(slot.gave_up for slot in self.slots):
            self.exit_code = self.slots[0].gave_up
            return True
        return self.stopping

    # -- children

    def _fill(self, now: float) -> None:
        for slot in self._wanted_slots():
            if slot.empty() and now >= slot.start_at:
                slot.current = self._start(slot)

    def _start(self, slot: Slot) -> Child | None:
        try:
            child = Child(slot.name, self._launch(slot))
        except OSError as exc:
            delay = slot.back_off(0.0)
            log(f"{slot.name} cannot be started ({exc.strerror}); next try in {delay:g} s")
            return None
        if child.beat >= 0:
            self.selector.register(child.beat, selectors.EVENT_READ, (slot, child))
        return child

    def _launch(self, slot: Slot) -> Launch:
        if slot is self.demo:
            assert self.demo_socket is not None  # _open_demo ran when the plan got its demo
            sock = self.demo_socket
            return Launch((*self.commands.demo, "--fd", str(sock.fileno())), [sock], self.env, "--parent-fd")
        index = self.slots.index(slot)
        socks = self.listeners.slots[index]
        words = {
            "slot": index,
            "workers": len(self.slots),
            "fds": ",".join(str(sock.fileno()) for sock in socks),
            "name": self.file,
            "run-dir": self.data.run,
        }
        options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        argv = (*self.commands.worker, "-c", self.data.snapshot, *options)
        return Launch(argv, socks, self.env, "--control-fd", "--beat-fd")

    def _beats(self, data: tuple[Slot, Child]) -> None:
        slot, child = data
        if child.beat < 0:
            return
        found = child.read_beats()
        if not found:
            # It closed its end: it is about to be reaped, or hangs in its last moments.
            self.selector.unregister(child.beat)
            child.kill_at = child.kill_at or time.monotonic() + GRACE_S
            return
        if READY in found and not child.ready:
            child.ready = True
            if child.reload_pending:
                child.signal(signal.SIGHUP)
            if child is slot.heir:
                self._succeed(slot, child)

    def _ended(self, slot: Slot, child: Child, code: int) -> None:
        was_current, was_heir = child is slot.current, child is slot.heir
        slot.remove(child)
        if child.beat >= 0:
            with contextlib.suppress(KeyError):
                self.selector.unregister(child.beat)
        child.close()
        about = f"{child.name} (pid {child.pid}) {describe_code(code)} after {child.lived_s():.1f} s"
        if self.stopping or not (was_current or was_heir) or slot not in self._wanted_slots():
            if code not in (0, -signal.SIGTERM, -signal.SIGUSR2):
                log(about)
        elif was_heir:
            self.rolling.clear()
            log(f"{about}, before it was ready; the roll is given up, the old workers stay")
        elif code in FINAL_CODES:
            slot.gave_up = code
            log(f"{about}; it will not be started again")
            if not self.announced and slot is not self.demo:
                self.exit_code = code
                self._stop(signal.SIGTERM)
        else:
            log(f"{about}; next start in {slot.back_off(child.lived_s()):g} s")

    def _end_demo(self) -> None:
        for child in self.demo.children():
            if not child.kill_at:
                child.end(GRACE_S)

    # -- announce, reload, roll, stop

    def _announce(self) -> None:
        if self.announced or not all(slot.current and slot.current.ready for slot in self.slots):
            return
        self.announced = True
        self.notifier.ready(f"serving with {len(self.slots)} workers")
        with contextlib.suppress(OSError):
            print(banner(self.listeners.bound, self.plan, (self.demo_key, self.admin_file)), flush=True)

    def _reload(self) -> None:
        """Swap the configuration in place; on any fault nothing changes."""
        self.notifier.reloading()
        try:
            text, stamp = self._read_file()
            plan = describe(self.commands.describe, text, self.file, self.env)
            fixed = [name for name, value in self.plan.restart.items() if plan.restart.get(name) != value]
            if fixed:
                raise PlanError(f"{self.file}: {', '.join(fixed)} cannot change while running; restart nbgate for that")
            write_private(self.data.snapshot, text, stamp)
        except (PlanError, OSError) as exc:
            log(f"reload refused, nothing changed:\n{exc}")
            self.notifier.ready(f"reload refused: {str(exc).splitlines()[0]}")
            return
        self.plan = plan
        try:
            self._make_keys()
            self._open_demo()
        except (BindError, DataDirError) as exc:
            log(str(exc))
        if not plan.demo:
            self._end_demo()
        for slot in self.slots:
            for child in (slot.current, slot.heir):
                if child is not None and child.ready:
                    child.signal(signal.SIGHUP)
                elif child is not None:
                    # NOTE: before it is ready, SIGHUP would still end it.
                    child.reload_pending = True
        log("configuration reloaded")
        self.notifier.ready(f"serving with {len(self.slots)} workers")

    def _roll(self) -> None:
        if not self.rolling:
            log("replacing the workers, one after the other")
        self.rolling = list(self.slots)
        self._advance_roll()

    def _advance_roll(self) -> None:
        """Start the next heir, once the one before it is ready.

        A slot that still drains an older worker is waited for, so that no slot ever has three.
        """
        if not self.rolling or any(slot.heir for slot in self.slots):
            return
        slot = self.rolling[0]
        if slot.draining:
            return
        self.rolling.pop(0)
        slot.gave_up = 0
        if slot.current is not None:
            slot.heir = self._start(slot)

    def _succeed(self, slot: Slot, heir: Child) -> None:
        old, slot.current, slot.heir = slot.current, heir, None
        slot.failures = 0
        if old is not None:
            slot.draining.append(old)
            old.end(self.plan.drain_roll_s + GRACE_S, signal.SIGUSR2)
        log(f"{slot.name} is now pid {heir.pid}" + (f"; pid {old.pid} drains" if old else ""))

    def _stop(self, number: int) -> None:
        if self.stopping:
            if number == signal.SIGINT:
                self.exit_code = HURRIED
                for slot in self._all_slots():
                    for child in slot.children():
                        child.signal(signal.SIGKILL)
            return
        self.stopping = True
        self.notifier.stopping()
        if self.announced:
            log("draining; a second Ctrl-C ends it at once" if number == signal.SIGINT else "draining")
        for slot in self.slots:
            for child in slot.children():
                # Also to one that gives way in a roll: it has less time from now on.
                child.end(self.plan.drain_streams_s + GRACE_S)
        # The workers hold their own copies until they stop accepting.
        self.listeners.close()

    def _close(self) -> None:
        # Children are left only after a fault of ours: the end of their control pipe has them drain.
        for slot in self._all_slots():
            for child in slot.children():
                child.close()
        self.listeners.close()
        if self.demo_socket is not None:
            self.demo_socket.close()
            with contextlib.suppress(OSError):
                os.unlink(self.data.demo_socket)
        if hasattr(self, "data"):
            self.data.close()


def log(text: str) -> None:
    """Write one line for the operator."""
    # A reader that went away, as in `nbgate serve 2>&1 | head`, must not end the service.
    with contextlib.suppress(OSError):
        print(f"nbgate: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise until told to stop: `python -m nbgate.supervisor -c FILE`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 2 or words[0] not in ("-c", "--config"):
        print("usage: python -m nbgate.supervisor -c FILE", file=sys.stderr)
        return 64  # EX_USAGE
    return Supervisor(words[1], os.environ).run()


if __name__ == "__main__":
    sys.exit(main())
