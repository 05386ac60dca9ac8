"""Errors: table, bodies, headers, stream frames, masking."""

from __future__ import annotations

import json
import time

import pytest

from nbgate.errors import ERRORS, GateError, Mask, error_body, error_headers, mask_text, masked, stream_error

CONTRACT = {
    "invalid_json": (400, "invalid_json", "invalid_request_error", "invalid_request_error"),
    "missing_model": (400, "missing_model", "invalid_request_error", "invalid_request_error"),
    "invalid_api_key": (401, "invalid_api_key", "authentication_error", "authentication_error"),
    "insufficient_quota": (402, "insufficient_quota", "insufficient_quota", "billing_error"),
    "account_disabled": (403, "account_disabled", "permission_error", "permission_error"),
    "ip_not_allowed": (403, "ip_not_allowed", "permission_error", "permission_error"),
    "model_not_allowed": (403, "model_not_allowed", "permission_error", "permission_error"),
    "model_not_found": (404, "model_not_found", "invalid_request_error", "not_found_error"),
    "not_found": (404, "not_found", "invalid_request_error", "not_found_error"),
    "method_not_allowed": (405, "method_not_allowed", "invalid_request_error", "invalid_request_error"),
    "request_timeout": (408, "request_timeout", "invalid_request_error", "invalid_request_error"),
    "request_too_large": (413, "request_too_large", "invalid_request_error", "request_too_large"),
    "rate_limit_exceeded": (429, "rate_limit_exceeded", "rate_limit_error", "rate_limit_error"),
    "internal_server_error": (500, "internal_server_error", "api_error", "api_error"),
    "upstream_error": (502, "upstream_error", "api_error", "api_error"),
    "upstream_timeout": (504, "upstream_timeout", "api_error", "timeout_error"),
    "service_unavailable": (503, "service_unavailable", "api_error", "overloaded_error"),
}
MASK = Mask(
    secrets=("sk-ant-api03-ABCDEFGH12345678",),
    hosts=("api.openai.com", "gate-7.example-cloud"),
    model="gpt-4o-2024-11-20",
    public="gpt-4o",
)


@pytest.mark.parametrize("kind", CONTRACT)
def test_table_says_what_the_contract_says(kind: str) -> None:
    row = ERRORS[kind]
    assert (row.status, row.code, row.type, row.claude_type) == CONTRACT[kind]


@pytest.mark.parametrize("kind", ERRORS)
def test_body_has_each_family_s_shape(kind: str) -> None:
    err = GateError(kind, "why", param="model")
    row = ERRORS[kind]
    openai = json.loads(error_body(err, "openai", ""))
    assert openai == {"error": {"message": "why", "type": row.type, "param": "model", "code": row.code}}
    claude = json.loads(error_body(err, "claude", "req_1"))
    assert claude["type"] == "error"
    assert claude["request_id"] == "req_1"
    assert claude["error"]["type"] == row.claude_type
    assert claude["error"]["code"] == row.code
    gemini = json.loads(error_body(err, "gemini", ""))
    assert gemini == {"error": {"code": row.status, "message": "why", "status": row.gemini_status}}


def test_param_is_null_when_none_is_at_fault() -> None:
    assert json.loads(error_body(GateError("not_found"), "openai", ""))["error"]["param"] is None


def test_rate_message_is_the_documented_one_with_the_true_number() -> None:
    err = GateError("rate_limit_exceeded", retry_after_s=6.2)
    assert err.message == "Rate limit exceeded. Please retry after 7 seconds. (rate_limit_exceeded)"
    assert "rate_limit" in json.loads(error_body(err, "openai", ""))["error"]["message"]


def test_headers_of_a_wait_are_rounded_up() -> None:
    assert error_headers(GateError("rate_limit_exceeded", retry_after_s=0.2341)) == [
        (b"retry-after", b"1"),
        (b"retry-after-ms", b"235"),
    ]


@pytest.mark.parametrize("wait", [None, -1.0, float("nan")])
def test_headers_of_503_always_name_a_wait(wait: float | None) -> None:
    assert (b"retry-after", b"1") in error_headers(GateError("service_unavailable", retry_after_s=wait))


def test_headers_bound_an_endless_wait() -> None:
    headers = dict(error_headers(GateError("rate_limit_exceeded", retry_after_s=float("inf"))))
    assert int(headers[b"retry-after"]) <= 31 * 86_400


@pytest.mark.parametrize(("wait", "told"), [(60.0, False), (60.5, True)])
def test_should_retry_is_false_on_limits_longer_than_a_minute(wait: float, told: bool) -> None:
    headers = error_headers(GateError("rate_limit_exceeded", retry_after_s=wait))
    assert ((b"x-should-retry", b"false") in headers) is told


def test_should_retry_is_false_on_402() -> None:
    assert error_headers(GateError("insufficient_quota")) == [(b"x-should-retry", b"false")]


def test_extra_headers_come_last() -> None:
    assert error_headers(GateError("method_not_allowed", headers=[(b"allow", b"GET")])) == [(b"allow", b"GET")]


def test_own_fault_quotes_the_request_id() -> None:
    assert "req_9" in json.loads(error_body(GateError("internal_server_error"), "openai", "req_9"))["error"]["message"]


@pytest.mark.parametrize("family", ["openai", "claude", "gemini"])
def test_body_survives_lone_surrogates_and_quotes(family: str) -> None:
    err = GateError("not_found", 'a"b\n\ud800\x00', param="\udfff")
    json.loads(error_body(err, family, "r\ud800"))


@pytest.mark.parametrize("dialect", ["chat", "completions"])
def test_stream_error_of_chat_is_one_frame_without_done(dialect: str) -> None:
    frame = stream_error(GateError("upstream_error"), dialect, "r")
    assert frame.startswith(b'data: {"error":{')
    assert frame.endswith(b"}}\n\n")
    assert frame.count(b"\n") == 2
    assert b"[DONE]" not in frame


def test_stream_error_of_messages_is_an_error_event() -> None:
    head, _, data = stream_error(GateError("service_unavailable"), "messages", "r").partition(b"\ndata: ")
    assert head == b"event: error"
    assert json.loads(data)["error"]["type"] == "overloaded_error"
    assert json.loads(data)["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize("number", [None, 7])
def test_stream_error_of_responses_is_flat(number: int | None) -> None:
    data = json.loads(stream_error(GateError("upstream_timeout"), "responses", "r", number).partition(b"data: ")[2])
    assert data["type"] == "error"
    assert data["code"] == "upstream_timeout"
    assert data.get("sequence_number") == number


def test_stream_error_is_empty_where_no_stream_exists() -> None:
    assert stream_error(GateError("upstream_error"), "embeddings", "r") == b""


def test_mask_hides_keys_hosts_urls_ids_and_the_model() -> None:
    text = (
        "Incorrect API key provided: sk-abc*****************wxyz. See https://platform.openai.com/account/api-keys. "
        "Key sk-ant-api03-ABCDEFGH12345678, sk-…abcd, sk-ant…5678; organization org-abcDEF123 project proj_abc1 "
        "user-abc123 at gate-7.example-cloud:443, foo.eastus.openai.azure.com and 10.0.0.1:80, Bearer abc.def; "
        "model `gpt-4o-2024-11-20` and models/gpt-4o-2024-11-20."
    )
    shown = mask_text(text, MASK)
    for secret in (
        "wxyz", "openai", "ABCDEFGH", "abcd", "5678", "abcDEF123", "proj_abc1", "user-abc123", "example-cloud", "azure",
        "10.0.0.1", "abc.def", "2024-11-20", "https",
    ):  # fmt: skip
        assert secret not in shown
    assert "model `gpt-4o` and models/gpt-4o." in shown


@pytest.mark.parametrize("text", [
    "Wait... the value of max_tokens is too large: 99999. **bold** api-key api_base messages.0.content user-supplied",
    "The model gpt-4o-2024-11-20-mini is another one.",
])  # fmt: skip
def test_mask_leaves_plain_words(text: str) -> None:
    assert mask_text(text, MASK) == text


@pytest.mark.parametrize("unit", ["a-", "sk-", "a.", "*", "…a", "http://", "org-", "1.", "sk-..", "Bearer ", "a…b"])
def test_mask_costs_are_bounded(unit: str) -> None:
    text = unit * 500_000
    mask_text("warm", MASK)
    begun = time.thread_time()
    mask_text(text, MASK)
    assert time.thread_time() - begun < 0.05


FOREIGN = [
    b'{"error":{"message":"too long for gpt-4o-2024-11-20","type":"invalid_request_error","param":"messages",'
    b'"code":"context_length_exceeded"}}',
    b'{"type":"error","error":{"type":"invalid_request_error","message":"bad for gpt-4o-2024-11-20"}}',
    b'[{"error":{"code":400,"status":"INVALID_ARGUMENT","message":"see https://x.y/z"}}]',
    b'{"error":"flat gpt-4o-2024-11-20"}',
    b'{"detail":"fast gpt-4o-2024-11-20"}',
    b'{"error":{"message":{"nested":1},"type":5,"param":{},"code":[]}}',
    b"<html>https://secret.host/</html>",
    b"",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"error":{"message":"' + b"x" * 100_000 + b'"}}',
    b'{"error":{"message":"\\ud800","code":"sk-ant-api03-ABCDEFGH12345678"}}',
]


@pytest.mark.parametrize("body", FOREIGN)
@pytest.mark.parametrize("family", ["openai", "claude", "gemini"])
def test_masked_is_complete_in_each_family(body: bytes, family: str) -> None:
    out = masked(body, 400, family, MASK, "req_1")
    error = json.loads(out)["error"]
    assert error["message"]
    assert len(out) < 20_000
    if family == "openai":
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str)
    if family == "claude":
        assert json.loads(out)["request_id"] == "req_1"
        assert error["code"]
    for secret in (b"2024-11-20", b"secret.host", b"x.y", b"ABCDEFGH"):
        assert secret not in out


def test_masked_keeps_what_the_client_can_use() -> None:
    error = json.loads(masked(FOREIGN[0], 400, "openai", MASK, ""))["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert error["message"] == "too long for gpt-4o"


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (413, "request_too_large"), (422, "invalid_request_error")]
)
def test_masked_completes_the_code_by_status(status: int, code: str) -> None:
    assert json.loads(masked(b"{}", status, "openai", MASK, ""))["error"]["code"] == code
