"""Bodies: what is read, what is refused, what is forwarded is what was read."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgate.body import Fields, read
from nbgate.dialects import DIALECTS
from nbgate.errors import GateError

CHAT = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hi"}]}'


def refused(body: bytes, dialect: str = "chat") -> GateError:
    with pytest.raises(GateError) as caught:
        read(body, dialect)
    return caught.value


def sent(fields: Fields, model: bytes | None = None, ask_usage: bool = False) -> bytes:
    return b"".join(fields.forward(model, ask_usage))


def test_plain_body_is_read_and_goes_on_as_the_same_object() -> None:
    fields = read(CHAT, "chat")
    assert (fields.model, fields.stream, fields.n, fields.max_tokens, fields.suspect) == (
        "gpt-4o",
        False,
        1,
        None,
        False,
    )
    (only,) = fields.forward(None, False)
    assert only is CHAT
    (only,) = fields.forward(b"gpt-4o", True)
    assert only is CHAT


def test_acted_fields_are_read() -> None:
    body = json.dumps({
        "model": "m", "stream": True, "n": 3, "max_tokens": 10, "max_completion_tokens": 20, "user": "u",
        "prompt_cache_key": "k", "service_tier": "flex", "store": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    fields = read(body, "chat")
    assert (fields.stream, fields.n, fields.max_tokens, fields.asked_usage) == (True, 3, 20, True)
    assert (fields.user, fields.affinity, fields.service_tier, fields.store) == ("u", "k", "flex", True)


def test_messages_user_is_the_metadata_s() -> None:
    assert read(b'{"model":"m","max_tokens":5,"metadata":{"user_id":"abc"}}', "messages").user == "abc"


def test_responses_fields_are_read() -> None:
    fields = read(b'{"model":"m","previous_response_id":"resp_1","background":true,"max_output_tokens":7}', "responses")
    assert (fields.previous_response_id, fields.background, fields.max_tokens) == ("resp_1", True, 7)


@pytest.mark.parametrize("body", [
    b"", b" ", b"{", b"nope", b"[]", b"null", b"1", b'"x"', b'{"model":"m"}x', b'{"model":"m",}', b"\x00{}",
    b'\xef\xbb\xbf{"model":"m"}', b'{"model":"m","a":NaN}', b'{"model":"m","a":Infinity}', b'{"model":"m","a":"\xff"}',
    b'{"model":"m","a":["\xed\xa0\x80"]}', b'{"model":"m","a":"\xc0\x80"}', b'{"model":"m","\xff":1}',
    b'{"model":"m","a":"\\ud800"}', b'{"model":"m","a":"\\ud800 and more"}', b'{"model":"m","a":["\\udfff tail tail"]}',
    b'{"model":"m","a":01}', b'{"model":"m","a":+1}', b'{"model":"m","a":"\x01"}', b'{"model":"m" "a":1}', b"{'a':1}",
    b'{"model":"\xff"}', b'{"model":"m","a":' + b"[" * 300 + b"]" * 300 + b"}", b"[" * 100_000,
    b'{"a":' * 100_000, '{"model":"m"}'.encode("utf-16"),
])  # fmt: skip
def test_bad_json_is_400(body: bytes) -> None:
    err = refused(body)
    assert (err.kind, err.status, err.source) == ("invalid_json", 400, "client")
    assert len(err.message) < 300


@pytest.mark.parametrize("shape", ["array", "object", "mixed", "siblings", "messages", "strings"])
def test_depth_is_refused_beyond_200_only(shape: str) -> None:
    def body(depth: int) -> bytes:
        inner = depth - 1
        if shape == "array":
            value = "[" * inner + "]" * inner
        elif shape == "object":
            value = '{"a":' * (inner - 1) + "{}" + "}" * (inner - 1)
        elif shape == "mixed":
            value = '[{"a":' * (inner // 2) + ("[]" if inner % 2 else "1") + "}]" * (inner // 2)
        elif shape == "siblings":
            value = '["]}",{},[],' * (inner - 1) + "1" + "]" * (inner - 1)
        elif shape == "messages":
            value = '[{"a":"b"},' * (inner - 1) + "1" + ",{}]" * (inner - 1)
        else:
            value = '["]]]",' * inner + '"[[["' + "]" * inner
        return b'{"model":"m","messages":%s}' % value.encode()

    assert read(body(200), "chat").model == "m"
    assert refused(body(201)).kind == "invalid_json"


def test_many_brackets_are_no_depth() -> None:
    many = [{"role": "user", "content": "[[[{{{" * 50, "x": [[[{"a": [{}]}]]]}] * 300
    assert read(json.dumps({"model": "m", "messages": many}).encode(), "chat").model == "m"


def test_deep_body_costs_no_more_than_a_parse() -> None:
    body = b'{"model":"m","a":' + b"[" * 190 + b'["]}[{",{}],' * 100_000 + b"1" + b"]" * 190 + b"}"
    begun = time.thread_time()
    read(body, "chat")
    assert time.thread_time() - begun < 1.0


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model":""}', b'{"messages":[]}'])
def test_missing_model_names_the_parameter(body: bytes) -> None:
    err = refused(body)
    assert (err.kind, err.param) == ("missing_model", "model")


@pytest.mark.parametrize("dialect", ["moderations", "images", "responses"])
def test_model_may_be_left_to_the_router(dialect: str) -> None:
    fields = read(b'{"input":"x"}', dialect)
    assert fields.model == ""
    assert json.loads(sent(fields, b"omni")) == {"model": "omni", "input": "x"}
    assert json.loads(sent(read(b" { } ", dialect), b"omni")) == {"model": "omni"}


@pytest.mark.parametrize(("member", "kind"), [
    ('"model":1', "invalid_type"), ('"model":["m"]', "invalid_type"), ('"model":"a\\u0000b"', "invalid_value"),
    ('"model":"a\\r\\nb"', "invalid_value"), ('"model":"%s"' % ("m" * 300), "invalid_value"),
    ('"stream":1', "invalid_type"),
    ('"stream":"true"', "invalid_type"), ('"n":true', "invalid_type"), ('"n":1.0', "invalid_type"),
    ('"n":0', "invalid_value"), ('"n":129', "invalid_value"), ('"n":-1', "invalid_value"), ('"n":"1"', "invalid_type"),
    ('"max_tokens":1e29', "invalid_type"), ('"max_tokens":false', "invalid_type"),
    ('"max_tokens":-1', "invalid_value"),
    ('"max_tokens":99999999999', "invalid_value"), ('"max_tokens":99999999999999999999999', "invalid_value"),
    ('"max_completion_tokens":[]', "invalid_type"), ('"max_completion_tokens":"9"', "invalid_type"),
    ('"stream_options":[]', "invalid_type"), ('"stream_options":{"include_usage":1}', "invalid_type"),
])  # fmt: skip
def test_wrong_values_are_400(member: str, kind: str) -> None:
    body = f"{{{member}}}" if '"model"' in member else f'{{"model":"m",{member}}}'
    err = refused(body.encode())
    assert (err.kind, err.status) == (kind, 400)
    assert err.param


def test_null_is_as_good_as_absent() -> None:
    body = b'{"model":"m","stream":null,"n":null,"max_tokens":null,"stream_options":null}'
    fields = read(body, "chat")
    assert (fields.stream, fields.n, fields.max_tokens, fields.asked_usage) == (False, 1, None, False)


# edits


@pytest.mark.parametrize("body", [
    CHAT,
    b'{ "messages" : [ ] , "model" : "gpt-4o" }',
    b'\n{"x":"\\"model\\":\\"gpt-4o\\"","model":"gpt-4o","y":{"model":"gpt-4o"}}\n',
    json.dumps({"model": "gpt-4o", "messages": ["é" * 20_000]}, ensure_ascii=False).encode(),
])  # fmt: skip
def test_model_s_bytes_are_replaced_and_no_others(body: bytes) -> None:
    fields = read(body, "chat")
    assert not fields.suspect
    out = sent(fields, b'up"stream')
    want = json.loads(body)
    assert json.loads(out) == {**want, "model": 'up"stream'}
    assert len(out) == len(body) + len(b'up\\"stream') - len(b"gpt-4o")


def test_usage_is_asked_for_in_a_stream() -> None:
    fields = read(b'{"model":"m","stream":true}', "chat")
    assert sent(fields, None, True) == b'{"stream_options":{"include_usage":true},"model":"m","stream":true}'
    assert not fields.asked_usage
    both = sent(fields, b"up", True)
    assert both == b'{"stream_options":{"include_usage":true},"model":"up","stream":true}'


@pytest.mark.parametrize("value", ["null", "{}", '{"include_usage":false}', '{"include_usage":null,"x":[1]}'])
def test_client_s_stream_options_are_merged(value: str) -> None:
    body = f'{{"stream":true, "stream_options": {value} ,"model":"m"}}'
    out = json.loads(sent(read(body.encode(), "chat"), None, True))
    assert out["stream_options"] == {**(json.loads(value) or {}), "include_usage": True}
    assert out["model"] == "m"


def test_client_that_asked_is_left_alone() -> None:
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true,"include_obfuscation":false}}'
    fields = read(body, "chat")
    assert fields.asked_usage
    assert fields.forward(None, True)[0] is body


def test_usage_asked_for_twice_is_written_anew() -> None:
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":false,"include_usage":true}}'
    assert sent(read(body, "chat"), None, True).count(b"include_usage") == 1


@pytest.mark.parametrize("dialect", ["responses", "messages", "embeddings"])
def test_usage_is_not_asked_for_where_it_comes_anyway(dialect: str) -> None:
    body = b'{"model":"m","stream":true}'
    assert read(body, dialect).forward(None, True)[0] is body


def test_usage_is_not_asked_for_without_a_stream() -> None:
    assert read(CHAT, "chat").forward(None, True)[0] is CHAT


@pytest.mark.parametrize("key", ['"max_tokens":', '"max_tokens" : ', '\n  "max_tokens": '])
def test_documented_max_tokens_of_responses_is_renamed(key: str) -> None:
    body = f'{{"model":"gpt-4o","input":"max_tokens",{key}500}}'
    fields = read(body.encode(), "responses")
    assert fields.max_tokens == 500
    assert json.loads(sent(fields)) == {"model": "gpt-4o", "input": "max_tokens", "max_output_tokens": 500}
    assert json.loads(sent(fields, b"up"))["model"] == "up"


def test_max_output_tokens_is_not_named_twice() -> None:
    body = b'{"model":"m","max_tokens":5,"max_output_tokens":6}'
    assert read(body, "responses").forward(None, False)[0] is body


# suspects


@pytest.mark.parametrize("body", [
    b'{"model":"cheap","mod\\u0065l":"dear"}', b'{"model":"cheap","model":"dear"}', b'{"mod\\u0065l":"dear"}',
    b'{"model":"cheap","x":{"model":"cheap"},"model":"dear"}', b'{"\\u006dodel":"cheap","model":"dear"}',
])  # fmt: skip
def test_suspect_body_is_sent_as_it_was_understood(body: bytes) -> None:
    fields = read(body, "chat")
    assert fields.suspect
    assert fields.model == "dear"
    out = sent(fields)
    assert out.count(b'"dear"') == 1
    assert b'"model":"cheap"' not in out.replace(b'{"model":"cheap"}', b"")
    assert b"\\u" not in out
    assert sent(fields, b"up").count(b'"up"') == 1


@pytest.mark.parametrize("name", ["Model", "MODEL", "moDel", "\u017ftream", "Max_Tokens", "N", "\u017ftore"])
def test_name_in_another_case_is_refused(name: str) -> None:
    for text in (json.dumps({name: 1, "model": "m"}), json.dumps({"model": "m", name: 1}, ensure_ascii=False)):
        assert refused(text.encode()).kind == "ambiguous_parameter"


def test_name_in_another_case_is_fine_below_the_top() -> None:
    body = b'{"model":"m","tools":[{"Model":1,"model":2,"STREAM":3}],"Other":1}'
    assert read(body, "chat").forward(None, False)[0] is body


def test_words_of_ours_in_strings_and_values_are_no_suspects() -> None:
    body = (
        b'{"model":"model","user":"stream","messages":[{"role":"user","content":"\\"model\\":\\"x\\""}],"a\\"b\\n":1}'
    )
    fields = read(body, "chat")
    assert not fields.suspect
    assert fields.model == "model"


NAMES = st.sampled_from(
    [
        "model",
        "stream",
        "n",
        "max_tokens",
        "stream_options",
        "user",
        "messages",
        "x",
        "Model",
        "modél",
        'a"b',
        "",
        "a\\",
    ]
)
LEAVES = st.one_of(
    st.sampled_from(["m", "dear", '"model":"x"', "}{][", "\\", '\\"', "é", "\u2028", "model", ""]),
    st.integers(1, 100), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
SPACE = st.sampled_from(["", " ", "\n\t", "\r\n  "])


@st.composite
def strings(draw: st.DrawFn, text: str) -> str:
    out = json.dumps(text, ensure_ascii=draw(st.booleans()))
    if text and draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text) - 1))
        if ord(text[at]) < 0xD800:
            parts = (json.dumps(text[:at])[1:-1], f"\\u{ord(text[at]):04x}", json.dumps(text[at + 1 :])[1:-1])
            out = '"' + "".join(parts) + '"'
    return out


@st.composite
def texts(draw: st.DrawFn, depth: int = 3) -> str:
    kind = draw(st.integers(0, 3 if depth else 0))
    if kind <= 1:
        leaf = draw(LEAVES)
        return draw(strings(leaf)) if isinstance(leaf, str) else json.dumps(leaf)
    if kind == 2:
        return "[" + ",".join(draw(st.lists(texts(depth - 1), max_size=3))) + "]"
    return draw(objects(depth - 1))


@st.composite
def objects(draw: st.DrawFn, depth: int = 3) -> str:
    members = []
    for _ in range(draw(st.integers(0, 5))):
        name = draw(strings(draw(NAMES)))
        value = draw(texts(depth)) if depth else "1"
        members.append(f"{draw(SPACE)}{name}{draw(SPACE)}:{draw(SPACE)}{value}{draw(SPACE)}")
    return draw(SPACE) + "{" + ",".join(members) + draw(SPACE) + "}" + draw(SPACE)


def pairs(text: bytes) -> list[tuple[str, Any]]:
    """Read the top level as written, duplicates and all."""
    top: list[list[tuple[str, Any]]] = []

    def note(found: list[tuple[str, Any]]) -> dict[str, Any]:
        top.append(found)
        return dict(found)

    json.loads(text, object_pairs_hook=note)
    return top[-1]


@settings(max_examples=600, deadline=None)
@given(body=objects(), dialect=st.sampled_from(["chat", "responses", "messages"]), rename=st.booleans())
def test_every_parser_sees_upstream_what_was_read_here(body: str, dialect: str, rename: bool) -> None:
    try:
        fields = read(body.encode(), dialect)
    except GateError as err:
        assert err.status == 400
        return
    model = "up" if rename else (fields.model or None)
    out = sent(fields, b"up" if rename else None, ask_usage=True)
    seen = pairs(out)
    acted = DIALECTS[dialect].acted_fields
    for name in acted | {"max_output_tokens"}:
        folded = [value for key, value in seen if key.casefold() == name]
        exact = [value for key, value in seen if key == name]
        assert folded == exact
        assert len(exact) <= 1
    told = dict(seen)
    assert told.get("model") == model
    assert bool(told.get("stream")) is fields.stream
    assert (told.get("n") or 1 if "n" in acted else 1) == fields.n
    bounds = [told.get(k) for k in acted if k.startswith("max_")]
    assert max((b for b in bounds if b is not None), default=None) == fields.max_tokens
    if fields.stream and dialect == "chat":
        assert told["stream_options"]["include_usage"] is True
    if not fields.suspect and not rename and not fields.stream and dialect != "responses":
        assert out == body.encode()
    rest = {k: v for k, v in pairs(body.encode()) if k not in acted}
    assert {k: v for k, v in seen if k in rest} == rest


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_fields_or_a_400(body: bytes) -> None:
    for text in (body, b'{"model":"m","x":' + body + b"}"):
        try:
            read(text, "chat")
        except GateError as err:
            assert err.status == 400
