"""How one credential of a channel is reached: address, deadlines, head.

What lives here: `Outbound`, made once per target and generation, so that a
request only joins ready bytes. What must not: the choice of a target
(`channels`), sockets (`upstream`). Heat: R.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from nbgate.channels import Target
from nbgate.config import Channel
from nbgate.upstream import Endpoint, Timeouts

_DEFAULT_VERSION: Final = b"2023-06-01"  # of a Claude call that names none, as the public documentation's curl


class Outbound:
    """Endpoint, deadlines and request heads of one target."""

    __slots__ = ("_credentials", "_heads", "_host", "_root", "endpoint", "hosts", "plain", "secrets", "stream")

    def __init__(self, target: Target, demo_socket: str) -> None:
        channel = target.channel
        url = urlsplit(channel.base_url or "http://demo")
        host = url.hostname or "localhost"
        tls = url.scheme == "https"
        port = url.port or (443 if tls else 80)
        self.endpoint = Endpoint(
            scheme="https" if tls else "http",
            host=host,
            port=port,
            unix_path=demo_socket if channel.type == "demo" else "",
            verify=channel.tls.verify,
            ca_file=channel.tls.ca_file,
            server_name=channel.tls.server_name,
            proxy=channel.proxy,
        )
        shown = f"[{host}]" if ":" in host else host
        self._host = shown if port == (443 if tls else 80) else f"{shown}:{port}"
        # NOTE: an openai base_url ends in /v1, an anthropic one does not: as the provider's own SDK takes it.
        path = url.path.rstrip("/")
        self._root = path if path.endswith("/v1") or channel.type == "openai" else path + "/v1"
        self._credentials = _credentials(channel, target.key)
        self._heads: dict[tuple[str, bytes, bool], bytes] = {}
        t = channel.timeouts
        deadlines = Timeouts(t.connect_s, t.first_byte_s, t.answer_s, t.idle_s, t.total_s)
        self.stream = deadlines.for_stream()
        self.plain = deadlines.for_whole()
        self.secrets = (target.key,) if target.key else ()
        self.hosts = (host,)

    def head(self, method: str, path: bytes, claude: bool) -> bytes:
        """Return the request head up to the forwarded fields.

        `path`: below the version root, e.g. /chat/completions, with its query.
        """
        known = self._heads.get((method, path, claude))
        if known is not None:
            return known
        lines = b"%b %b%b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\n%b" % (
            method.encode(),
            self._root.encode(),
            path,
            self._host.encode(),
            self._credentials[claude],
        )
        if len(self._heads) < 64 and b"?" not in path:
            self._heads[method, path, claude] = lines
        return lines


def _credentials(channel: Channel, key: str) -> tuple[bytes, bytes]:
    """Return the credential lines of OpenAI and of Claude calls."""
    added = b"".join(b"%b: %b\r\n" % (n.lower().encode(), v.encode()) for n, v in channel.headers.items())
    bearer = b"authorization: Bearer %b\r\n" % key.encode() if key else b""
    x_api_key = b"x-api-key: %b\r\n" % key.encode() if key else b""
    return bearer + added, (x_api_key if channel.type != "openai" else bearer) + added


def version_line(given: bytes | None) -> bytes:
    """Return the anthropic-version line of a Claude call."""
    return b"anthropic-version: %b\r\n" % (given or _DEFAULT_VERSION)
