"""Routes: the table, forgiving base URLs, refusals."""

from __future__ import annotations

import pytest

from nbgate.errors import GateError
from nbgate.routes import ROUTES, find, methods, nearest

SERVED = [
    ("/chat/completions", "POST", "chat.create"),
    ("/chat/completions", "GET", "chat.list"),
    ("/chat/completions/chatcmpl-1", "GET", "chat.get"),
    ("/chat/completions/chatcmpl-1", "POST", "chat.update"),
    ("/chat/completions/chatcmpl-1", "DELETE", "chat.delete"),
    ("/chat/completions/chatcmpl-1/messages", "GET", "chat.messages"),
    ("/completions", "POST", "completions.create"),
    ("/embeddings", "POST", "embeddings.create"),
    ("/moderations", "POST", "moderations.create"),
    ("/images/generations", "POST", "images.generate"),
    ("/responses", "POST", "responses.create"),
    ("/responses/compact", "POST", "responses.compact"),
    ("/responses/input_tokens", "POST", "responses.input_tokens"),
    ("/responses/resp_1", "GET", "responses.get"),
    ("/responses/resp_1", "DELETE", "responses.delete"),
    ("/responses/resp_1/cancel", "POST", "responses.cancel"),
    ("/responses/resp_1/input_items", "GET", "responses.input_items"),
    ("/messages", "POST", "messages.create"),
    ("/messages/count_tokens", "POST", "messages.count_tokens"),
    ("/models", "GET", "models.list"),
    ("/models/gpt-4o", "GET", "models.get"),
    ("/models/meta/llama-3", "GET", "models.get"),
    ("/healthz", "GET", "health.live"),
    ("/readyz", "GET", "health.ready"),
    ("/health/liveliness", "GET", "health.live"),
    ("/health/readiness", "GET", "health.ready"),
]
FORMS = ["{}", "/v1{}", "/v1/v1{}", "//v1/{}", "/v1{}/", "/v1beta/openai{}", "/v1//{}//"]


def refused(path: bytes, method: str = "GET") -> GateError:
    with pytest.raises(GateError) as caught:
        find(path, method)
    return caught.value


def test_every_row_names_its_billing() -> None:
    assert {route.billed for route in ROUTES} <= {"usage", "fixed", "job", "free"}
    assert all(route.billed for route in ROUTES)


def test_every_row_is_reachable() -> None:
    reached = {find(path.encode(), method).route for path, method, _ in SERVED}
    own = (b"/", b"/metrics", b"/v1beta/models", b"/v1beta/models/gemini-2.5-pro")
    assert reached | {find(path, "GET").route for path in own} == set(ROUTES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("path", "method", "operation"), SERVED)
def test_path_resolves_in_every_forgiven_form(path: str, method: str, operation: str, form: str) -> None:
    assert find(form.format(path).encode(), method).route.operation == operation


def test_only_health_home_and_metrics_need_no_key() -> None:
    assert {route.path for route in ROUTES if not route.auth} == {
        "/", "/healthz", "/readyz", "/health/liveliness", "/health/readiness", "/metrics",
    }  # fmt: skip


def test_home_answers_head() -> None:
    assert find(b"/", "HEAD").route.operation == "home"


@pytest.mark.parametrize("path", [b"/v1/metrics", b"//metrics", b"/metrics/", b"/%6detrics", b"/v1beta/openai/metrics"])
def test_metrics_has_no_forgiving_form(path: bytes) -> None:
    assert refused(path).kind == "not_found"


def test_model_id_may_hold_a_slash_escaped_or_not() -> None:
    assert find(b"/v1/models/meta%2Fllama%203:x", "GET").params == {"id": "meta/llama 3:x"}
    assert find(b"/v1/models/meta/llama", "GET").params == {"id": "meta/llama"}


def test_upstream_path_is_made_from_the_row() -> None:
    assert find(b"/v1//responses/resp_1:=~/cancel/", "POST").upstream_path == b"/responses/resp_1:=~/cancel"


@pytest.mark.parametrize("part", [
    b"..", b"%2e%2e", b"a%2fb", b"a%2F..%2fb", b".", b"a%00", b"a%0d%0ab", b"%", b"%zz", b"%1", b"\xff", b"a%5cb",
    b"a\\b", b"a%3fb", b"a?b", b"a%23b", b"a b", b"a%20b", b"-a", b"a" * 600, b"%25%32%65", b"a;b", b"%e2%80%ae",
])  # fmt: skip
def test_unsafe_id_is_refused(part: bytes) -> None:
    assert refused(b"/v1/responses/" + part).status in (400, 404)
    assert refused(b"/v1/responses/" + part + b"/cancel", "POST").status in (400, 404)


@pytest.mark.parametrize("path", [b"/v1/models/../chat", b"/v1/models/a%2f..%2fb", b"/v1/models/%2e"])
def test_dots_are_refused_in_model_ids(path: bytes) -> None:
    assert refused(path).kind == "not_found"


@pytest.mark.parametrize("path", [b"", b"*", b"http://x/v1/models", b"v1/models"])
def test_path_without_slash_is_malformed(path: bytes) -> None:
    assert refused(path).status == 400


def test_long_path_is_414() -> None:
    assert refused(b"/" + b"a" * 5_000).status == 414


def test_wrong_method_is_405_with_allow() -> None:
    err = refused(b"/v1/chat/completions", "PUT")
    assert err.status == 405
    assert err.headers == [(b"allow", b"POST, GET")]
    assert refused(b"/v1/v1/embeddings").headers == [(b"allow", b"POST")]
    assert refused(b"/v1/responses/resp_1", "PATCH").headers == [(b"allow", b"GET, DELETE")]


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/files", "/v1/rerank", "/v1/images/edits", "/api/v1/keys"])
def test_what_is_not_served_yet_is_404(path: str) -> None:
    assert refused(path.encode(), "POST").kind == "not_found"


@pytest.mark.parametrize(("wrong", "right"), [
    (b"/v1/chat/completion", "/v1/chat/completions"),
    (b"/v1/chatcompletions", "/v1/chat/completions"),
    (b"/chat", "/v1/chat/completions"),
    (b"/v1/embedding", "/v1/embeddings"),
    (b"/v1/response", "/v1/responses"),
    (b"/v1/message", "/v1/messages"),
    (b"/v1/model", "/v1/models"),
    (b"/v1/image/generation", "/v1/images/generations"),
    (b"/\xff\x00%", "/v1/chat/completions"),
])  # fmt: skip
def test_404_names_the_nearest_path(wrong: bytes, right: str) -> None:
    assert nearest(wrong) == right


def test_404_message_shows_no_control_characters() -> None:
    message = refused(b"/v1/\x1b[31m\r\nx-evil: 1").message
    assert message.isprintable()
    assert refused(b"/v1/nope").message.endswith(".")


@pytest.mark.parametrize(("path", "known"), [
    (b"/v1/chat/completions", ("POST", "GET")),
    (b"/v1//responses/resp_1", ("GET", "DELETE")),
    (b"/v1/models/", ("GET", "HEAD")),
    (b"/nope", ()),
    (b"/%", ()),
])  # fmt: skip
def test_methods_lists_what_a_path_takes(path: bytes, known: tuple[str, ...]) -> None:
    assert methods(path) == known
