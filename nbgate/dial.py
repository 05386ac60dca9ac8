"""Reach an upstream: names, addresses, proxies, TLS.

What lives here: `Endpoint` (what makes two upstream connections
interchangeable), `UpstreamError`, the DNS cache and `Dialer`. What must not:
HTTP exchanges and pooling. Heat: K, once per connection.

Law: every failure leaves as an `UpstreamError` whose kind says which leg
broke: dns, dial, tls or timeout_connect; the socket is closed by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

Kind = Literal[
    "dial", "tls", "dns", "busy", "timeout_connect", "timeout_first_byte", "timeout_idle", "timeout_total",
    "lost", "framing", "too_large",
]  # fmt: skip
Address = tuple[int, Any]  # family, sockaddr
Resolve = Callable[[str, int], Awaitable[list[Address]]]
Clock = Callable[[], float]

MAX_CACHED_NAMES = 1024


class UpstreamError(Exception):
    """Say what broke on the upstream's side, and what may be tried again.

    Attributes:
        kind: one of `Kind`.
        bytes_read: bytes of this answer that had come; 0 only if none had.
        reused: the connection had idled in the pool or served before.
        since_write_s: seconds from our write to the failure; 0 before a write.
    """

    def __init__(
        self, kind: Kind, why: str = "", *, bytes_read: int = 0, reused: bool = False, since_write_s: float = 0.0
    ) -> None:
        super().__init__(f"{kind}: {why}" if why else kind)
        self.kind: Kind = kind
        self.bytes_read = bytes_read
        self.reused = reused
        self.since_write_s = since_write_s


class Endpoint(msgspec.Struct, frozen=True, cache_hash=True):
    """Name everything that makes two connections interchangeable.

    With `unix_path` the socket is dialled there and `host` only names it.
    `ca_file` replaces the system's authorities. `proxy` is http://, socks5://,
    socks5h:// or socks4://, with user and password if any. `extra` are lower-case
    answer headers to keep beyond `WANTED`.
    """

    scheme: Literal["http", "https"]
    host: str
    port: int
    unix_path: str = ""
    verify: bool = True
    ca_file: str = ""
    server_name: str = ""
    proxy: str = ""
    extra: frozenset[bytes] = frozenset()


async def resolve_by_loop(host: str, port: int) -> list[Address]:
    """Ask the system's resolver, off the loop's thread."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(int(family), sockaddr) for family, _type, _proto, _name, sockaddr in found]


class Names:
    """Cache addresses for a short time; one look-up per name at once."""

    def __init__(self, cache_s: float, clock: Clock, resolve: Resolve) -> None:
        self._cache_s = cache_s
        self._clock = clock
        self._resolve = resolve
        self._known: dict[tuple[str, int], tuple[float, list[Address]]] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[list[Address]]] = {}

    async def addresses(self, host: str, port: int) -> list[Address]:
        """Return the addresses of a name, the last good one first.

        Raises:
            UpstreamError: kind dns.
        Cancellation: the look-up goes on and fills the cache.
        """
        key = (host, port)
        known = self._known.get(key)
        if known is not None and self._clock() < known[0]:
            return known[1]
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = asyncio.create_task(self._ask(key))
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(asking)

    async def _ask(self, key: tuple[str, int]) -> list[Address]:
        try:
            found = list(await self._resolve(*key))
        except (OSError, UnicodeError) as exc:
            raise UpstreamError("dns", f"{key[0]}: {exc}") from None
        finally:
            del self._asking[key]
        if not found:
            raise UpstreamError("dns", f"{key[0]}: no address")
        self._known.pop(key, None)
        if len(self._known) >= MAX_CACHED_NAMES:
            del self._known[next(iter(self._known))]
        self._known[key] = (self._clock() + self._cache_s, found)
        return found

    def prefer(self, host: str, port: int, address: Address) -> None:
        """Try this address first from now on."""
        known = self._known.get((host, port))
        if known is not None and known[1][0] != address and address in known[1]:
            self._known[host, port] = (known[0], [address, *(each for each in known[1] if each != address)])

    def forget(self, host: str, port: int) -> None:
        """Drop a name none of whose addresses answered."""
        self._known.pop((host, port), None)

    def close(self) -> None:
        """Cancel look-ups under way."""
        for task in list(self._asking.values()):
            task.cancel()


class Dialer:
    """Open connections to endpoints and hand them to a protocol."""

    def __init__(self, dns_cache_s: float, clock: Clock, resolve: Resolve = resolve_by_loop) -> None:
        self._names = Names(dns_cache_s, clock, resolve)
        self._contexts: dict[tuple[bool, str], ssl.SSLContext] = {}

    async def dial(self, endpoint: Endpoint, protocol: asyncio.Protocol, connect_s: float) -> None:
        """Connect within `connect_s`; the protocol has its transport then.

        Raises:
            UpstreamError: kind dns, dial, tls or timeout_connect.
        Cancellation: the socket is closed.
        """
        try:
            async with asyncio.timeout(connect_s):
                context = self._context(endpoint) if endpoint.scheme == "https" else None
                sock = await self._reach(endpoint, connect_s)
                await _hand_over(sock, endpoint, protocol, context)
        except TimeoutError:
            raise UpstreamError("timeout_connect", f"{_label(endpoint)}: no connection in {connect_s:g} s") from None

    def forget(self, endpoint: Endpoint) -> None:
        """Read the endpoint's CA file anew at the next dial."""
        self._contexts.pop((endpoint.verify, endpoint.ca_file), None)

    def close(self) -> None:
        """Cancel look-ups under way."""
        self._names.close()

    def _context(self, endpoint: Endpoint) -> ssl.SSLContext:
        key = (endpoint.verify, endpoint.ca_file)
        context = self._contexts.get(key)
        if context is None:
            try:
                context = ssl.create_default_context(cafile=endpoint.ca_file or None)
            except OSError as exc:
                raise UpstreamError("tls", f"CA file {endpoint.ca_file}: {exc}") from None
            if not endpoint.verify:
                # APPSEC: only where the operator wrote verify = false for this channel.
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            context.set_alpn_protocols(["http/1.1"])
            self._contexts[key] = context
        return context

    async def _reach(self, endpoint: Endpoint, connect_s: float) -> socket.socket:
        """Return a connected socket, through the proxy if there is one."""
        if endpoint.unix_path:
            try:
                return await _connect(socket.AF_UNIX, endpoint.unix_path)
            except OSError as exc:
                raise UpstreamError("dial", f"{_label(endpoint)}: {exc}") from None
        if endpoint.proxy:
            return await _through_proxy(endpoint, connect_s)
        return await self._try_each(endpoint, connect_s)

    async def _try_each(self, endpoint: Endpoint, connect_s: float) -> socket.socket:
        """Try every address in turn; each gets its share of the time left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + connect_s
        addresses = await self._names.addresses(endpoint.host, endpoint.port)
        left = len(addresses)
        last: OSError | None = None
        for address in addresses:
            try:
                async with asyncio.timeout(max(0.0, deadline - loop.time()) / left):
                    sock = await _connect(*address)
            except OSError as exc:  # TimeoutError is one
                last = exc
                left -= 1
                continue
            self._names.prefer(endpoint.host, endpoint.port, address)
            return sock
        self._names.forget(endpoint.host, endpoint.port)
        if isinstance(last, TimeoutError) and loop.time() >= deadline - 0.001:
            raise TimeoutError
        raise UpstreamError("dial", f"{_label(endpoint)}: {last}")


async def _connect(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _through_proxy(endpoint: Endpoint, connect_s: float) -> socket.socket:
    # NOTE: imported here, for few stations have a proxy and each worker pays for what it loads.
    from python_socks import ProxyError
    from python_socks.async_.asyncio import Proxy

    try:
        # The name goes to the proxy unresolved for http, socks5 and socks5h.
        proxy = Proxy.from_url(endpoint.proxy.replace("socks5h://", "socks5://", 1))
        return await proxy.connect(endpoint.host, endpoint.port, timeout=connect_s)
    except TimeoutError:
        raise
    except (ProxyError, OSError, ValueError) as exc:
        # APPSEC: the proxy's URL may hold a password; it is never part of the text.
        raise UpstreamError("dial", f"{_label(endpoint)} through the proxy: {exc}") from None


async def _hand_over(
    sock: socket.socket, endpoint: Endpoint, protocol: asyncio.Protocol, context: ssl.SSLContext | None
) -> None:
    loop = asyncio.get_running_loop()
    try:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if context is None:
            await loop.create_connection(lambda: protocol, sock=sock)
        else:
            name = endpoint.server_name or endpoint.host
            await loop.create_connection(lambda: protocol, sock=sock, ssl=context, server_hostname=name)
    except asyncio.CancelledError:
        sock.close()
        raise
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError; ValueError: a name no certificate can bear
        with contextlib.suppress(OSError):
            sock.close()
        raise UpstreamError("tls" if context is not None else "dial", f"{_label(endpoint)}: {exc}") from None


def _label(endpoint: Endpoint) -> str:
    return endpoint.unix_path or f"{endpoint.host}:{endpoint.port}"
