"""What the types of the configuration cannot say: syntax of values, and references.

Purpose: compare settings with each other and with their own little grammars; each fault is named at its place.
Lives here: checks, one function per table, and the parsers of those grammars. Must not: I/O, defaults. Heat: cold.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import zoneinfo
from collections.abc import Iterable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from nbgate.config_read import Reader, Where, nearest, printable
from nbgate.config_shape import DIALECTS, Channel, Config, Key

DAY_S: Final = 86_400
# RFC 9110 5.6.2
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_FIELD_VALUE: Final = re.compile(r"[\x21-\x7e\x80-\uffff](?:[\t\x20-\x7e\x80-\uffff]*[\x21-\x7e\x80-\uffff])?\Z")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_KEY: Final = re.compile(r"[\x21-\x7e]{8,512}\Z")
_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?\.?\Z")
_DURATION: Final = re.compile(r"([1-9][0-9]{0,6})([smhdw])\Z")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
# Headers that framing, routing or credentials own; a channel may not set them.
_OWNED_HEADERS: Final = frozenset(
    ("host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "expect")
)
_MAX_UNIX_PATH_BYTES: Final = 107  # sun_path of Linux, less its NUL
_PROXY_SCHEMES: Final = ("http", "socks5", "socks5h")
_STORE_SCHEMES: Final = ("sqlite", "postgresql")
_REDIS_SCHEMES: Final = ("redis", "rediss", "unix")


class Listen(NamedTuple):
    """One address to listen on: a unix path, or a host and a port."""

    unix: str
    host: str
    port: int


def parse_listen(text: str) -> Listen:
    """Read host:port, [v6]:port, :port or unix:/path.

    Raises ValueError with what was expected.
    """
    if text.startswith("unix:"):
        path = text[5:]
        if not path.startswith("/") or "\0" in path or path.endswith("/"):
            raise ValueError("expected unix:/absolute/path")
        if len(path.encode()) > _MAX_UNIX_PATH_BYTES:
            raise ValueError(f"a unix path has at most {_MAX_UNIX_PATH_BYTES} bytes")
        return Listen(path, "", 0)
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not int(port) <= 65_535:
        raise ValueError("expected host:port with a port from 0 to 65535, [v6]:port or unix:/path")
    if host.startswith("["):
        if not host.endswith("]") or not _is_address(host[1:-1], 6):
            raise ValueError("expected [v6]:port with an IPv6 address in the brackets")
        return Listen("", host[1:-1], int(port))
    if ":" in host:
        raise ValueError("expected an IPv6 address in brackets: [::1]:8080")
    if host and not _HOST.match(host):
        raise ValueError("expected a host name or address before the port")
    return Listen("", host, int(port))


def _is_address(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def duration_s(text: str) -> int:
    """Read "45s", "10m", "12h", "30d" or "2w" as seconds.

    Raises ValueError for anything else.
    """
    found = _DURATION.match(text)
    if found is None:
        raise ValueError('expected a duration such as "12h", "30d" or "2w"')
    return int(found.group(1)) * _UNIT_S[found.group(2)]


def expires_at(text: str, written_at: float) -> float:
    """Work out when a key ends, in seconds since the epoch; 0 = never.

    A duration counts from `written_at`; a date is its first moment in UTC.
    Raises ValueError when it is neither.
    """
    if not text:
        return 0.0
    if _DURATION.match(text):
        return written_at + duration_s(text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError('expected a duration such as "30d", or a date such as "2030-12-31"') from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return moment.timestamp()


def check_glob(text: str) -> None:
    """Refuse a model glob that could never match: `*`, `?` and `[…]` are known.

    Raises ValueError with the reason.
    """
    if not text:
        raise ValueError("expected a model name or glob, got an empty string")
    if len(text) > 256 or not text.isprintable() or " " in text:
        raise ValueError("expected at most 256 printable characters without spaces")
    at = 0
    while (at := text.find("[", at)) >= 0:
        # As in fnmatch: "]" right after "[" or "[!" stands for itself.
        start = at + (2 if text[at + 1 : at + 2] == "!" else 1)
        end = text.find("]", start + 1)
        if end < 0:
            raise ValueError(f'"[" at position {at + 1} has no "]"')
        at = end + 1


def check_base_url(text: str) -> None:
    """Refuse all but a plain http or https URL.

    Raises ValueError; the message never holds the URL, it may carry credentials.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("expected a URL such as https://api.example.com/v1") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("expected a URL that begins with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("a URL here must not hold credentials; put them in keys")
    if "?" in text or "#" in text:
        raise ValueError("a URL here must not hold a query or a fragment")
    host = parts.hostname or ""
    if not (_HOST.match(host) or _is_address(host, 6)) or port == 0 or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("expected a URL with a host, such as https://api.example.com/v1")


def _check_scheme(text: str, schemes: tuple[str, ...]) -> None:
    """Refuse a URL of another scheme; its text stays secret."""
    if text.partition("://")[0] not in schemes or "://" not in text:
        raise ValueError(f"expected a URL that begins with {' or '.join(f'{one}://' for one in schemes)}")


class Checker:
    """Runs every cross check over what the reader found sound."""

    def __init__(self, config: Config, reader: Reader, channels: Iterable[str], groups: Iterable[str]) -> None:
        self.config = config
        self.reader = reader
        # NOTE: names as the file has them, so that a table with a fault is not also called unknown.
        self.channels = frozenset(channels)
        self.groups = frozenset(groups) | {"default"}

    def run(self) -> None:
        """Note each fault in the reader."""
        self._server()
        self._services()
        for name, channel in self.config.channels.items():
            self._channel(name, channel)
        self._router()
        self._groups()
        self._keys()
        self._pages()

    def _bad(self, where: Where, message: str) -> None:
        if not self.reader.is_faulty(where):
            self.reader.problem(where, message)

    def _try(self, where: Where, parse: object, *args: object) -> None:
        try:
            parse(*args)  # type: ignore[operator]
        except ValueError as exc:
            self._bad(where, str(exc))

    def _server(self) -> None:
        server = self.config.server
        if not server.listen:
            self._bad(("server", "listen"), "expected at least one address")
        self._listens(("server", "listen"), server.listen)
        if self.config.admin.listen:
            # NOTE: refused, not ignored: whoever sets it counts on the main listener being closed to /metrics.
            self._bad(("admin", "listen"), "this version has no separate listener; leave it empty")
        if not server.data_dir or "\0" in server.data_dir:
            self._bad(("server", "data_dir"), "expected a folder")
        # "unix:" stands for whoever comes by a unix socket (auth.Proxies).
        self._networks(("server", "trusted_proxies"), server.trusted_proxies, "unix:")
        self._networks(("admin", "metrics_networks"), self.config.admin.metrics_networks)
        if server.max_line_kb > server.max_head_kb:
            self._bad(("server", "max_line_kb"), f"expected at most max_head_kb ({server.max_head_kb})")
        if server.drain_s > server.drain_streams_s:
            self._bad(("server", "drain_s"), f"expected at most drain_streams_s ({server.drain_streams_s:g})")

    def _listens(self, where: Where, texts: tuple[str, ...]) -> None:
        seen: set[str] = set()
        for index, text in enumerate(texts):
            place = (*where, index)
            self._try(place, parse_listen, text)
            if text in seen and not text.endswith(":0"):
                self._bad(place, f'"{printable(text)}" stands twice')
            seen.add(text)

    def _networks(self, where: Where, texts: tuple[str, ...], word: str = "") -> None:
        for index, text in enumerate(texts):
            if text and text == word:
                continue
            try:
                ipaddress.ip_network(text)
            except ValueError as exc:
                why = " (bits are set beyond the prefix)" if "host bits" in str(exc) else ""
                self._bad((*where, index), f'expected a network such as 10.0.0.0/8{why}, got "{printable(text)}"')

    def _services(self) -> None:
        self._try(("store", "url"), _check_scheme, self.config.store.url, _STORE_SCHEMES)
        if self.config.redis.url:
            self._try(("redis", "url"), _check_scheme, self.config.redis.url, _REDIS_SCHEMES)
        if self.config.admin.key and not _KEY.match(self.config.admin.key):
            self._bad(("admin", "key"), "expected 8 to 512 printable characters without spaces")
        zone = self.config.billing.time_zone
        try:
            zone == "UTC" or zoneinfo.ZoneInfo(zone)
        except (ValueError, OSError, KeyError):
            self._bad(("billing", "time_zone"), f'expected a time zone such as Europe/Berlin, got "{printable(zone)}"')

    def _channel(self, name: str, channel: Channel) -> None:
        where: Where = ("channels", name)
        if not _NAME.match(name):
            self._bad(where, "expected a channel name of 1 to 64 letters, digits, . _ -")
        if channel.type != "demo":
            for field in ("base_url", "keys", "models"):
                if not getattr(channel, field):
                    self._bad((*where, field), f'is missing; a channel of type "{channel.type}" needs it')
        if channel.base_url:
            self._try((*where, "base_url"), check_base_url, channel.base_url)
        if channel.proxy:
            self._try((*where, "proxy"), _check_scheme, channel.proxy, _PROXY_SCHEMES)
        for index, glob in enumerate(channel.models):
            self._try((*where, "models", index), check_glob, glob)
        for public, real in channel.map.items():
            if not public or not real:
                self._bad((*where, "map", public), "expected a model name on both sides")
        self._words((*where, "dialects"), channel.dialects, DIALECTS, "dialect")
        self._words((*where, "groups"), channel.groups, self.groups, "group")
        values: set[str] = set()
        for index, key in enumerate(channel.keys):
            place = (*where, "keys", index, "value")
            if not key.value or not _FIELD_VALUE.match(key.value):
                self._bad(place, "expected a key of printable characters on one line")
            elif key.value in values:
                self._bad(place, "this key stands twice in the channel")
            values.add(key.value)
        self._headers((*where, "headers"), channel.headers)
        times = channel.timeouts
        if times.total_s < times.answer_s or times.total_s < times.first_byte_s:
            self._bad((*where, "timeouts"), "expected total_s to be at least first_byte_s and answer_s")

    def _headers(self, where: Where, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            if not _TOKEN.match(name):
                self._bad((*where, name), "expected a header name")
            elif name.lower() in _OWNED_HEADERS:
                self._bad((*where, name), "this header belongs to the connection and cannot be set")
            elif value and not _FIELD_VALUE.match(value):
                self._bad((*where, name), "expected a header value on one line")

    def _words(self, where: Where, words: tuple[str, ...], known: Iterable[str], noun: str) -> None:
        names = set(known)
        for index, word in enumerate(words):
            if word not in names:
                self._bad((*where, index), f'unknown {noun} "{printable(word)}"{nearest(word, names)}')
            elif word in words[:index]:
                self._bad((*where, index), f'{noun} "{printable(word)}" stands twice')

    def _router(self) -> None:
        name = self.config.router.default_channel
        if name and name not in self.channels:
            message = f'unknown channel "{printable(name)}"{nearest(name, self.channels)}'
            self._bad(("router", "default_channel"), message)

    def _groups(self) -> None:
        for name, group in self.config.groups.items():
            if not _NAME.match(name):
                self._bad(("groups", name), "expected a group name of 1 to 64 letters, digits, . _ -")
            self._words(("groups", name, "channels"), group.channels, self.channels, "channel")
            for glob in group.price_factors:
                self._try(("groups", name, "price_factors", glob), check_glob, glob)
        for model, entry in self.config.models.items():
            where: Where = ("models", model)
            if not model or model in entry.fallbacks:
                self._bad((*where, "fallbacks"), "a model cannot fall back on itself")
            bounds = [tier.over_input for tier in entry.price.tiers] if entry.price else []
            if bounds != sorted(set(bounds)):
                self._bad((*where, "price", "tiers"), "expected tiers with rising over_input")

    def _keys(self) -> None:
        seen: dict[str, int] = {}
        for index, key in enumerate(self.config.keys):
            self._key(("keys", index), key)
            if (first := seen.setdefault(key.key, index)) != index:
                self._bad(("keys", index, "key"), f"the same key as keys[{first}]")
        if self.config.demo.key:
            if not _KEY.match(self.config.demo.key):
                self._bad(("demo", "key"), "expected 8 to 512 printable characters without spaces")
            if self.config.demo.key in seen or self.config.demo.key == self.config.admin.key:
                self._bad(("demo", "key"), "the same key is in use elsewhere in this file")
        if self.config.admin.key and self.config.admin.key in seen:
            self._bad(("admin", "key"), f"the same key as keys[{seen[self.config.admin.key]}]")

    def _key(self, where: Where, key: Key) -> None:
        if not _KEY.match(key.key):
            self._bad((*where, "key"), "expected 8 to 512 printable characters without spaces")
        for index, glob in enumerate(key.models):
            self._try((*where, "models", index), check_glob, glob)
        self._networks((*where, "networks"), key.networks)
        self._words((*where, "group"), key.group, self.groups, "group")
        self._try((*where, "expires"), expires_at, key.expires, 0.0)

    def _pages(self) -> None:
        for index, origin in enumerate(self.config.cors.origins):
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
                self._bad(("cors", "origins", index), 'expected "*" or an origin such as https://app.example.com')
        for name in ("public_url", "topup_url"):
            url = getattr(self.config.site, name)
            if url and not re.fullmatch(r"https?://[\x21-\x7e]+", url):
                self._bad(("site", name), "expected a URL that begins with http:// or https://")
        for index, contact in enumerate(self.config.site.contacts):
            if not re.fullmatch(r"(?:https?://|mailto:|tel:)[\x21-\x7e]+", contact.url):
                self._bad(("site", "contacts", index, "url"), "expected a URL: https://, mailto: or tel:")
