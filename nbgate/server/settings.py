"""The server's bounds and counters.

What lives here: `Settings`, every bound with its unit in its name, and `Stats`,
plain integers that a metrics exporter may read. What must not: behaviour.
Heat: read per connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Rejection = Callable[[int, str, str, bytes], tuple[bytes, bytes]]


def plain_rejection(status: int, code: str, message: str, target: bytes) -> tuple[bytes, bytes]:
    """Return header lines and body of an answer that the app never saw."""
    return b"content-type: text/plain; charset=utf-8\r\n", f"{message}\n".encode()


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds of one server; RELIABILITY section 1 gives the precedents."""

    max_line_bytes: int = 8 * 1024
    max_head_bytes: int = 32 * 1024
    max_headers: int = 100
    max_body_bytes: int = 32 * 1024 * 1024
    max_upload_bytes: int = 512 * 1024 * 1024
    eager_body_bytes: int = 64 * 1024  # a larger body is read only when the app asks for it
    body_patience_s: float = 1.0  # a smaller one, when it takes longer than this
    body_memory_bytes: int = 1024 * 1024 * 1024
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    body_min_bytes_per_s: int = 500
    body_grace_s: float = 20.0
    keepalive_s: float = 75.0
    crowded_keepalive_s: float = 2.0
    drain_idle_s: float = 1.0  # a request may be on its way when the drain begins
    max_connections: int = 20_000
    max_connections_per_address: int = 0
    max_requests_per_connection: int = 0
    write_high_bytes: int = 64 * 1024
    write_timeout_s: float = 60.0
    pipelined_bytes: int = 64 * 1024
    linger_s: float = 1.0
    linger_bytes: int = 64 * 1024
    stream_keepalive_s: float = 15.0
    tick_s: float = 0.5
    trusted_proxies: tuple[str, ...] = ()


class Stats:
    """Counters of one server since its start; gauges say so."""

    __slots__ = (
        "accepted",
        "active_requests",
        "body_bytes",
        "connections",
        "refused",
        "rejected",
        "requests",
        "stalled",
        "streams",
        "timeouts",
    )

    def __init__(self) -> None:
        self.accepted = 0  # connections
        self.refused = 0  # connections past a bound, answered 503
        self.rejected = 0  # requests that broke the grammar or a bound
        self.timeouts = 0  # connections closed by a deadline
        self.stalled = 0  # answers ended because the client read nothing
        self.requests = 0
        self.connections = 0  # gauge
        self.active_requests = 0  # gauge
        self.streams = 0  # gauge: splices under way
        self.body_bytes = 0  # gauge: request bodies held that came in more than one read
