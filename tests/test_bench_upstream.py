"""The fake upstream answers well, breaks as told, and tells the truth."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


procs = load("procs")
answers = load("answers")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with procs.Procs(tmp_path_factory.mktemp("upstream")) as all_of_it:
        _, number = all_of_it.upstream("--port", "0", "--dribble-ms", "5")
        yield number


def request(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        data = None if body is None else json.dumps(body).encode()
        link.request("GET" if data is None else "POST", path, data, headers or {})
        reply = link.getresponse()
        return reply.status, reply.read(), {name.lower(): value for name, value in reply.getheaders()}
    finally:
        link.close()


def raw(port: int, mode: str, stream: bool = False, seconds: float = 0.3) -> tuple[bytes, str]:
    """Send one chat call; return the bytes that come and how it ends."""
    body = json.dumps({"model": mode, "stream": stream}).encode()
    out = b""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        sock.settimeout(seconds)
        try:
            while data := sock.recv(1 << 20):
                out += data
        except ConnectionResetError:
            return out, "reset"
        except TimeoutError:
            return out, "open"
    return out, "closed"


def log(port: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in request(port, "/_log")[1].splitlines()]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "choices"),
        ("/chat/completions", "choices"),
        ("/v1/responses", "output"),
        ("/v1/messages", "content"),
        ("/v1/embeddings", "data"),
        ("/v1/completions", "choices"),
        ("/v1/moderations", "results"),
        ("/v1/images/generations", "data"),
        ("/v1/messages/count_tokens", "input_tokens"),
    ],
)
def test_upstream_answers_each_path_in_its_shape(port: int, path: str, field: str) -> None:
    status, body, _ = request(port, path, {"model": "gpt-4o"})
    assert status == 200
    assert field in json.loads(body)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_upstream_streams_as_many_chunks_as_the_model_name_says(port: int, path: str) -> None:
    body = {"model": "paced-5-2", "stream": True, "stream_options": {"include_usage": True}}
    status, data, headers = request(port, f"/v1/{path}", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert data.count(b" word") >= 5
    events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    usage = json.dumps(events[-2:])
    assert '"completion_tokens": 5' in usage or '"output_tokens": 5' in usage
    if path == "responses":
        assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_upstream_paces_a_stream_by_its_gap(port: int) -> None:
    begin = time.monotonic()
    request(port, "/v1/chat/completions", {"model": "paced-6-40", "stream": True})
    assert 0.15 <= time.monotonic() - begin < 2


def test_upstream_gives_usage_in_a_chat_stream_only_when_asked(port: int) -> None:
    _, data, _ = request(port, "/v1/chat/completions", {"model": "paced-2-1", "stream": True})
    assert b"usage" not in data
    assert log(port)[-1]["usage_given"] is None


def test_upstream_pads_json_and_speaks_the_usage_it_was_told(port: int) -> None:
    _, body, _ = request(port, "/v1/chat/completions", {"model": "json-4096+usage-100-50-20"})
    assert 4000 <= len(body) <= 4200
    usage = json.loads(body)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 50)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 20
    assert log(port)[-1]["usage_given"] == usage


def test_upstream_takes_the_mode_from_a_header_too(port: int) -> None:
    status, _, headers = request(port, "/v1/chat/completions", {"model": "gpt-4o"}, {"x-fake": "fault-429-3"})
    assert (status, headers["retry-after"]) == (429, "3")


def test_upstream_refuses_an_unknown_fault_so_that_a_typo_is_no_success(port: int) -> None:
    assert request(port, "/v1/chat/completions", {"model": "fault-resett"})[0] == 400


@pytest.mark.parametrize(
    ("fault", "stream", "end", "has", "lacks"),
    [
        ("reset-before-head", False, "reset", b"", b"HTTP"),
        ("close-before-head", True, "closed", b"", b"HTTP"),
        ("hang-before-head", False, "open", b"", b"HTTP"),
        ("reset-after-head", True, "reset", b"200 OK", b"data:"),
        ("hang-after-head", False, "open", b"content-length", b"choices"),
        ("reset-mid", True, "reset", b"data: {", b"[DONE]"),
        ("reset-mid", False, "reset", b'{"id"', b"usage"),
        ("close-mid", True, "closed", b"data: {", b"[DONE]"),
        ("hang-mid", True, "open", b"data: {", b"[DONE]"),
        ("hang-mid", False, "open", b'{"id"', b"usage"),
        ("error-mid", True, "open", b'data: {"error"', b"[DONE]"),
        ("200-error", True, "open", b'data: {"error"', b'"choices"'),
        ("200-error", False, "open", b'200 OK\r\ncontent-type: application/json\r\ncontent-length: 1', b"choices"),
        ("garbage", True, "open", b"not a chunk", b"[DONE]"),
        ("garbage", False, "open", b"not a chunk", b"usage"),
        ("garbage-head", False, "closed", b"no HTTP", b"200 OK"),
        ("huge-head-64", False, "open", b"x" * 65_536, b"[DONE]"),
        ("1xx-flood-20", False, "open", b"HTTP/1.1 103 Early\r\n\r\n" * 20 + b"HTTP/1.1 200", b"[DONE]"),
        ("close-before-done", True, "closed", b"0\r\n\r\n", b"[DONE]"),
        ("lying-length", False, "closed", b'"total_tokens"', b"[DONE]"),
        ("lying-length-short", False, "open", b'"total_tokens"', b"[DONE]"),
        ("long-line-1", True, "open", b"x" * 1_048_576, b"usage"),
        ("401", False, "open", b"invalid_api_key", b"choices"),
        ("403", True, "open", b"403 Forbidden", b"choices"),
        ("529", False, "open", b"retry-after: 7", b"choices"),
    ],
)  # fmt: skip
def test_upstream_breaks_as_told(port: int, fault: str, stream: bool, end: str, has: bytes, lacks: bytes) -> None:
    out, ended = raw(port, f"paced-8-5+fault-{fault}", stream)
    assert ended == end
    assert has in out
    assert lacks not in out


def test_upstream_dribbles_byte_by_byte(port: int) -> None:
    out, ended = raw(port, "fault-dribble-2", seconds=0.1)
    assert ended == "open"
    assert out.endswith(b"}")


def test_every_fault_is_exercised_here() -> None:
    own = Path(__file__).read_text()
    assert not [name for name in answers.FAULTS if f'"{name}' not in own and f"fault-{name}" not in own]


def test_control_makes_everybody_fail_for_a_count_of_requests(port: int) -> None:
    request(port, "/_control", {"fault": "503", "seconds": 30, "count": 2})
    got = [request(port, "/v1/chat/completions", {"model": "gpt-4o"})[0] for _ in range(3)]
    assert got == [503, 503, 200]
    assert request(port, "/_control", {"fault": "nonsense"})[0] == 400


def test_log_says_who_left_early_and_who_did_not(port: int) -> None:
    request(port, "/_reset", {})
    raw(port, "paced-50-20", stream=True, seconds=0.01)
    request(port, "/v1/chat/completions", {"model": "gpt-4o"}, {"x-request-id": "r-1", "authorization": "Bearer sk-1"})
    deadline = time.monotonic() + 5
    while json.loads(request(port, "/_stats")[1])["closed_early"] == 0 and time.monotonic() < deadline:
        pass
    left, whole = log(port)
    assert (left["seq"], left["stream"], left["ended_at"], left["usage_given"]) == (1, True, None, None)
    assert left["closed_by_peer_at"] >= left["started_at"]
    assert (whole["x-request-id"], whole["key"], whole["closed_by_peer_at"]) == ("r-1", "Bearer sk-1", None)
    assert whole["usage_given"]["total_tokens"] == 16
    stats = json.loads(request(port, "/_stats")[1])
    assert (stats["requests"], stats["completed"], stats["closed_early"], stats["open_streams"]) == (2, 1, 1, 0)


def test_control_refuse_closes_the_listener_for_a_while(port: int) -> None:
    request(port, "/_control", {"fault": "refuse", "seconds": 0.3})
    refused, deadline = 0, time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            if refused:
                break
        except (ConnectionRefusedError, ConnectionResetError):
            refused += 1
    assert refused
    assert request(port, "/v1/chat/completions", {"model": "gpt-4o"})[0] == 200


def test_log_check_refuses_a_run_whose_access_log_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    candidates = load("candidates")
    path = tmp_path / "access.jsonl"
    path.write_text('{"status":200,"usage":{"input":1,"output":1}}\n')
    check = candidates.LogCheck(candidates.Running("x", None, 0, path), quiet_s=0)
    good = {"status": 200, "outcome": "complete", "usage": {"input": 9, "output": 7}}

    def wrong(*lines: dict[str, Any]) -> bool:
        path.write_text("x" * check.offset + "".join(json.dumps(line) + "\n" for line in lines))
        return bool(check.wrong(2, 2, (9, 7), timeout_s=0))

    assert not wrong(good, good)
    assert wrong(good)
    assert wrong(good, good, good)
    assert wrong(good, {**good, "usage": {"input": 9, "output": 8}})
    assert wrong(good, good, {**good, "status": 500})
    assert wrong(good, {**good, "outcome": "client_gone"})
