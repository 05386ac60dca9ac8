"""What the demo model answers, whatever the dialect. Pure.

What lives here: the neutral question (`Asked`) and reply (`Reply`), the text in
the language of the question, tool calls with arguments made from their JSON
schema, and the count of tokens (one piece of text is one token). The same
question always gets the same reply. What must not: field names of a dialect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

PIECE = re.compile(r"[\u3000-\u9fff\uff00-\uffef]{1,2}|\s*[^\s\u3000-\u9fff\uff00-\uffef]+|\s+")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
PARALLEL = re.compile(r"parallel|in one go|both|同时|并行", re.IGNORECASE)
REPEATED_CHARS = 400
MAX_PIECES = 4096
MESSAGE_TOKENS = 3  # framing of a message, as OpenAI's cookbook counts it
IMAGE_TOKENS = 85  # a low-detail image
SAYS = {
    "en": "This is nbgate's demo model {model}. It does not think, it repeats what you said: {said}",
    "zh": "这是 nbgate 的演示模型 {model}。它不会思考，只会重复您的话：{said}",
}
SAYS_TOOL = {
    "en": "This is nbgate's demo model {model}. The tool answered: {said}",
    "zh": "这是 nbgate 的演示模型 {model}。工具的返回结果是：{said}",
}
NOTHING = {"en": "(nothing)", "zh": "（没有内容）"}


class Tool(NamedTuple):
    """A function that the caller offers."""

    name: str
    schema: dict[str, Any]


class Call(NamedTuple):
    """A function that the model wants called; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


class Asked(NamedTuple):
    """A question in no dialect.

    `choice` is `auto`, `none`, or the name of the tool to call (`required`
    means any). `shape` is a JSON schema that the text must fit, or None.
    """

    model: str
    question: str
    input_tokens: int
    tool_result: str | None = None
    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    parallel: bool = True
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    shape: dict[str, Any] | None = None
    id: str = ""


class Reply(NamedTuple):
    """The answer in no dialect; `stop` is `stop`, `length`, `sequence` or `tools`."""

    pieces: tuple[str, ...]
    calls: tuple[Call, ...]
    stop: str
    sequence: str | None
    output_tokens: int

    @property
    def text(self) -> str:
        """Join the pieces."""
        return "".join(self.pieces)


def split(text: str) -> list[str]:
    """Cut `text` into pieces of about a token; joined they are `text`."""
    return PIECE.findall(text)


def count(text: str) -> int:
    """Count the tokens of `text`."""
    return len(PIECE.findall(text))


def texts(content: Any) -> Iterator[str]:
    """Yield every text inside message content of any dialect."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from texts(part)
    elif isinstance(content, dict):
        for name in ("text", "content", "output", "input_text", "arguments"):
            if name in content:
                yield from texts(content[name])


def measure(messages: list[Any], *more: Any) -> int:
    """Count the tokens of a conversation, its system text and its tools."""
    total = sum(MESSAGE_TOKENS + sum(map(count, texts(message))) for message in messages)
    for part in more:
        total += count(part if isinstance(part, str) else orjson.dumps(part).decode()) if part else 0
    images = sum(str(message).count("'image") + str(message).count("'input_image") for message in messages)
    return total + IMAGE_TOKENS * images


def example(schema: Any, name: str = "value", root: Any = None, depth: int = 0) -> Any:
    """Make a value that fits a JSON schema, always the same one."""
    if not isinstance(schema, dict) or depth > 8:
        return f"demo {name}"
    root = schema if root is None else root
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    for key in ("enum", "examples"):
        if schema.get(key):
            return schema[key][0]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return example(_resolve(root, reference), name, root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return example(schema[key][0], name, root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if kind == "object":
        fields = schema.get("properties") or {}
        wanted = schema.get("required") or list(fields)
        return {field: example(fields.get(field, {}), field, root, depth + 1) for field in wanted}
    if kind == "array":
        item = example(schema.get("items", {}), name, root, depth + 1)
        return [item] * max(1, min(int(schema.get("minItems", 1)), 8))
    low = schema.get("minimum", 1)
    plain = {"integer": int(low), "number": float(low), "boolean": True, "null": None}
    return plain.get(kind, f"demo {name}")


def _resolve(root: Any, reference: str) -> Any:
    found = root
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step, {}) if isinstance(found, dict) else {}
    return found


def choose_calls(asked: Asked) -> tuple[Call, ...]:
    """Pick the tools to call; none after a tool has answered."""
    if not asked.tools or asked.choice == "none" or asked.tool_result is not None:
        return ()
    named = [tool for tool in asked.tools if tool.name == asked.choice]
    meant = [tool for tool in asked.tools if tool.name and tool.name in asked.question]
    chosen = named or meant[:1] or list(asked.tools[:1])
    if asked.parallel and not named and PARALLEL.search(asked.question):
        chosen = list(asked.tools) if len(asked.tools) > 1 else chosen * 2
    return tuple(
        Call(f"{asked.id}{index}", tool.name, orjson.dumps(example(tool.schema or {"type": "object"})).decode())
        for index, tool in enumerate(chosen)
    )


def reply(asked: Asked) -> Reply:
    """Answer: with tool calls, with JSON of the wanted shape, or with words."""
    calls = choose_calls(asked)
    if calls:
        return Reply((), calls, "tools", None, sum(count(call.name) + count(call.arguments) for call in calls))
    said = asked.question if asked.tool_result is None else asked.tool_result
    language = "zh" if CHINESE.search(asked.question or said) else "en"
    if asked.shape is not None:
        text = orjson.dumps(example(asked.shape or {"type": "object", "required": ["demo"]})).decode()
    else:
        says = SAYS if asked.tool_result is None else SAYS_TOOL
        shown = said.strip()[:REPEATED_CHARS] or NOTHING[language]
        text = says[language].format(model=asked.model, said=shown)
    stop, sequence = "stop", None
    cuts = [(text.index(one), one) for one in asked.stops if one and one in text]
    if cuts:
        at, sequence = min(cuts)
        text, stop = text[:at], "sequence"
    pieces = split(text)
    limit = min(asked.max_tokens or MAX_PIECES, MAX_PIECES)
    if len(pieces) > limit:
        pieces, stop, sequence = pieces[:limit], "length", None
    return Reply(tuple(pieces), (), stop, sequence, len(pieces))


def slices(text: str, size: int = 16) -> Iterator[str]:
    """Cut JSON arguments into deltas."""
    for at in range(0, len(text), size):
        yield text[at : at + size]


def sse(event: dict[str, Any], name: str = "") -> bytes:
    """Frame one server-sent event."""
    prefix = b"event: " + name.encode() + b"\n" if name else b""
    return prefix + b"data: " + orjson.dumps(event) + b"\n\n"
