"""Embeddings, images, moderations and the model list of the demo. Pure.

Shapes: OpenAI's, as released in its Python SDK 3.54; the model list also in
Anthropic's (SDK 2.12). Vectors and pictures are drawn from a hash of the text,
so the same text always gives the same ones.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
import zlib
from typing import Any

from .models import MODELS
from .refusal import Refusal, model_of, need, whole
from .words import count, texts

DIMENSIONS = 1536
MAX_INPUTS = 2048
SIZES = ("1024x1024", "1792x1024", "1024x1792")
QUALITIES = ("standard", "hd")
PIXELS = 8  # the side of a picture: it is only a sign that one came
CREATED = 1_715_367_049
CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
WITH_IMAGES = frozenset(
    {"self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "violence", "violence/graphic"}
)
VIOLENT = ("kill", "murder", "杀")


def noise(seed: str, size: int) -> bytes:
    """Draw `size` bytes from a text."""
    return hashlib.shake_128(seed.encode("utf-8", "surrogatepass")).digest(size)


def vector(text: str, dimensions: int) -> list[float]:
    """Draw a unit vector from a text."""
    raw = [number / 32768 for number in struct.unpack(f"<{dimensions}h", noise(text, 2 * dimensions))]
    length = math.sqrt(sum(number * number for number in raw)) or 1.0
    return [number / length for number in raw]


def embed(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer an embeddings request."""
    model = model_of(body, "embeddings")
    given = need(body, "input", (str, list))
    inputs: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if len(inputs) > MAX_INPUTS or not all(inputs):
        raise Refusal(f"'input' must hold 1 to {MAX_INPUTS} texts, none empty.", param="input", code="invalid_value")
    dimensions = whole(body, "dimensions", 1, DIMENSIONS) or DIMENSIONS
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Refusal("'encoding_format' must be float or base64.", param="encoding_format", code="invalid_value")
    data: list[dict[str, Any]] = []
    for index, one in enumerate(inputs):
        numbers: Any = vector(str(one), dimensions)
        if encoding == "base64":
            numbers = base64.b64encode(struct.pack(f"<{dimensions}f", *numbers)).decode()
        data.append({"object": "embedding", "index": index, "embedding": numbers})
    tokens = sum(count(one) if isinstance(one, str) else len(one) for one in inputs)
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def picture(seed: str) -> bytes:
    """Draw a tiny PNG from a text."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colours = noise(seed, 3 * PIXELS * PIXELS)
    width = 3 * PIXELS
    rows = b"".join(b"\x00" + colours[row * width : (row + 1) * width] for row in range(PIXELS))
    header = struct.pack(">IIBBBBB", PIXELS, PIXELS, 8, 2, 0, 0, 0)  # 8 bits, RGB; PNG (RFC 2083) 4.1.1
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def draw(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer an image request with pictures of a few pixels."""
    model_of(body, "images", "dall-e-3")
    prompt: str = need(body, "prompt", str)
    for name, allowed in (("size", SIZES), ("quality", QUALITIES), ("response_format", ("url", "b64_json"))):
        if body.get(name) is not None and body[name] not in allowed:
            raise Refusal(f"'{name}' must be one of {', '.join(allowed)}.", param=name, code="invalid_value")
    revised = f"nbgate's demo draws {PIXELS} by {PIXELS} coloured dots, not: {prompt[:400]}"
    data = []
    for index in range(whole(body, "n", 1, 10) or 1):
        coded = base64.b64encode(picture(f"{prompt} {body.get('size')} {index}")).decode()
        image = (
            {"b64_json": coded}
            if body.get("response_format") == "b64_json"
            else {"url": f"data:image/png;base64,{coded}"}
        )
        data.append({**image, "revised_prompt": revised})
    return {"created": now, "data": data}


def moderate(body: dict[str, Any], id_: str, now: int) -> dict[str, Any]:
    """Answer a moderation request; only a few words count as violence."""
    model = model_of(body, "moderations", "omni-moderation-latest")
    given = need(body, "input", (str, list))
    parts = isinstance(given, list) and isinstance(given[0], dict)
    inputs = [given] if isinstance(given, str) or parts else given
    results = []
    for one in inputs:
        flagged = any(word in " ".join(texts(one)).lower() for word in VIOLENT)
        categories = {name: flagged and name == "violence" for name in CATEGORIES}
        kinds = sorted({"image" if part.get("type") == "image_url" else "text" for part in one}) if parts else ["text"]
        applied = {name: [kind for kind in kinds if kind == "text" or name in WITH_IMAGES] for name in CATEGORIES}
        scores = {name: 0.98 if bad else 0.0001 for name, bad in categories.items()}
        results.append({"flagged": flagged, "categories": categories, "category_scores": scores,
                        "category_applied_input_types": applied})  # fmt: skip
    return {"id": f"modr-{id_}", "model": model, "results": results}


def model(name: str, claude: bool) -> dict[str, Any]:
    """Describe one model; Refusal when there is none of that name."""
    if name not in MODELS:
        raise Refusal(f"The model '{name}' does not exist in the demo.", 404, "model", "model_not_found")
    if claude:
        return {"type": "model", "id": name, "display_name": name, "created_at": "2024-05-10T18:50:49Z",
                "lifecycle": "active", "deprecated_at": None, "retires_at": None}  # fmt: skip
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "nbgate-demo"}


def models(claude: bool) -> dict[str, Any]:
    """List the models."""
    data = [model(name, claude) for name in MODELS]
    if claude:
        return {"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}
    return {"object": "list", "data": data}
