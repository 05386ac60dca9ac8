"""Keys under attack: none gets in, none gets out (incidents A1 A2 A3 A5 A6 A9 B5 C5 of other gateways)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from harness import Gateway, ScriptedUpstream, channel
from hostile import ADMIN, KEY, OTHER, UNKNOWN, UPSTREAM, House, bearer, calls, escaped, paths

from nbgate.routes import ROUTES

BODY = {"model": "gpt-4o", "messages": [], "input": "x", "prompt": "x", "max_tokens": 5}
# The written list: what is served to everybody (the contract's table of endpoints). Metrics need the admin's key.
OPEN = {"/", "/healthz", "/readyz", "/health/liveliness", "/health/readiness"}

HOSTILE: dict[str, bytes] = {
    "sql": b"' OR 1=1--",
    "sql-union": b"x' UNION SELECT key FROM keys; DROP TABLE keys;--",
    "64k": b"A" * 65_536,
    "600-bytes": b"sk-" + b"x" * 600,
    "nul": b"\x00",
    "nul-behind": KEY.encode() + b"\x00",
    "not-utf8": b"\xff\xfe\x80\xc0",
    "unicode": "sk-ключ-密钥-🔑".encode(),
    "escape": b"\x1b[31mred\x07",
    "format": b"%s%n{0}{key}${jndi:ldap://x}",
    "path": b"../../../etc/passwd",
    "lookup": b"*",
    "unknown": UNKNOWN.encode(),
    "prefix": KEY[:-1].encode(),
    "longer": KEY.encode() + b"x",
    "other-case": KEY.swapcase().encode(),
    "two": f"{UNKNOWN} {KEY}".encode(),
    "list": f"{UNKNOWN},{KEY}".encode(),
    "digest": hashlib.sha256(KEY.encode()).hexdigest().encode(),
    "display": f"{KEY[:6]}...{KEY[-4:]}".encode(),
}


# A1, A5: nobody gets in


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_key_opens_no_route_and_breaks_none(house: House, name: str) -> None:
    key = HOSTILE[name]
    places: list[tuple[bytes, ...]] = [(bearer(key),), (b"x-api-key: " + key,), (b"x-goog-api-key: " + key,)]
    asked = len(house.upstream.asked)
    for method, path in calls(auth=True):
        body = BODY if method == "POST" else None
        found = [house.ask(method, path, *headers, body=body) for headers in places]
        for query in ("api_key", "key"):
            found.append(house.ask(method, f"{path}?{query}=".encode() + escaped(key), body=body))
        for reply in found:
            assert reply.status in (401, 400, 414, 431), (method, path, reply)
            if reply.status == 401 and method != "HEAD":
                assert reply.code == ("UNAUTHENTICATED" if "/v1beta/" in path else "invalid_api_key")
    assert len(house.upstream.asked) == asked


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_key_breaks_no_open_route(house: House, name: str) -> None:
    for method, path in calls(auth=False):
        assert house.ask(method, path, bearer(HOSTILE[name])).status < 500


def test_every_route_needs_a_key_but_for_the_written_list(house: House) -> None:
    served = {path: house.ask(method, path, body=BODY if method == "POST" else None) for method, path in calls()}
    without = {path for path, reply in served.items() if reply.status != 401}
    assert {path.removeprefix("/v1") or "/" for path in without} == OPEN


def test_no_user_reads_what_is_the_admins(house: House) -> None:
    assert house.ask("GET", "/metrics", bearer(KEY)).status == 403
    assert house.ask("GET", "/metrics", bearer(ADMIN)).status == 200
    assert house.ask("GET", "/v1/metrics", bearer(KEY)).status == 404
    assert house.ask("GET", "//metrics").status == 404


# A2: no key is taken for another


def twins() -> tuple[str, str]:
    """Find two keys whose digests begin with the same 20 bits."""
    seen: dict[str, str] = {}
    number = 0
    while True:
        key = f"sk-twin-{number:040d}"
        mark = hashlib.sha256(key.encode()).hexdigest()[:5]
        if mark in seen:
            return seen[mark], key
        seen[mark] = key
        number += 1


def test_keys_that_look_alike_never_share_an_identity(
    scripted: Callable[..., ScriptedUpstream], gateway: Callable[..., Gateway]
) -> None:
    first, second = twins()
    base = "sk-0123456789012345678901234567890123456789012345678"
    known = [base, base + "x", "x" + base, base[:-1], base.upper(), f"{base[:6]}-else-{base[-4:]}", first]
    unknown = [second, base + "y", base[:-2], base[3:], base.replace("5", "６"), base.upper() + "x", "x" + base.upper()]
    up = scripted(lambda asked, peer: peer.json(200, b'{"id":"a"}'))
    text = '[logging]\naccess = ""\n' + channel("up", up.url)
    text += "".join(f'[[keys]]\nkey = "{key}"\naccount = "a{n}"\nrpm = {n + 10}\n' for n, key in enumerate(known))
    gate = gateway(text)
    with httpx.Client(trust_env=False, base_url=gate.url) as client:
        for _ in range(2):  # the second time everything is in whatever cache there is
            for number, key in enumerate(known):
                answer = client.post("/v1/embeddings", json=BODY, headers={"x-api-key": key.encode()})
                assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (200, str(number + 10))
            for key in unknown:
                answer = client.post("/v1/embeddings", json=BODY, headers={"x-api-key": key.encode()})
                assert answer.status_code == 401, key


# A3: the Host decides nothing


BAD_HOSTS = [b"x/healthz", b"x?", b"x#", b"u@x", b"x,y", b"x y", b"x:8o", b"x:99999999", b"[::1", b"a\tb", b"\xff"]


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_a_host_that_is_none_is_refused(house: House, host: bytes) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nhost: %b\r\n%b\r\nconnection: close\r\n\r\n" % (host, bearer(KEY))
    assert house.raw(request).status == 400


@pytest.mark.parametrize("lines", [b"", b"host: a\r\nhost: a\r\n", b"host: a\r\nHost: b\r\n"])
def test_a_request_has_exactly_one_host(house: House, lines: bytes) -> None:
    assert house.raw(b"GET /healthz HTTP/1.1\r\n%bconnection: close\r\n\r\n" % lines).status == 400


@pytest.mark.parametrize("host", [b"healthz", b"evil.example", b"127.0.0.1:1", b"[::1]:80", b"api.openai.com"])
def test_a_host_never_changes_the_route(house: House, host: bytes) -> None:
    def ask(target: bytes, more: bytes = b"") -> int:
        return house.raw(b"GET %b HTTP/1.1\r\nhost: %b\r\n%bconnection: close\r\n\r\n" % (target, host, more)).status

    assert ask(b"/v1/models") == 401
    assert ask(b"/healthz") == 200
    assert ask(b"/nothing") == 404
    assert ask(b"/v1/models", bearer(KEY) + b"\r\n") == 200
    for name in (b"x-original-url", b"x-rewrite-url", b"x-forwarded-path", b"x-forwarded-prefix"):
        assert ask(b"/v1/models", name + b": /healthz\r\n") == 401
    assert ask(b"http://%b/v1/models" % host) in (400, 401, 404)


# A6: the client names no upstream


def test_a_client_cannot_name_the_upstream(house: House, scripted: Callable[..., ScriptedUpstream]) -> None:
    trap = scripted(lambda asked, peer: peer.json(200, b"{}"))
    there = trap.url.encode()
    names = ["api_base", "base_url", "api_url", "endpoint", "api_key", "organization", "custom_llm_provider", "proxy"]
    fields: dict[str, Any] = dict.fromkeys(names, trap.url)
    fields["extra_body"] = fields["litellm_params"] = fields["metadata"] = dict(fields)
    headers = [
        name + b": " + there
        for name in (
            b"x-api-base",
            b"x-base-url",
            b"x-upstream-host",
            b"x-openai-host",
            b"x-forwarded-host",
            b"forwarded",
        )
    ]
    headers += [b"x-portkey-custom-host: " + there, b"x-portkey-provider: openai", b"helicone-target-url: " + there]
    before = len(house.upstream.asked)
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"):
        query = b"?api_base=%b&base_url=%b" % (there, there)
        assert house.ask("POST", path.encode() + query, bearer(KEY), *headers, body={**BODY, **fields}).status == 200
    seen = house.upstream.asked[before:]
    assert len(seen) == 4
    for asked in seen:
        assert asked.headers["host"] == house.upstream.url.removeprefix("http://")
        assert trap.url not in re.sub("^.*\n", "", asked.head.decode())
    assert not trap.connections


# A9: no key gets out


def test_the_callers_key_never_reaches_the_upstream(house: House) -> None:
    before = len(house.upstream.asked)
    given: list[tuple[str, tuple[bytes, ...]]] = [
        ("", (bearer(KEY),)),
        ("", (b"X-API-Key: " + KEY.encode(), b"cookie: key=" + KEY.encode())),
        ("", (bearer(KEY), b"x-goog-api-key: " + OTHER.encode(), b"proxy-authorization: " + bearer(OTHER))),
        (f"?api_key={KEY}", ()),
        (f"?x=1&API_KEY={KEY}&key={OTHER}&y=2", ()),
        (f"?api%5Fkey={KEY}", ()),
    ]
    for query, headers in given:
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
            assert house.ask("POST", path + query, *headers, body=BODY).status == 200
    for asked in house.upstream.asked[before:]:
        text = asked.head.decode() + asked.body.decode()
        assert KEY not in text
        assert OTHER not in text
        assert UPSTREAM in text


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 429, 500, 503, 529])
def test_an_upstream_that_repeats_our_key_is_masked(house: House, status: int) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"):
        # A name of its own each time: what one refusal cooled down must not hide the next.
        reply = house.ask("POST", path, bearer(KEY), body={**BODY, "model": f"fail-{status}"})
        assert reply.status >= 400
        assert UPSTREAM[:12].encode() not in reply.head + reply.body
        assert b"set-cookie" not in reply.head.lower()


@pytest.mark.parametrize("name", ["api_key", "API_KEY", "api%5fkey", "key", "token", "x-api-key", "access_token"])
def test_keys_in_queries_are_cut_from_the_log(house: House, name: str) -> None:
    for path in ("/v1/models", "/v1/nothing", "/healthz", "/v1/chat/completions"):
        for form in ("?{}={}", "?a=b&{}={}&c=d", "?a=b;{}={}", "?a=b?{}={}"):
            house.ask("GET", path + form.format(name, UNKNOWN))
    # These the server refuses before the app sees them.
    target = f"/v1/models?{name}={UNKNOWN}".encode()
    assert house.raw(b"GET %b HTTP/1.1\r\nconnection: close\r\n\r\n" % target).status == 400
    assert house.raw(b"GET %b HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n" % target).status == 400
    assert house.raw(b"GET %b HTTP/3.7\r\nhost: a\r\n\r\n" % target).status >= 400
    lines = house.access()
    assert not [line for line in lines if UNKNOWN[6:16] in line]
    assert [line for line in lines if "=***" in line]


# B5: other people's objects


def test_no_id_opens_what_another_account_made(house: House) -> None:
    assert house.ask("POST", "/v1/responses", bearer(KEY), body=BODY).status == 200  # makes resp_mine
    asked = len(house.upstream.asked)
    rows = [route for route in ROUTES if "{id}" in route.path]
    assert rows
    for route in rows:
        for stated in ("resp_mine", "resp_none", "chatcmpl-1"):
            for path in paths(route, stated):
                for method in route.methods:
                    reply = house.ask(method, path, bearer(OTHER))
                    assert (reply.status, reply.code) == (404, "not_found"), (method, path)
    follow = {**BODY, "previous_response_id": "resp_mine"}
    assert house.ask("POST", "/v1/responses", bearer(OTHER), body=follow).status == 404
    assert len(house.upstream.asked) == asked
    assert house.ask("GET", "/v1/responses/resp_mine", bearer(KEY)).status == 200


def test_an_answer_that_repeats_an_id_does_not_give_it_away(
    scripted: Callable[..., ScriptedUpstream], gateway: Callable[..., Gateway]
) -> None:
    # An upstream repeats what a caller wrote into the metadata; it may stand before the answer's own id.
    def answer(asked: Any, peer: Any) -> None:
        metadata = json.loads(asked.body).get("metadata", {}) if asked.body else {}
        made = "resp_own" if metadata else "resp_victim"
        peer.json(200, json.dumps({"metadata": metadata, "id": made}).encode())

    up = scripted(answer)
    keys = "".join(f'[[keys]]\nkey = "{key}"\naccount = "{key[-3:]}"\n' for key in (KEY, OTHER))
    gate = gateway('[logging]\naccess = ""\n' + channel("up", up.url) + keys)
    with httpx.Client(trust_env=False, base_url=gate.url) as client:
        mine, theirs = ({"x-api-key": key} for key in (KEY, OTHER))
        assert client.post("/v1/responses", json=BODY, headers=mine).status_code == 200
        fields = {**BODY, "metadata": {"id": "resp_victim"}}
        assert client.post("/v1/responses", json=fields, headers=theirs).status_code == 200
        assert client.get("/v1/responses/resp_victim", headers=theirs).status_code == 404
        assert client.get("/v1/responses/resp_victim", headers=mine).status_code == 200


# C5: nothing that a client writes ends a line or begins a header

MARKS = ["\x1b[31m", "\r\nx-injected: yes\r\n", "\n{}", "\u2028", "\u202e", "\x00", "\x7f", "\x9b31m"]


@pytest.mark.parametrize("mark", MARKS, ids=[repr(mark) for mark in MARKS])
def test_what_a_client_writes_stays_within_one_line(house: House, mark: str) -> None:
    coded, plain = escaped(mark.encode()), mark.encode()
    before = len(house.replies)
    asks: list[tuple[str, bytes, tuple[bytes, ...], Any]] = [
        ("GET", b"/v1/models/a" + coded, (bearer(KEY),), None),
        ("GET", b"/v1/nothing" + coded, (bearer(KEY),), None),
        ("GET", b"/v1/models?q=" + coded, (bearer(KEY),), None),
        ("GET", b"/v1/models?api_key=" + coded, (), None),
        ("GET", b"/v1/responses/resp_a" + coded, (bearer(KEY),), None),
        ("POST", b"/v1/chat/completions", (bearer(KEY),), {**BODY, "model": f"gpt{mark}"}),
        ("POST", b"/v1/messages", (bearer(KEY),), {**BODY, "model": f"gpt{mark}"}),
        ("POST", b"/v1/responses", (bearer(KEY),), {**BODY, "previous_response_id": f"resp_{mark}"}),
        ("GET", b"/v1/models", (bearer(KEY), b"x-request-id: id" + coded), None),
        ("GET", b"/v1/models", (bearer(KEY), b"user-agent: ua" + coded), None),
        ("GET", b"/v1/models", (bearer(KEY + coded.decode()),), None),
        ("GET", b"/v1/models", (bearer(KEY), b"x-request-id: id" + plain + b"id"), None),
        ("GET", b"/v1/models", (bearer(KEY), b"user-agent: ua" + plain + b"ua"), None),
        ("GET", b"/v1/models", (bearer(UNKNOWN.encode() + plain + b"x"),), None),
        ("GET", b"/v1/models/a" + plain.replace(b"\r\n", b"\r").replace(b"\n", b"\r"), (bearer(KEY),), None),
    ]
    for method, target, headers, body in asks:
        reply = house.ask(method, target, *headers, body=body)
        assert reply.status < 500, (target, headers, body, reply)
        assert re.search(rb"\r\nx-request-id: [A-Za-z0-9._:=/+@~-]{1,128}(\r\n|$)", reply.head), reply
        assert b"\nx-injected" not in reply.head
        assert re.fullmatch(rb"[\x20-\x7e\r\n]+", reply.head), reply.head
        json.loads(reply.body)
    lines = house.access()
    assert len(lines) == len(house.replies)
    for line in lines[before:]:
        assert line.isprintable(), line
        assert isinstance(json.loads(line), dict)
        assert all(text.isprintable() for text in json.loads(line).values() if isinstance(text, str)), line
    assert all(entry.count("\n") == 0 and entry.isprintable() for entry in house.operator), house.operator
