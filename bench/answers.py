"""What the fake upstream says: well-formed answers, and ways to break them.

What lives here: the reply of each dialect (JSON or SSE), the mini-language of
modes (`paced-51-20`, `json-4096`, `fault-reset-mid` …), and one function per
fault that takes a good `Answer` and returns a bad one. Pure: no socket, no
clock. What must not: anything of nbgate, since this is the independent truth
against which nbgate is measured.

Modes are joined with `+` and given as the model name or in the header
`x-fake`: `paced-51-20+usage-10-5+fault-reset-mid`. `MODES` and `FAULTS` are the
list of them; `bench/README.md` explains each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson

CREATED = 1_700_000_000
SEQ = b"@@@@@@@@"  # replaced by the eight-digit sequence number of the request, so the length is fixed
WORD = " word"
DIALECTS = {  # path without /v1 -> dialect
    b"/chat/completions": "chat", b"/responses": "responses", b"/messages": "messages", b"/embeddings": "embeddings",
    b"/completions": "completions", b"/moderations": "moderations", b"/images/generations": "images",
    b"/images/edits": "images", b"/images/variations": "images", b"/messages/count_tokens": "count_tokens",
}  # fmt: skip
STREAMS = frozenset({"chat", "responses", "messages", "completions"})
REASONS = {
    200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 402: b"Payment Required", 403: b"Forbidden",
    404: b"Not Found", 413: b"Content Too Large", 422: b"Unprocessable Content", 429: b"Too Many Requests",
    500: b"Internal Server Error", 502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout",
}  # fmt: skip
MAX_PARTS = 1_000_000


class Ask(NamedTuple):
    """What was asked for; equal asks get equal answers, so they are cached."""

    dialect: str
    model: str
    stream: bool
    wants_usage: bool
    mode: str


class Answer(NamedTuple):
    """A reply as the writes that make it up: `parts[i]` goes out at `i * gap_ms`.

    `end` says what follows the last part: `keep` the connection, `close` it,
    `reset` it (RST), or `hang` until the peer goes away.
    """

    status: int
    head: bytes
    parts: tuple[bytes, ...]
    gap_ms: int
    delay_ms: int
    end: str
    usage: dict[str, Any] | None
    chunked: bool


class Mode(NamedTuple):
    """The decoded mini-language."""

    chunks: int = 51
    gap_ms: int = 20
    size: int = 0
    delay_ms: int = 0
    usage: tuple[int, int, int] | None = (9, -1, 0)
    fault: str = ""
    arg: int = 0
    dribble_ms: int = 1000


def number(text: str) -> int:
    """Read a decimal number; `m5` is minus five."""
    return -int(text[1:]) if text.startswith("m") else int(text)


def read_mode(text: str, default: Mode) -> Mode:
    """Decode `text`; words that are no mode change nothing."""
    mode = default
    for word in text.split("+"):
        name, *args = word.split("-")
        if name not in MODES:
            continue
        try:
            mode = MODES[name](mode, args)
        except (ValueError, IndexError):
            continue
    return mode


def _paced(mode: Mode, args: list[str]) -> Mode:
    chunks, gap, size = (*map(int, args), *([mode.chunks, mode.gap_ms, 0][len(args) :]))
    return mode._replace(chunks=min(max(chunks, 1), MAX_PARTS), gap_ms=gap, size=size)


def _usage(mode: Mode, args: list[str]) -> Mode:
    if args == ["none"]:
        return mode._replace(usage=None)
    read = [number(arg) for arg in args[:3]] + [0, 0]
    return mode._replace(usage=(read[0], read[1], read[2]))


def _fault(mode: Mode, args: list[str]) -> Mode:
    name = "-".join(args)
    match = re.fullmatch(r"(.+?)-([0-9]+)", name)
    if match and name not in FAULTS:
        return mode._replace(fault=match[1], arg=int(match[2]))
    return mode._replace(fault=name, arg=0)


MODES: dict[str, Callable[[Mode, list[str]], Mode]] = {
    "paced": _paced,
    "json": lambda mode, args: mode._replace(size=int(args[0])),
    "delay": lambda mode, args: mode._replace(delay_ms=int(args[0])),
    "usage": _usage,
    "fault": _fault,
}


# --- good answers -----------------------------------------------------------------------------------------------------
def sse(event: dict[str, Any], name: str = "") -> bytes:
    """Frame one server-sent event."""
    prefix = b"event: " + name.encode() + b"\n" if name else b""
    return prefix + b"data: " + orjson.dumps(event) + b"\n\n"


def chunk(data: bytes) -> bytes:
    """Frame one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def head(status: int, length: int | None, content_type: bytes = b"application/json", more: bytes = b"") -> bytes:
    """Build a response head; `length` None means chunked."""
    framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
    reason = REASONS.get(status, b"Unknown")
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\n%b%b\r\n\r\n" % (status, reason, content_type, more, framing)


def usage_of(ask: Ask, mode: Mode) -> dict[str, Any] | None:
    """Count tokens as the dialect spells it; None when the mode says so."""
    if mode.usage is None:
        return None
    given, out, cached = mode.usage
    if out == -1:
        out = mode.chunks if ask.stream else 7
    if ask.dialect == "messages":
        return {"input_tokens": given, "output_tokens": out, "cache_read_input_tokens": cached}
    if ask.dialect == "responses":
        details = {"cached_tokens": cached, "cache_write_tokens": 0}
        outs = {"reasoning_tokens": 0}
        return {"input_tokens": given, "input_tokens_details": details, "output_tokens": out,
                "output_tokens_details": outs, "total_tokens": given + out}  # fmt: skip
    if ask.dialect == "embeddings":
        return {"prompt_tokens": given, "total_tokens": given}
    if ask.dialect in ("moderations", "images", "count_tokens"):
        return None
    plain: dict[str, Any] = {"prompt_tokens": given, "completion_tokens": out, "total_tokens": given + out}
    return {**plain, "prompt_tokens_details": {"cached_tokens": cached}} if cached else plain


def message_item(text: str, status: str) -> dict[str, Any]:
    """Build the one output item of a Responses answer."""
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": content}


def response_object(ask: Ask, text: str, status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
    """Build a Responses object in the given state."""
    output = [message_item(text, status)] if text else []
    fixed: dict[str, Any] = {"error": None, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return {"id": "resp_@@@@@@@@", "object": "response", "created_at": CREATED, "status": status, "model": ask.model,
            "output": output, **fixed, "usage": usage}  # fmt: skip


def body_of(ask: Ask, usage: dict[str, Any] | None, text: str) -> dict[str, Any]:
    """Build the JSON answer of a dialect around `text`."""
    many = {"usage": usage} if usage is not None else {}
    if ask.dialect == "messages":
        return {"id": "msg_@@@@@@@@", "type": "message", "role": "assistant", "model": ask.model, "stop_sequence": None,
                "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", **many}  # fmt: skip
    if ask.dialect == "responses":
        return response_object(ask, text, "completed", usage)
    if ask.dialect == "embeddings":
        vector = [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}]
        return {"object": "list", "data": vector, "model": ask.model, **many}
    if ask.dialect == "moderations":
        flags = {"categories": {"violence": False}, "category_scores": {"violence": 0.01}, "flagged": False}
        return {"id": "modr-@@@@@@@@", "model": ask.model, "results": [flags]}
    if ask.dialect == "images":
        return {"created": CREATED, "data": [{"b64_json": "iVBORw0KGgo=", "revised_prompt": text}]}
    if ask.dialect == "count_tokens":
        return {"input_tokens": 9}
    if ask.dialect == "completions":
        texts = [{"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}]
        return {"id": "cmpl-@@@@@@@@", "object": "text_completion", "created": CREATED, "model": ask.model,
                "choices": texts, **many}  # fmt: skip
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "c@@@@@@@@", "object": "chat.completion", "created": CREATED, "model": ask.model,
            "choices": [choice], **many}  # fmt: skip


def openai_events(ask: Ask, mode: Mode, usage: dict[str, Any] | None) -> Iterator[bytes]:
    """Yield one write's worth of events per chunk: chat and completions."""
    chat = ask.dialect == "chat"
    asked: dict[str, Any] = {"usage": None} if ask.wants_usage else {}
    kind = "chat.completion.chunk" if chat else "text_completion"
    base = {"id": "chatcmpl-1", "object": kind, "created": CREATED, "model": ask.model}
    word = WORD * max(1, mode.size // len(WORD))

    def frame(delta: dict[str, Any], text: str, finish: str | None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "delta": delta} if chat else {"index": 0, "text": text}
        return sse({**base, "choices": [{**choice, "finish_reason": finish}], **asked})

    middle = frame({"content": word}, word, None)
    if mode.chunks > 1:
        yield frame({"role": "assistant", "content": word}, word, None) if chat else middle
    for _ in range(mode.chunks - 2):
        yield middle
    tail = sse({**base, "choices": [], "usage": usage}) if ask.wants_usage and usage is not None else b""
    yield middle + frame({}, "", "stop") + tail + b"data: [DONE]\n\n"


def claude_events(ask: Ask, mode: Mode, usage: dict[str, Any] | None) -> Iterator[bytes]:
    """Yield one write's worth of events per chunk: messages."""
    word = WORD * max(1, mode.size // len(WORD))
    first = {**(usage or {"input_tokens": 0}), "output_tokens": 1}
    message: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": ask.model, "content": [],
               "stop_reason": None, "stop_sequence": None, "usage": first}  # fmt: skip
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    start = sse({"type": "message_start", "message": message}, "message_start") + sse(block, "content_block_start")
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
    middle = sse(delta, "content_block_delta")
    end: dict[str, Any] = {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}}
    end["usage"] = {"output_tokens": usage["output_tokens"] if usage else 0}
    stop = sse({"type": "content_block_stop", "index": 0}, "content_block_stop")
    tail = stop + sse(end, "message_delta") + sse({"type": "message_stop"}, "message_stop")
    for index in range(mode.chunks):
        yield (start if not index else b"") + middle + (tail if index == mode.chunks - 1 else b"")


def responses_events(ask: Ask, mode: Mode, usage: dict[str, Any] | None) -> Iterator[bytes]:
    """Yield one write's worth of events per chunk: responses, full grammar."""
    word = WORD * max(1, mode.size // len(WORD))
    text = word * mode.chunks
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    count = -1

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal count
        count += 1
        return sse({"type": kind, "sequence_number": count, **fields}, kind)

    empty = response_object(ask, "", "in_progress", None)
    part = {"type": "output_text", "text": "", "annotations": []}
    for index in range(mode.chunks):
        data = b""
        if not index:
            data = event("response.created", response=empty) + event("response.in_progress", response=empty)
            data += event("response.output_item.added", output_index=0, item=message_item("", "in_progress"))
            data += event("response.content_part.added", **place, part=part)
        data += event("response.output_text.delta", **place, delta=word, logprobs=[])
        if index == mode.chunks - 1:
            data += event("response.output_text.done", **place, text=text, logprobs=[])
            data += event("response.content_part.done", **place, part={**part, "text": text})
            data += event("response.output_item.done", output_index=0, item=message_item(text, "completed"))
            data += event("response.completed", response=response_object(ask, text, "completed", usage))
        yield data


EVENTS = {"messages": claude_events, "responses": responses_events}


def answer(ask: Ask, default: Mode) -> Answer:
    """Answer `ask`, with its faults; the only entrance of this room."""
    mode = read_mode(ask.mode, default)
    usage = usage_of(ask, mode)
    if ask.stream and ask.dialect in STREAMS:
        frames = EVENTS.get(ask.dialect, openai_events)(ask, mode, usage)
        parts = tuple(chunk(frame.replace(SEQ, b"00000001")) for frame in frames)
        parts = (*parts[:-1], parts[-1] + b"0\r\n\r\n")
        if ask.dialect in ("chat", "completions") and not ask.wants_usage:
            usage = None
        start = head(200, None, b"text/event-stream")
        good = Answer(200, start, parts, mode.gap_ms, mode.delay_ms, "keep", usage, True)
    else:
        body = orjson.dumps(body_of(ask, usage, "Hello!"))
        if mode.size > len(body):
            body = orjson.dumps(body_of(ask, usage, "Hello!" + "x" * (mode.size - len(body))))
        good = Answer(200, head(200, len(body)), (body,), 0, mode.delay_ms, "keep", usage, False)
    return break_it(good, ask, mode) if mode.fault else good


# --- bad answers ------------------------------------------------------------------------------------------------------
def error_body(ask: Ask, status: int) -> dict[str, Any]:
    """Say what went wrong, in the dialect's own shape."""
    message = f"The fake upstream was told to fail with {status}."
    if ask.dialect in ("messages", "count_tokens"):
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 529: "overloaded_error"}
        kind = kinds.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_fake"}
    codes = {401: "invalid_api_key", 402: "insufficient_quota", 429: "rate_limit_exceeded"}
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": codes.get(status)}}


def error_event(ask: Ask) -> bytes:
    """Frame an error as the dialect sends it inside a stream."""
    if ask.dialect == "responses":
        message = "The fake upstream was told to fail."
        event = {"type": "error", "code": "server_error", "message": message, "param": None, "sequence_number": 0}
        return sse(event, "error")
    return sse(error_body(ask, 500), "error" if ask.dialect == "messages" else "")


def fail_with(ask: Ask, status: int, retry_after_s: int) -> Answer:
    """Refuse with `status`; 429, 503 and 529 carry retry-after."""
    body = orjson.dumps(error_body(ask, status))
    more = b"retry-after: %d\r\n" % (retry_after_s or 7) if status in (429, 503, 529) else b""
    return Answer(status, head(status, len(body), more=more), (body,), 0, 0, "keep", None, False)


def halve(good: Answer, end: str) -> Answer:
    """Send the first half of the parts, or of the one body, then `end`."""
    parts = good.parts[: len(good.parts) // 2] if len(good.parts) > 1 else (good.parts[0][: len(good.parts[0]) // 2],)
    return good._replace(parts=parts, end=end, usage=None)


def _error_200(good: Answer, ask: Ask, _: int) -> Answer:
    if not good.chunked:
        return fail_with(ask, 500, 0)._replace(status=200, head=head(200, len(orjson.dumps(error_body(ask, 500)))))
    return good._replace(parts=(chunk(error_event(ask)) + b"0\r\n\r\n",), usage=None)


def _error_mid(good: Answer, ask: Ask, _: int) -> Answer:
    half = halve(good, "keep" if good.chunked else "close")
    return half._replace(parts=(*half.parts, chunk(error_event(ask)) + b"0\r\n\r\n")) if good.chunked else half


def _garbage(good: Answer, _: Ask, __: int) -> Answer:
    half = halve(good, "hang")
    if not good.chunked:
        return half._replace(head=head(200, None), parts=(b"zz;=\x00\r\nnot a chunk",))
    return half._replace(parts=(*half.parts, b"zz;=\x00\r\nnot a chunk"))


def _no_done(good: Answer, _: Ask, __: int) -> Answer:
    if not good.chunked:
        return halve(good, "close")
    # NOTE: framing is intact: the answer ends as a whole one would, but for its last events.
    parts = good.parts[:-1]
    return good._replace(parts=(*parts, b"0\r\n\r\n"), end="close", usage=None)


def _lie(good: Answer, _: Ask, delta: int) -> Answer:
    body = good.parts[0] if not good.chunked else b"".join(good.parts)
    kind = b"text/event-stream" if good.chunked else b"application/json"
    return good._replace(head=head(200, len(body) + delta, kind), parts=(body,), gap_ms=0, end="close", chunked=False)


def _long_line(good: Answer, ask: Ask, megabytes: int) -> Answer:
    pad = b"x" * ((megabytes or 8) * 1_048_576)
    if not good.chunked:
        body = good.parts[0].replace(b"Hello!", pad)
        return good._replace(head=head(200, len(body)), parts=(body,))
    line = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[],"pad":"%b"}\n\n' % pad
    return good._replace(parts=(good.parts[0], chunk(line), *good.parts[1:]))


def _dribble(good: Answer, _: Ask, gap_ms: int) -> Answer:
    whole = b"".join(good.parts)
    return good._replace(parts=tuple(whole[i : i + 1] for i in range(len(whole))), gap_ms=gap_ms)


def _huge_head(good: Answer, _: Ask, kilobytes: int) -> Answer:
    line, rest = good.head.split(b"\r\n", 1)
    pad = b"x" * ((kilobytes or 1024) * 1024)
    return good._replace(head=line + b"\r\nx-pad: " + pad + b"\r\n" + rest)


FAULTS: dict[str, Callable[[Answer, Ask, int], Answer]] = {
    "reset-before-head": lambda good, ask, arg: good._replace(head=b"", parts=(), end="reset", usage=None),
    "close-before-head": lambda good, ask, arg: good._replace(head=b"", parts=(), end="close", usage=None),
    "hang-before-head": lambda good, ask, arg: good._replace(head=b"", parts=(), end="hang", usage=None),
    "reset-after-head": lambda good, ask, arg: good._replace(parts=(), end="reset", usage=None),
    "hang-after-head": lambda good, ask, arg: good._replace(parts=(), end="hang", usage=None),
    "reset-mid": lambda good, ask, arg: halve(good, "reset"),
    "close-mid": lambda good, ask, arg: halve(good, "close"),
    "hang-mid": lambda good, ask, arg: halve(good, "hang"),
    "error-mid": _error_mid,
    "200-error": _error_200,
    "dribble": _dribble,
    "garbage": _garbage,
    "garbage-head": lambda good, ask, arg: good._replace(head=b"\x16\x03 no HTTP\r\n\r\n", end="close", usage=None),
    "huge-head": _huge_head,
    "1xx-flood": lambda good, ask, arg: good._replace(head=b"HTTP/1.1 103 Early\r\n\r\n" * (arg or 10_000) + good.head),
    "close-before-done": _no_done,
    "lying-length": lambda good, ask, arg: _lie(good, ask, 10)._replace(usage=None),
    "lying-length-short": lambda good, ask, arg: _lie(good, ask, -10)._replace(end="keep"),
    "long-line": _long_line,
}


def break_it(good: Answer, ask: Ask, mode: Mode) -> Answer:
    """Apply the fault that the mode names; a number is a status.

    Raises: KeyError for an unknown fault, so that a typing mistake in a test
    is no silent success.
    """
    if mode.fault.isdecimal():
        return fail_with(ask, int(mode.fault), mode.arg)
    arg = mode.arg or (mode.dribble_ms if mode.fault == "dribble" else 0)
    return FAULTS[mode.fault](good, ask, arg)
