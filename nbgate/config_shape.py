"""The shape of the configuration: one frozen struct per table of the file.

Purpose: names, types, defaults, bounds and units of every setting; attribute names are the TOML names.
Lives here: structs and small derived values. Must not: I/O, cross checks (`config_check`), parsing (`config_read`).
Heat: cold; instances are read on the request path, never made there.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from nbgate.demo.models import MODELS as DEMO_MODELS

__all__ = ["DEFAULT_DIALECTS", "DEMO_MODELS", "DIALECTS", "Config", "Section"]

DIALECTS: Final = (
    "chat",
    "responses",
    "messages",
    "embeddings",
    "completions",
    "moderations",
    "images",
    "rerank",
    "gemini",
)
DEFAULT_DIALECTS: Final[dict[str, tuple[str, ...]]] = {
    "openai": ("chat", "responses", "embeddings", "completions", "moderations", "images"),
    "azure": ("chat", "responses", "embeddings", "completions", "images"),
    "anthropic": ("messages",),
    "gemini": ("gemini",),
    "station": DIALECTS,
    "demo": ("chat", "responses", "messages", "embeddings", "completions", "moderations", "images"),
}

Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Positive = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Percent = Annotated[int, Meta(ge=0, le=100)]
Weight = Annotated[int, Meta(ge=0, le=10_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=86_400)]
Kb = Annotated[int, Meta(ge=1, le=65_536)]
Mb = Annotated[int, Meta(ge=1, le=65_536)]
Usd = Annotated[float, Meta(ge=0, le=1e9)]
Factor = Annotated[float, Meta(ge=0, le=1e6)]
Text = Annotated[str, Meta(max_length=4096)]
# A secret never shows in a repr, a log line or a problem.
Secret = Annotated[str, Meta(max_length=65_536, extra={"secret": True})]
# A derived value is worked out by the reader; the file may not set it.
DerivedText = Annotated[str, Meta(extra={"derived": True})]
DerivedSeconds = Annotated[float, Meta(extra={"derived": True})]
Names = tuple[Text, ...]
LoneOrNames = Annotated[tuple[Text, ...], Meta(extra={"lone": True})]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all tables: immutable, by name only, secrets masked in `repr`."""

    # Fields whose value is replaced by *** wherever the struct is shown.
    hidden: ClassVar[frozenset[str]] = frozenset()
    # The field that a lone string stands for, as in keys = ["sk-…"].
    shorthand: ClassVar[str] = ""

    def __repr__(self) -> str:
        parts = []
        for name in self.__struct_fields__:
            value = getattr(self, name)
            parts.append(f"{name}={'***' if name in self.hidden and value else repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __rich_repr__(self) -> Any:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            yield name, ("***" if name in self.hidden and value else value)


class Server(Section, frozen=True, kw_only=True):
    """[server]: where it listens, and the bounds of what it takes in."""

    listen: Names = ("127.0.0.1:8080",)
    workers: Annotated[int, Meta(ge=0, le=1024)] = 0
    data_dir: Text = "data"
    trusted_proxies: Names = ()
    allow_query_key: bool = True
    drain_s: Seconds = 30.0
    drain_streams_s: Seconds = 300.0
    memory_mb: Annotated[int, Meta(ge=0, le=16_777_216)] = 0
    max_body_mb: Mb = 32
    max_upload_mb: Mb = 512
    max_line_kb: Annotated[int, Meta(ge=1, le=63)] = 8
    max_head_kb: Annotated[int, Meta(ge=1, le=1024)] = 32
    max_headers: Annotated[int, Meta(ge=8, le=10_000)] = 100
    head_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    body_min_bytes_per_s: Count = 500
    keepalive_s: Seconds = 75.0
    max_connections: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    max_connections_per_address: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    max_requests_per_connection: Count = 0
    write_high_kb: Kb = 64
    write_timeout_s: Seconds = 60.0


class Admin(Section, frozen=True, kw_only=True):
    """[admin]: who may administer, and where."""

    hidden = frozenset({"key"})
    key: Secret = ""
    listen: Text = ""
    metrics_networks: Names = ()


class Store(Section, frozen=True, kw_only=True):
    """[store]: where keys, accounts and the ledger live."""

    hidden = frozenset({"url"})
    url: Secret = "sqlite:///nbgate.db"


class Redis(Section, frozen=True, kw_only=True):
    """[redis]: rates shared by several nodes."""

    hidden = frozenset({"url"})
    url: Secret = ""
    on_failure: Literal["local", "open", "closed"] = "local"


class ChannelKey(Section, frozen=True, kw_only=True):
    """One credential of a channel; a lone string is its value."""

    hidden = frozenset({"value"})
    shorthand = "value"
    value: Secret
    weight: Weight = 1
    rpm: Count = 0
    tpm: Count = 0
    parallel: Count = 0
    enabled: bool = True


class Timeouts(Section, frozen=True, kw_only=True):
    """Deadlines of one upstream call, in seconds."""

    connect_s: Seconds = 5.0
    first_byte_s: Seconds = 120.0
    answer_s: Seconds = 600.0
    idle_s: Seconds = 120.0
    total_s: Seconds = 3600.0


class ChannelLimits(Section, frozen=True, kw_only=True):
    """What a channel may carry; 0 = no limit."""

    rpm: Count = 0
    tpm: Count = 0
    parallel: Count = 0
    usd_per_day: Usd = 0.0


class Params(Section, frozen=True, kw_only=True):
    """Edits of a request body before it goes upstream."""

    set: dict[str, Any] = {}
    default: dict[str, Any] = {}
    remove: Names = ()


class Tls(Section, frozen=True, kw_only=True):
    """How an upstream's certificate is checked."""

    verify: bool = True
    ca_file: Text = ""
    server_name: Text = ""


class Channel(Section, frozen=True, kw_only=True):
    """[channels.NAME]: one upstream account."""

    hidden = frozenset({"headers", "proxy"})
    name: DerivedText = ""
    type: Literal["openai", "anthropic", "gemini", "azure", "station", "demo"]
    enabled: bool = True
    base_url: Text = ""
    keys: tuple[ChannelKey, ...] = ()
    models: Names = ()
    map: dict[str, Text] = {}
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] = 0
    weight: Weight = 1
    groups: Names = ("default",)
    dialects: Names = ()
    proxy: Secret = ""
    timeouts: Timeouts = Timeouts()
    upstream_errors: Literal["masked", "verbatim"] = "masked"
    limits: ChannelLimits = ChannelLimits()
    headers: dict[str, Secret] = {}
    params: Params = Params()
    tls: Tls = Tls()


class PriceTier(Section, frozen=True, kw_only=True):
    """Prices above a size of input; None = as without the tier."""

    over_input: Count
    input: Usd | None = None
    output: Usd | None = None
    cached_read: Usd | None = None
    cached_write: Usd | None = None
    cached_write_1h: Usd | None = None
    reasoning: Usd | None = None
    audio_in: Usd | None = None
    audio_out: Usd | None = None
    image_in: Usd | None = None
    image_out: Usd | None = None


class Price(Section, frozen=True, kw_only=True):
    """USD per million tokens, per call, per second; None = not stated."""

    input: Usd | None = None
    output: Usd | None = None
    cached_read: Usd | None = None
    cached_write: Usd | None = None
    cached_write_1h: Usd | None = None
    reasoning: Usd | None = None
    audio_in: Usd | None = None
    audio_out: Usd | None = None
    image_in: Usd | None = None
    image_out: Usd | None = None
    per_call: Usd | None = None
    per_second: Usd | None = None
    image: dict[str, dict[str, Usd]] = {}
    tools: dict[str, Usd] = {}
    tiers: tuple[PriceTier, ...] = ()


class Model(Section, frozen=True, kw_only=True):
    """[models."NAME"]: price and bounds of a public model name."""

    price: Price | None = None
    max_output_tokens: Count = 0
    fallbacks: Names = ()


class DefaultModels(Section, frozen=True, kw_only=True):
    """[router.default_models]: for calls that may name no model."""

    images: Text = "dall-e-3"
    moderations: Text = "omni-moderation-latest"
    speech: Text = "tts-1"
    transcriptions: Text = "whisper-1"


class Router(Section, frozen=True, kw_only=True):
    """[router]: how a channel is chosen and when another is tried."""

    strategy: Literal["weighted", "least_busy"] = "weighted"
    tries: Annotated[int, Meta(ge=1, le=10)] = 3
    default_channel: Text = ""
    retry_budget_percent: Percent = 20
    affinity: bool = True
    default_models: DefaultModels = DefaultModels()


class Rates(Section, frozen=True, kw_only=True):
    """Rates of a caller; 0 = no limit."""

    rpm: Count = 0
    tpm: Count = 0
    parallel: Count = 0


class Limits(Section, frozen=True, kw_only=True):
    """[limits.default]: of a key that has none of its own."""

    default: Rates = Rates()


class Group(Section, frozen=True, kw_only=True):
    """[groups.NAME]: price factor, rates and channels of some keys."""

    name: Text = ""
    price_factor: Factor = 1.0
    price_factors: dict[str, Factor] = {}
    channels: Names = ()
    selectable: bool = False
    rpm: Count = 0
    tpm: Count = 0
    parallel: Count = 0


class Billing(Section, frozen=True, kw_only=True):
    """[billing]: whether and how calls are paid."""

    mode: Literal["prepaid", "postpaid", "off"] = "prepaid"
    unpriced: Literal["refuse", "free"] = "refuse"
    reserve_cap_usd: Usd = 1.0
    time_zone: Text = "UTC"


class Streaming(Section, frozen=True, kw_only=True):
    """[streaming]: silence and held frames of SSE answers."""

    keepalive_s: SecondsOrNone = 15.0
    hold_kb: Kb = 256


class Upstream(Section, frozen=True, kw_only=True):
    """[upstream]: the pool of connections to all upstreams, per worker."""

    max_connections: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    max_per_channel: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    max_waiters: Count = 1000
    wait_s: Seconds = 5.0
    idle_s: Seconds = 55.0
    dns_cache_s: SecondsOrNone = 30.0
    max_head_kb: Annotated[int, Meta(ge=1, le=1024)] = 64


class Logging(Section, frozen=True, kw_only=True):
    """[logging]: the access log and the level of everything else."""

    access: Text = "data/access.jsonl"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Contact(Section, frozen=True, kw_only=True):
    """A link shown on the pages."""

    label: Text
    url: Text


class Site(Section, frozen=True, kw_only=True):
    """[site]: what the pages show."""

    name: Text = "nbgate"
    public_url: Text = ""
    topup_url: Text = ""
    currency: Annotated[str, Meta(min_length=1, max_length=8)] = "USD"
    rate: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    contacts: tuple[Contact, ...] = ()


class Signup(Section, frozen=True, kw_only=True):
    """[signup]: who may make an account."""

    mode: Literal["open", "invite", "closed"] = "closed"
    bonus_usd: Usd = 0.0


class Demo(Section, frozen=True, kw_only=True):
    """[demo]: the key that newcomers may try."""

    hidden = frozenset({"key"})
    key: Secret = ""
    rpm_per_address: Count = 3
    usd_per_day: Usd = 1.0


class Cors(Section, frozen=True, kw_only=True):
    """[cors]: pages of which origins may call from a browser."""

    origins: Names = ()


class Budgets(Section, frozen=True, kw_only=True):
    """What a key may spend per window; 0 = no budget."""

    usd_per_day: Usd = 0.0
    usd_per_week: Usd = 0.0
    usd_per_month: Usd = 0.0
    usd_total: Usd = 0.0


class Key(Section, frozen=True, kw_only=True):
    """[[keys]]: a caller's key that stands in the file."""

    hidden = frozenset({"key"})
    key: Secret
    account: Annotated[str, Meta(min_length=1, max_length=128)]
    name: Text = ""
    enabled: bool = True
    usd: Literal["unlimited"] | Usd = "unlimited"
    rpm: Count = 0
    tpm: Count = 0
    parallel: Count = 0
    models: Names = ()
    networks: Names = ()
    group: LoneOrNames = ()
    budgets: Budgets = Budgets()
    expires: Text = ""
    # Seconds since the epoch, 0 = never; a duration such as "30d" counts from the file's last change.
    expires_at: DerivedSeconds = 0.0


class Config(Section, frozen=True, kw_only=True):
    """The whole file, every default filled in."""

    source: DerivedText = ""
    server: Server = Server()
    admin: Admin = Admin()
    store: Store = Store()
    redis: Redis = Redis()
    channels: dict[str, Channel] = {}
    models: dict[str, Model] = {}
    router: Router = Router()
    limits: Limits = Limits()
    groups: dict[str, Group] = {}
    billing: Billing = Billing()
    streaming: Streaming = Streaming()
    upstream: Upstream = Upstream()
    logging: Logging = Logging()
    site: Site = Site()
    signup: Signup = Signup()
    demo: Demo = Demo()
    cors: Cors = Cors()
    keys: tuple[Key, ...] = ()

    @property
    def has_demo(self) -> bool:
        """Tell whether an enabled channel is served by the built-in demo."""
        return any(channel.type == "demo" and channel.enabled for channel in self.channels.values())
