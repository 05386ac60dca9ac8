"""Who calls: where a key may stand, what it may do, whose address counts."""

from __future__ import annotations

import time
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgate.allowance import Limits
from nbgate.auth import (
    MAX_PASSED,
    Directory,
    KeyRecord,
    Proxies,
    check,
    digest_of,
    display_of,
    peer_address,
    pick_key,
    pick_protocol_key,
    redact_query,
    strip_query,
)
from nbgate.config_shape import Admin, Config, Demo, Group, Key, Rates
from nbgate.config_shape import Limits as LimitsSection
from nbgate.errors import GateError

KEY = b"sk-" + b"Ab1" * 16


@pytest.mark.parametrize(
    ("family", "headers", "query", "expected"),
    [
        ("openai", (b"Bearer A", None, None), b"", b"A"),
        ("openai", (b"bEaReR  A ", None, None), b"", b"A"),
        ("openai", (b"Bearer A", b"X", b"G"), b"api_key=Q", b"A"),
        ("claude", (b"Bearer A", b"X", None), b"api_key=Q", b"X"),
        ("claude", (b"Bearer A", None, None), b"", b"A"),
        ("claude", (b"Bearer A", b"", None), b"", b"A"),
        ("gemini", (b"Bearer A", b"X", b"G"), b"key=Q", b"A"),
        ("gemini", (None, None, b"G"), b"key=Q", b"G"),
        ("gemini", (None, None, None), b"alt=sse&key=Q", b"Q"),
        ("openai", (None, b"X", None), b"api_key=Q", b"X"),
        ("openai", (None, None, None), b"a=b&api_key=s%6B-1", b"sk-1"),
        ("openai", (None, None, None), b"api%5Fkey=Q", b"Q"),
        ("openai", (None, None, None), b"key=Q", None),
        ("openai", (None, None, b"G"), b"", None),
        ("openai", (b"Basic QTpC", None, None), b"", None),
        ("openai", (b"Basic QTpC", b"X", None), b"", b"X"),
        ("openai", (b"Bearer", None, None), b"", None),
        ("openai", (b"Bearer ", None, None), b"api_key=", None),
    ],
)
def test_pick_key_takes_the_one_that_wins(
    family: str, headers: tuple[bytes | None, bytes | None, bytes | None], query: bytes, expected: bytes | None
) -> None:
    assert pick_key(family, headers, query, True) == expected


def test_pick_key_ignores_the_query_when_not_allowed() -> None:
    assert pick_key("openai", (None, None, None), b"api_key=Q", False) is None


def test_pick_protocol_key_takes_only_that_item() -> None:
    assert pick_protocol_key(b"realtime, openai-insecure-api-key.sk-1, openai-beta.realtime-v1") == b"sk-1"
    assert pick_protocol_key(b"realtime, openai-insecure-api-key.") is None
    assert pick_protocol_key(None) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"/v1/chat/completions", b"/v1/chat/completions"),
        (b"/v1/x?api_key=sk-1&a=b", b"/v1/x?api_key=***&a=b"),
        (b"a=1;api_key=sk-1", b"a=1;api_key=***"),
        (b"API_KEY=sk-1", b"API_KEY=***"),
        (b"%61pi_key=sk-1", b"%61pi_key=***"),
        (b"alt=sse&key=sk-1=2", b"alt=sse&key=***"),
        (b"monkey=1", b"monkey=1"),
    ],
)
def test_redact_query_cuts_keys_and_nothing_else(raw: bytes, expected: bytes) -> None:
    assert redact_query(raw) == expected


def test_redact_query_hides_all_of_a_key_with_semicolons_and_what_follows_one() -> None:
    assert redact_query(b"api_key=sk-a;bc?de&x=1;key=f") == b"api_key=***&x=1;key=***"


@pytest.mark.parametrize("query", [b"key=1&" + b"b" * 65_536, b"%" + b"b" * 65_536 + b"&a=1", b"key=1;" * 10_000])
def test_redact_query_takes_time_in_proportion(query: bytes) -> None:
    began = time.process_time()
    redact_query(query)
    assert time.process_time() - began < 1.0, "quadratic: it took 20 s"


@given(st.binary(max_size=60), st.binary(max_size=20), st.sampled_from([b"key", b"api_key", b"%6bey", b"Api_Key"]))
def test_redact_and_strip_leave_no_key_that_pick_key_would_take(before: bytes, after: bytes, name: bytes) -> None:
    query = before + b"&" + name + b"=sk-PLANTED&" + after
    assert b"PLANTED" not in strip_query(query)
    assert b"PLANTED" not in redact_query(query).partition(b"#")[0]


def test_strip_query_keeps_the_rest_as_it_came() -> None:
    assert strip_query(b"a=%20b&api_key=K&c&key=K&d=") == b"a=%20b&c&d="
    assert strip_query(b"") == b""


# --- the directory


def directory(**record: Any) -> tuple[Directory, KeyRecord]:
    made = KeyRecord("k1", "a1", **record)
    found = Directory()
    found.put(digest_of(KEY), made)
    return found, made


def test_find_knows_the_key_and_no_other() -> None:
    known, record = directory()
    assert known.find(KEY) is record
    for other in (KEY[:-1], KEY + b" ", KEY.lower(), KEY[:40] + b"x" * 11, b"x" * 40 + KEY[40:], digest_of(KEY)):
        assert known.find(other) is None


@pytest.mark.parametrize("key", [b"", b"\x00", b"\xff\xfe", b"' OR 1=1--", b"a" * 65_536, "sk-ключ".encode()])
def test_find_takes_malformed_keys_for_unknown(key: bytes) -> None:
    assert directory()[0].find(key) is None


def test_drop_is_felt_at_once() -> None:
    known, _ = directory()
    known.drop(digest_of(KEY))
    assert known.find(KEY) is None


def test_negative_answers_end_by_time_and_by_put() -> None:
    known = Directory(complete=False)
    known.put_absent(b"d", 100.0)
    assert known.is_absent(b"d", 104.9)
    assert not known.is_absent(b"d", 105.0)
    known.put_absent(b"d", 200.0)
    known.put(b"d", KeyRecord("k", "a"))
    assert not known.is_absent(b"d", 200.0)


def test_negative_answers_are_bounded() -> None:
    known = Directory(complete=False)
    for n in range(40_000):
        known.put_absent(b"%d" % n, n / 1e6)
    assert len(known._absent) <= 16_384


def test_directory_from_config_resolves_limits_and_groups() -> None:
    config = Config(
        limits=LimitsSection(default=Rates(rpm=5, tpm=500)),
        groups={"vip": Group(rpm=600)},
        admin=Admin(key="sk-admin-key-0123456789"),
        demo=Demo(key="sk-demo-key-0123456789"),
        keys=(
            Key(key="sk-one", account="ci", rpm=60, networks=("10.0.0.0/8",), expires_at=9.0),
            Key(key="sk-two", account="ci", group=("vip",), name="two", usd=1.5),
            Key(key="sk-one", account="later"),
        ),
    )
    known = Directory.from_config(config)
    one, two = known.find(b"sk-one"), known.find(b"sk-two")
    assert one is not None
    assert two is not None
    assert (one.account_id, one.limits, one.unlimited_usd) == ("ci", Limits(60, 500, 0), True)
    assert (one.expires_at, one.networks) == (9.0, (ip_network("10.0.0.0/8"),))
    assert (two.limits, two.groups, two.label, two.unlimited_usd) == (Limits(600, 500, 0), ("vip",), "two", False)
    admin, demo = known.find(b"sk-admin-key-0123456789"), known.find(b"sk-demo-key-0123456789")
    assert admin is not None
    assert admin.admin
    assert demo is not None
    assert not demo.admin
    again = Directory.from_config(config).find(b"sk-one")
    assert again is not None
    assert again.key_id == one.key_id, "levels outlive a reload"


def test_display_shows_first_six_and_last_four() -> None:
    assert display_of(KEY.decode()) == "sk-Ab1...1Ab1"
    assert len(display_of("sk-short")) <= 6


def test_record_never_shows_the_key() -> None:
    known = Directory.from_config(Config(keys=(Key(key=KEY.decode(), account="ci"),)))
    assert KEY.decode() not in repr(known.find(KEY))


# --- the checks


def refused(record: KeyRecord, now_s: float = 10.0, peer: str = "1.2.3.4", model: str | None = "gpt-4o") -> str:
    try:
        check(record, now_s=now_s, peer=peer, endpoint="chat.create", model=model)
    except GateError as exc:
        return exc.kind
    return ""


def test_check_refuses_in_the_order_of_the_contract() -> None:
    wrong: dict[str, Any] = {
        "enabled": False,
        "expires_at": 5.0,
        "account_enabled": False,
        "networks": (ip_network("10.0.0.0/8"),),
        "endpoints": ("messages.*",),
        "models": ("claude-*",),
    }
    right = {
        "enabled": True,
        "expires_at": 50.0,
        "account_enabled": True,
        "networks": (),
        "endpoints": (),
        "models": (),
    }
    seen = []
    for name in wrong:
        seen.append(refused(KeyRecord("k", "a", **wrong)))
        wrong[name] = right[name]
    assert seen == ["invalid_api_key"] * 2 + [
        "account_disabled",
        "ip_not_allowed",
        "model_not_allowed",
        "model_not_allowed",
    ]
    assert refused(KeyRecord("k", "a", **wrong)) == ""


def test_check_expires_at_the_second_even_after_it_passed() -> None:
    record = KeyRecord("k", "a", expires_at=100.0)
    assert refused(record, now_s=99.9) == ""
    assert refused(record, now_s=100.0) == "invalid_api_key"


def test_check_globs_are_case_sensitive_and_whole() -> None:
    record = KeyRecord("k", "a", models=("gpt-4*", "o1", "org/[ab]-?"))
    good = ("gpt-4", "gpt-4o-mini", "o1", "org/a-1")
    assert [refused(record, model=name) for name in good] == [""] * len(good)
    for name in ("GPT-4o", "o1-mini", "xgpt-4", "o1\n", "", "org/c-1"):
        assert refused(record, model=name) == "model_not_allowed"
    assert refused(record, model=None) == ""


def test_check_takes_mapped_addresses_for_ipv4() -> None:
    record = KeyRecord("k", "a", networks=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")))
    for peer in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", "10.1.2.3"):
        assert refused(record, peer=peer) == ""
    for peer in ("11.1.2.3", "", "unix", "::1", "gpt-4o"):
        assert refused(record, peer=peer) == "ip_not_allowed"


def test_check_remembers_boundedly() -> None:
    record = KeyRecord("k", "a", models=("m*",))
    for n in range(3 * MAX_PASSED):
        assert refused(record, model=f"m{n}") == ""
    assert len(record._passed) <= MAX_PASSED
    assert refused(record, model="m" + "x" * 100_000) == ""
    assert all(len(str(passed)) < 1000 for passed in record._passed)


def test_check_survives_hostile_globs_and_names() -> None:
    record = KeyRecord("k", "a", models=("*a" * 12 + "b",))
    begun = time.process_time()
    assert refused(record, model="a" * 5000) == "model_not_allowed"
    assert time.process_time() - begun < 1.0


# --- the address


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("9.9.9.9", b"1.1.1.1", "9.9.9.9"),
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", b"1.1.1.1", "1.1.1.1"),
        ("127.0.0.1", b"6.6.6.6, 1.1.1.1", "1.1.1.1"),
        ("127.0.0.1", b"6.6.6.6, 1.1.1.1, 10.0.0.7", "1.1.1.1"),
        ("127.0.0.1", b"10.0.0.6,10.0.0.7", "10.0.0.6"),
        ("127.0.0.1", b"1.1.1.1:4711", "1.1.1.1"),
        ("127.0.0.1", b"[2001:db8::1]:4711", "2001:db8::1"),
        ("127.0.0.1", b"2001:DB8::1", "2001:db8::1"),
        ("::ffff:127.0.0.1", b"1.1.1.1", "1.1.1.1"),
        ("127.0.0.1", b"", "127.0.0.1"),
        ("127.0.0.1", b"1.1.1.1, unknown", "127.0.0.1"),
        ("127.0.0.1", b"evil\x1b[31m, 10.0.0.7", "10.0.0.7"),
        ("127.0.0.1", b"\xff\xfe", "127.0.0.1"),
        ("", b"1.1.1.1", ""),
    ],
)
def test_peer_address_believes_configured_proxies_alone(peer: str, forwarded: bytes | None, expected: str) -> None:
    proxies = Proxies(["127.0.0.0/8", "10.0.0.0/8"])
    for _ in range(2):
        assert peer_address(peer, forwarded, proxies) == expected


def test_peer_address_on_a_unix_socket_needs_the_word() -> None:
    assert peer_address("", b"1.1.1.1", Proxies(["unix:"])) == "1.1.1.1"
    assert peer_address("9.9.9.9", b"1.1.1.1", Proxies(["unix:"])) == "9.9.9.9"
    assert peer_address("9.9.9.9", b"1.1.1.1", Proxies()) == "9.9.9.9"


def test_peer_address_keeps_answers_boundedly_and_walks_few_hops() -> None:
    proxies = Proxies(["127.0.0.1"])
    assert peer_address("127.0.0.1", b"127.0.0.1," * 5000 + b"127.0.0.1", proxies) == "127.0.0.1"
    for n in range(10_000):
        peer_address("127.0.0.1", b"1.1.%d.%d" % (n // 250, n % 250), proxies)
    assert len(proxies._answers) <= 4096


def test_proxies_refuse_what_is_no_network() -> None:
    with pytest.raises(ValueError, match="does not appear"):
        Proxies(["localhost"])
