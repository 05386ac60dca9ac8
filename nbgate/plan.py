"""What the supervisor must know of the configuration, and the data folder it keeps.

Purpose: ask a short-lived child what a file says; own data_dir: lock, snapshot, made keys; the words after start.
Lives here: `Plan`, `DataDir`, `banner`. Must not: third parties, the app, TOML (the child reads it). Heat: cold.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import string
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

DESCRIBE_LIMIT_S: Final = 60.0
_KEY_CHARS: Final = string.ascii_letters + string.digits
_MAX_UNIX_PATH_BYTES: Final = 107


class PlanError(Exception):
    """The configuration cannot be used; the text holds one problem a line."""


class DataDirError(Exception):
    """The data folder cannot be had; the text is one line with the cure."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One validated configuration, as far as processes are concerned."""

    listen: list[tuple[str, str, int]]
    workers: int
    data_dir: str
    drain_s: float
    drain_streams_s: float
    drain_roll_s: float
    demo: bool
    demo_key: str
    demo_model: str
    admin_key: bool
    restart: dict[str, str]


def describe(command: Sequence[str], text: bytes, name: str, env: Mapping[str, str]) -> Plan:
    """Have a child validate these very bytes and print their plan as JSON.

    Raises PlanError with the problems, each with file and line.
    """
    argv = [*command, "-c", "/dev/stdin", "--name", name]
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, env=dict(env), timeout=DESCRIBE_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise PlanError(f"{name}: reading it took more than {DESCRIBE_LIMIT_S:g} s") from None
    except OSError as exc:
        raise PlanError(f"cannot run {argv[0]}: {exc.strerror}") from None
    if done.returncode:
        raise PlanError(done.stderr.decode(errors="replace").strip() or f"{name}: cannot be read")
    found = json.loads(done.stdout)
    found["listen"] = [(str(unix), str(host), int(port)) for unix, host, port in found["listen"]]
    return Plan(**found)


class DataDir:
    """The data folder of one supervisor: locked while it lives."""

    def __init__(self, path: str, env: Mapping[str, str]) -> None:
        self.path = path
        # systemd's RuntimeDirectory=, if there is one: it may name several.
        self.run = env.get("RUNTIME_DIRECTORY", "").split(":")[0] or os.path.join(os.path.abspath(path), "run")
        self.demo_socket = os.path.join(self.run, "demo.sock")
        self.snapshot = os.path.join(self.run, "config.toml")
        self._lock = -1

    def open(self) -> None:
        """Make and lock the folder.

        Raises DataDirError, also when another nbgate holds it.
        """
        if len(os.fsencode(self.demo_socket)) > _MAX_UNIX_PATH_BYTES:
            raise DataDirError(f"the path {self.run} is too long for a unix socket; {_cure()}")
        try:
            # APPSEC: keys and journals live here, so nobody else may look in.
            os.makedirs(self.path, 0o700, exist_ok=True)
            os.makedirs(self.run, 0o700, exist_ok=True)
            self._lock = os.open(os.path.join(self.path, "nbgate.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            pid = self._owner()
            self.close()
            if exc.errno in (errno.EAGAIN, errno.EACCES) and pid:
                raise DataDirError(f"another nbgate (pid {pid}) runs on {self.path}; stop it or {_cure()}") from None
            raise DataDirError(f"cannot use the folder {self.path} ({exc.strerror}); {_cure()}") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _owner(self) -> str:
        return os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() if self._lock >= 0 else ""

    def close(self) -> None:
        """Give the folder up."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def made_key(self, name: str) -> str:
        """Return the key in a file of ours; make it when there is none.

        APPSEC: 48 characters from the system's CSPRNG, readable by the owner alone.
        """
        path = os.path.join(self.path, name)
        try:
            with open(path, encoding="ascii") as file:
                if key := file.read(4096).strip():
                    return key
        except FileNotFoundError:
            pass
        key = "sk-" + "".join(secrets.choice(_KEY_CHARS) for _ in range(48))
        write_private(path, f"{key}\n".encode())
        return key


def write_private(path: str, data: bytes, stamp: float = 0.0) -> None:
    """Put a file of mode 0600 in place whole, with a given mtime if any."""
    fresh = f"{path}.{os.getpid()}.new"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)
        file.write(data)
        file.flush()
        os.fsync(fd)
        if stamp:
            os.utime(fd, (stamp, stamp))
    os.replace(fresh, path)


def banner(bound: list[tuple[str, str, int]], plan: Plan, keys: tuple[str, str]) -> str:
    """Say how to use what was just started; keys: demo key, admin file.

    The admin key itself is never shown.
    """
    demo_key, admin_file = keys
    unix, host, port = bound[0]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = "http://localhost" if unix else f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    lines = [f"URL:       {url}/" + (f" on unix:{unix}" if unix else "")]
    if demo_key:
        lines.append(f"Demo key:  {demo_key}")
    lines.append(f"Admin key: {admin_file}" if admin_file else "Admin key: as set by [admin] key")
    body = {"model": plan.demo_model, "stream": True, "messages": [{"role": "user", "content": "Say hello."}]}
    lines.append(
        f"curl -N {f'--unix-socket {unix} ' if unix else ''}{url}/v1/chat/completions"
        f" -H 'Authorization: Bearer {demo_key or 'YOUR_KEY'}' -H 'Content-Type: application/json'"
        f" -d '{json.dumps(body, separators=(',', ':'))}'"
    )
    return "\n".join(lines)


def _cure() -> str:
    return "set [server] data_dir / NBGATE_SERVER__DATA_DIR"
