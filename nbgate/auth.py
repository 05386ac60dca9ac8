"""Who calls: find the key in a request and what that key may do.

Purpose: key of the request → SHA-256 → record; then the checks of a record.
Lives here: where a key may stand, the directory of known keys, the order of
checks, the caller's address, and cutting keys out of queries. Must not: rates
(`allowance`), money, I/O, clocks (handed in). Heat: R.

Rule 1: a key is only ever looked up by its whole SHA-256 digest. No raw key is
kept, compared or named in an error. What cannot be a key is an unknown key.
Rule 2: the order of checks is part of the contract: exists and enabled,
expired, account enabled, address, endpoint and model.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from nbgate.allowance import NO_LIMITS, Limits
from nbgate.errors import GateError

if TYPE_CHECKING:
    from nbgate.config_shape import Config, Key

Network = IPv4Network | IPv6Network

MAX_KEY_BYTES: Final = 512  # longer ones are unknown without being hashed
MAX_PASSED: Final = 512  # decisions kept per key
MAX_NAME_CHARS: Final = 256  # longer model names are judged each time
MAX_HOPS: Final = 32
MAX_ADDRESSES: Final = 4096
MAX_ABSENT: Final = 16_384
ABSENT_S: Final = 5.0

# --- the key of a request ------------------------------------------------------------------------------------------

_QUERY_NAMES: Final = frozenset((b"api_key",))
_GEMINI_QUERY_NAMES: Final = frozenset((b"api_key", b"key"))
# Cut from logs wherever they stand, also those that are no key here: people mistype.
_SECRET_NAMES: Final = frozenset(
    (b"api_key", b"key", b"api-key", b"apikey", b"access_token", b"token", b"x-api-key", b"x-goog-api-key", b"secret")
)
_MAYBE_SECRET: Final = re.compile(rb"(?i)key|token|secret|%")
_MARKS: Final = re.compile(rb"([&;?#])")
_PROTOCOL_STEM: Final = b"openai-insecure-api-key."


def pick_key(
    family: str,
    headers: tuple[bytes | None, bytes | None, bytes | None],
    query: bytes = b"",
    allow_query: bool = True,
) -> bytes | None:
    """Find the caller's key, None if there is none.

    `headers`: the values of authorization, x-api-key and x-goog-api-key. On
    Claude paths x-api-key wins, elsewhere Authorization; both before a query.
    x-goog-api-key and `?key=` count on Gemini paths alone.
    """
    authorization, x_api_key, goog = headers
    if x_api_key and family == "claude":
        key = x_api_key.strip(b" \t")
        if key:
            return key
    if authorization and authorization[:7].lower() == b"bearer ":
        key = authorization[7:].strip(b" \t")
        if key:
            return key
    if x_api_key:
        key = x_api_key.strip(b" \t")
        if key:
            return key
    if goog and family == "gemini":
        key = goog.strip(b" \t")
        if key:
            return key
    if query and allow_query:
        return _query_key(query, _GEMINI_QUERY_NAMES if family == "gemini" else _QUERY_NAMES)
    return None


def _query_key(query: bytes, names: frozenset[bytes]) -> bytes | None:
    for pair in query.split(b"&"):
        name, _, value = pair.partition(b"=")
        if value and _plain(name) in names:
            return unquote_to_bytes(value)
    return None


def _plain(name: bytes) -> bytes:
    return unquote_to_bytes(name).lower() if b"%" in name else name.lower()


def pick_protocol_key(value: bytes | None) -> bytes | None:
    """Find the key that browsers put into Sec-WebSocket-Protocol."""
    for item in (value or b"").split(b","):
        item = item.strip(b" \t")
        if item.startswith(_PROTOCOL_STEM) and len(item) > len(_PROTOCOL_STEM):
            return item[len(_PROTOCOL_STEM) :]
    return None


def strip_query(query: bytes) -> bytes:
    """Remove what may be the caller's key from a query that goes upstream.

    NOTE: `key=` goes on all paths: who mistakes the path still gave us a secret.
    """
    if not query or not _MAYBE_SECRET.search(query):
        return query
    pairs = query.split(b"&")
    return b"&".join(pair for pair in pairs if _plain(pair.partition(b"=")[0]) not in _GEMINI_QUERY_NAMES)


def redact_query(raw: bytes) -> bytes:
    """Cut keys out of a query, or of a whole request target, for the log."""
    if b"=" not in raw or not _MAYBE_SECRET.search(raw):
        return raw
    # PERF: a split, for one pattern of pairs is quadratic: 0.3 s for 8 KB without "=".
    parts = _MARKS.split(raw)
    out: list[bytes] = []
    mark, hides = b"", False
    for at in range(0, len(parts), 2):
        if at:
            mark = parts[at - 1]
        if hides and (mark == b";" or mark == b"?"):  # a key may hold them
            continue
        name, equals, _ = parts[at].partition(b"=")
        hides = bool(equals) and _plain(name) in _SECRET_NAMES
        out += (mark, name, b"=***") if hides else (mark, parts[at])
    return b"".join(out)


# --- the record of a key -------------------------------------------------------------------------------------------


def _globs(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    """Compile shell globs to one pattern; None = everything."""
    if not patterns or "*" in patterns:
        return None
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))


@dataclass(frozen=True, slots=True, eq=False)
class KeyRecord:
    """What one key may do. Immutable: a change is a new record.

    `expires_at` in seconds since the epoch, 0 = never. Empty `networks`,
    `models`, `endpoints` allow all. `groups`: names in the order of trial.
    """

    key_id: str
    account_id: str
    display: str = ""
    label: str = ""
    enabled: bool = True
    expires_at: float = 0.0
    account_enabled: bool = True
    networks: tuple[Network, ...] = ()
    models: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    groups: tuple[str, ...] = ("default",)
    limits: Limits = NO_LIMITS
    account_limits: Limits = NO_LIMITS
    admin: bool = False
    unlimited_usd: bool = False
    # Derived once, so that `check` of a plain key is a few attribute reads.
    plain: bool = field(init=False, repr=False)
    _model_globs: re.Pattern[str] | None = field(init=False, repr=False)
    _endpoint_globs: re.Pattern[str] | None = field(init=False, repr=False)
    # Decisions that were "yes": addresses as str, (endpoint, model) as tuples.
    _passed: set[str | tuple[str, str | None]] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "_model_globs", _globs(self.models))
        put(self, "_endpoint_globs", _globs(self.endpoints))
        globs = self._model_globs is not None or self._endpoint_globs is not None
        up = self.enabled and self.account_enabled
        put(self, "plain", up and not self.expires_at and not self.networks and not globs)

    def may_use(self, model: str) -> bool:
        """Tell whether a model is in the key's globs, for lists of models."""
        return self._model_globs is None or self._model_globs.match(model) is not None

    def remember(self, decision: str | tuple[str, str | None]) -> None:
        """Keep a "yes"; bounded, for clients choose the names in it."""
        if len(self._passed) >= MAX_PASSED:
            self._passed.clear()
        self._passed.add(decision)


def check(record: KeyRecord, *, now_s: float, peer: str, endpoint: str, model: str | None) -> None:
    """Let a known key pass, or say what it may not do.

    `now_s`: seconds since the epoch. `endpoint`: the name that the key's
    endpoint globs speak of. `model` None: the call names none (yet), and only
    the endpoint is judged.

    Raises:
        GateError: 401 or 403, in the order of the contract.
    """
    if record.plain:
        return
    if not record.enabled or (record.expires_at and now_s >= record.expires_at):
        raise GateError("invalid_api_key")
    if not record.account_enabled:
        raise GateError("account_disabled")
    passed = record._passed
    if record.networks and peer not in passed:
        address = _address(peer)
        if address is None or not _inside(address, record.networks):
            raise GateError("ip_not_allowed")
        record.remember(peer)
    if (endpoint, model) not in passed:
        _check_globs(record, endpoint, model)


def _check_globs(record: KeyRecord, endpoint: str, model: str | None) -> None:
    globs = record._endpoint_globs
    if globs is not None and globs.match(endpoint) is None:
        raise GateError("model_not_allowed", "This key may not use this endpoint.")
    if model is not None and not record.may_use(model):
        raise GateError("model_not_allowed", "This key may not use this model.", "model")
    if model is None or len(model) <= MAX_NAME_CHARS:
        record.remember((endpoint, model))


# --- the directory -------------------------------------------------------------------------------------------------


def digest_of(key: bytes) -> bytes:
    """Give the SHA-256 under which a key is known."""
    return sha256(key).digest()


def display_of(key: str) -> str:
    """Shorten a key to what may be shown: its first 6 and last 4 characters.

    ASCII, for a sign beyond it would send each log line the slow way.
    """
    return f"{key[:6]}...{key[-4:]}" if len(key) >= 20 else f"{key[: min(3, len(key) // 4)]}..."


class Directory:
    """All keys this worker knows, by digest.

    Filled from the config, later also by a control plane through `put`, `drop`
    and `put_absent`. While `complete`, a key that is not here does not exist;
    else a miss that is not `is_absent` has to be asked for.
    """

    __slots__ = ("_absent", "_records", "complete")

    def __init__(self, complete: bool = True) -> None:
        self.complete = complete
        self._records: dict[bytes, KeyRecord] = {}
        self._absent: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: bytes) -> KeyRecord | None:
        """Give the record of a key, None if it is not known here."""
        if len(key) > MAX_KEY_BYTES:
            return None
        return self._records.get(sha256(key).digest())

    def put(self, digest: bytes, record: KeyRecord) -> None:
        """Add or replace a record."""
        self._absent.pop(digest, None)
        self._records[digest] = record

    def drop(self, digest: bytes) -> KeyRecord | None:
        """Remove a record, at once and for all later requests."""
        return self._records.pop(digest, None)

    def put_absent(self, digest: bytes, now: float) -> None:
        """Remember for a while that nobody knows this key; `now` monotonic."""
        if len(self._absent) >= MAX_ABSENT:
            self._absent = {d: until for d, until in self._absent.items() if until > now}
            if len(self._absent) >= MAX_ABSENT:
                self._absent.clear()
        self._absent[digest] = now + ABSENT_S

    def is_absent(self, digest: bytes, now: float) -> bool:
        """Tell whether a fresh answer says that this key does not exist."""
        until = self._absent.get(digest)
        return until is not None and now < until

    @classmethod
    def from_config(cls, config: Config, admin_key: str = "", demo_key: str = "") -> Directory:
        """Build the directory of the keys that the file names.

        `admin_key` and `demo_key`: what was read from or made in data_dir when
        the file leaves them empty; the file wins. With the same key twice the
        first stands, static keys before demo before admin.
        """
        made = cls()
        default = Limits(config.limits.default.rpm, config.limits.default.tpm, config.limits.default.parallel)
        admin = config.admin.key or admin_key
        if admin:
            made._add_static(admin, "admin", admin=True, unlimited_usd=True)
        demo = config.demo.key or demo_key
        if demo:
            made._add_static(demo, "demo", limits=default)
        for key in reversed(config.keys):
            made._put_config_key(key, config, default)
        return made

    def _add_static(self, key: str, name: str, *, limits: Limits = NO_LIMITS, **more: bool) -> None:
        record = KeyRecord(name, name, display_of(key), name, limits=limits, **more)  # type: ignore[arg-type]
        self.put(digest_of(key.encode()), record)

    def _put_config_key(self, key: Key, config: Config, default: Limits) -> None:
        digest = digest_of(key.key.encode())
        group = config.groups.get(key.group[0]) if key.group else None
        ranks = [key, group, config.limits.default] if group is not None else [key, config.limits.default]
        limits = Limits(*(next((n for n in (getattr(r, f) for r in ranks) if n), 0) for f in Limits._fields))
        record = KeyRecord(
            key_id="file-" + digest.hex()[:24],
            account_id=key.account,
            display=display_of(key.key),
            label=key.name or key.account,
            enabled=key.enabled,
            expires_at=key.expires_at,
            networks=tuple(ip_network(text, strict=False) for text in key.networks),
            models=key.models,
            groups=key.group or ("default",),
            limits=limits,
            unlimited_usd=key.usd == "unlimited",
        )
        self.put(digest, record)


# --- the caller's address ------------------------------------------------------------------------------------------


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address; mapped IPv4 becomes IPv4, a zone is dropped."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _inside(address: IPv4Address | IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


class Proxies:
    """The proxies whose X-Forwarded-For is believed.

    Takes networks and addresses; `unix:` stands for peers on a unix socket
    (whose address is empty). Raises ValueError for anything else.
    """

    __slots__ = ("_answers", "networks", "trusts_any", "unix")

    def __init__(self, names: Iterable[str] = ()) -> None:
        names = tuple(names)
        self.unix = "unix:" in names
        self.networks = tuple(ip_network(name, strict=False) for name in names if name != "unix:")
        self.trusts_any = bool(names)
        self._answers: dict[tuple[str, bytes], str] = {}

    def trusts(self, peer: str) -> bool:
        """Tell whether a peer is such a proxy."""
        if not peer:
            return self.unix
        address = _address(peer)
        return address is not None and _inside(address, self.networks)

    def resolve(self, peer: str, forwarded: bytes) -> str:
        """Walk the hops from the right to the first that is no proxy of ours.

        Answers are kept: a proxy sends the same few values over and over.
        """
        found = self._answers.get((peer, forwarded))
        if found is None:
            found = self._walk(peer, forwarded)
            if len(forwarded) <= MAX_NAME_CHARS:
                if len(self._answers) >= MAX_ADDRESSES:
                    self._answers.clear()
                self._answers[peer, forwarded] = found
        return found

    def _walk(self, peer: str, forwarded: bytes) -> str:
        if not self.trusts(peer):
            return peer
        # APPSEC: only text that parsed as an address ever leaves here, so a hostile value reaches no log and no check.
        nearest = peer
        for hop in reversed(forwarded.rsplit(b",", MAX_HOPS)[-MAX_HOPS:]):
            address = _address(_hop_host(hop))
            if address is None:
                return nearest
            nearest = str(address)
            if not _inside(address, self.networks):
                return nearest
        return nearest


def _hop_host(hop: bytes) -> str:
    """Take the port off one hop: `1.2.3.4:5`, `[::1]:5`, `[::1]`."""
    text = hop.strip(b" \t").decode("ascii", "replace")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def peer_address(peer: str, forwarded: bytes | None, proxies: Proxies) -> str:
    """Give the address of the caller: the peer's, or what a proxy of ours says.

    `forwarded`: the value of X-Forwarded-For, several lines joined by a comma.
    """
    if forwarded is None or not proxies.trusts_any:
        return peer
    return proxies.resolve(peer, forwarded)
