"""Listening sockets, bound once by the supervisor and handed on by fd.

Purpose: one SO_REUSEPORT socket per worker slot and tcp address; unix and systemd sockets shared by all slots.
Lives here: binding, the stale unix file, LISTEN_FDS. Must not: accept, third parties, the app. Heat: cold.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from typing import Final

BACKLOG: Final = 4096  # the kernel cuts it to net.core.somaxconn
UNIX_MODE: Final = 0o660
FIRST_SYSTEMD_FD: Final = 3  # sd_listen_fds(3)


class BindError(Exception):
    """An address cannot be had; the text is one line with the cure."""


class Listeners:
    """All listening sockets: `slots[i]` are those of worker slot i."""

    def __init__(self) -> None:
        self.slots: list[list[socket.socket]] = []
        # What was bound, for people: ("", host, port) or (path, "", 0).
        self.bound: list[tuple[str, str, int]] = []
        self._unix: list[tuple[str, int, int]] = []

    def close(self) -> None:
        """Close our copies and remove the unix files that are still ours."""
        for path, device, inode in self._unix:
            try:
                found = os.stat(path)
                if (found.st_dev, found.st_ino) == (device, inode):
                    os.unlink(path)
            except OSError:
                pass
        self._unix.clear()
        for sock in {id(one): one for slot in self.slots for one in slot}.values():
            sock.close()
        self.slots = []

    def bind(self, addresses: list[tuple[str, str, int]], slots: int) -> None:
        """Bind every (unix path, host, port) for every slot.

        Raises BindError; what was bound before is closed then.
        """
        self.slots = [[] for _ in range(slots)]
        try:
            for unix, host, port in addresses:
                if unix:
                    self._share(self._bind_unix(unix), (unix, "", 0))
                else:
                    self._bind_tcp(host, port)
        except BaseException:
            self.close()
            raise

    def adopt(self, env: Mapping[str, str], pid: int, slots: int) -> bool:
        """Take over systemd's sockets, if it passed any to this process.

        Raises BindError when what was passed does not listen.
        """
        if env.get("LISTEN_PID") != str(pid) or not env.get("LISTEN_FDS", "").isdecimal():
            return False
        count = int(env["LISTEN_FDS"])
        self.slots = [[] for _ in range(slots)]
        for fd in range(FIRST_SYSTEMD_FD, FIRST_SYSTEMD_FD + count):
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise BindError(f"fd {fd} passed by systemd does not listen; the .socket unit needs ListenStream=")
            sock.setblocking(False)
            name = sock.getsockname()
            unix = sock.family == socket.AF_UNIX
            self._share(sock, (os.fsdecode(name), "", 0) if unix else ("", name[0], name[1]))
        return count > 0

    def _share(self, sock: socket.socket, name: tuple[str, str, int]) -> None:
        for slot in self.slots:
            slot.append(sock)
        self.bound.append(name)

    def _bind_tcp(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as exc:
            raise BindError(f"cannot resolve {host} ({exc.strerror}); {_cure()}") from None
        done = 0
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                port = self._bind_slots(family, (str(address[0]), port, *address[2:]))
                done += 1
                self.bound.append(("", str(address[0]), port))
            except OSError as exc:
                # A machine without IPv6 still resolves "" and localhost to ::.
                if exc.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and (done or len(found) > 1):
                    continue
                raise BindError(_why(host, port, exc)) from None
        if not done:
            raise BindError(f"no address of {host or 'this machine'} can be bound; {_cure()}")

    def _bind_slots(self, family: int, address: tuple[object, ...]) -> int:
        # NOTE: SO_REUSEPORT would let us share a port with another nbgate in silence, so first try without.
        with _tcp(family, address, reuse_port=False) as probe:
            port = int(probe.getsockname()[1])
        for slot in self.slots:
            sock = _tcp(family, (address[0], port, *address[2:]), reuse_port=True)
            sock.listen(BACKLOG)
            slot.append(sock)
        return port

    def _bind_unix(self, path: str) -> socket.socket:
        _remove_stale(path)
        sock = bind_unix(path)
        found = os.stat(path)
        self._unix.append((path, found.st_dev, found.st_ino))
        return sock


def bind_unix(path: str, mode: int = UNIX_MODE) -> socket.socket:
    """Bind and listen on a unix path that does not exist yet.

    Raises BindError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    # APPSEC: by umask, so that there is no moment in which others may connect.
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise BindError(f"cannot bind unix:{path} ({exc.strerror or exc}); {_cure()}") from None
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise BindError(f"{path} exists and is no socket; move it away or {_cure()}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as exc:
            if exc.errno != errno.EAGAIN:  # a full queue: somebody listens
                raise BindError(f"cannot look at unix:{path} ({exc.strerror}); {_cure()}") from None
    raise BindError(f"unix:{path} is in use; stop that program or {_cure()}")


def _tcp(family: int, address: tuple[object, ...], *, reuse_port: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        return sock
    except BaseException:
        sock.close()
        raise


def _why(host: str, port: int, exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"port {port} is in use; stop that program or {_cure()}"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be bound by this user; take one above 1023, or {_cure()}"
    return f"cannot bind {host}:{port} ({exc.strerror}); {_cure()}"


def _cure() -> str:
    return "set [server] listen / NBGATE_SERVER__LISTEN"
