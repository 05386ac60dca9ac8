"""What the demo says no to, in the words of each dialect. Pure."""

from __future__ import annotations

from typing import Any

from .models import KINDS

CLAUDE_TYPES = {400: "invalid_request_error", 404: "not_found_error", 405: "invalid_request_error",
                413: "request_too_large", 500: "api_error"}  # fmt: skip


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self, family: str, request_id: str) -> dict[str, Any]:
        """Shape the error as `family` (openai or claude) does."""
        if family == "claude":
            error = {"type": CLAUDE_TYPES.get(self.status, "api_error"), "message": self.message}
            return {"type": "error", "error": error, "request_id": request_id}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def need(body: dict[str, Any], name: str, kinds: type | tuple[type, ...]) -> Any:
    """Take the field `name` of one of `kinds`, not empty.

    Raises: Refusal that names the field.
    """
    value = body.get(name)
    if value is None:
        raise Refusal(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise Refusal(f"Invalid type for '{name}'.", param=name, code="invalid_type")
    if isinstance(value, (str, list)) and not value:
        raise Refusal(f"'{name}' must not be empty.", param=name, code="invalid_value")
    return value


def whole(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    """Take the optional whole number `name` between two bounds."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise Refusal(f"'{name}' must be a whole number from {low} to {high}.", param=name, code="invalid_value")
    return value


def model_of(body: dict[str, Any], kind: str, default: str = "") -> str:
    """Take the model and check that it can do `kind`."""
    if default and body.get("model") is None:
        return default
    model: str = need(body, "model", str)
    if model not in KINDS:
        raise Refusal(f"The model '{model}' does not exist in the demo.", 404, "model", "model_not_found")
    if KINDS[model] != kind:
        raise Refusal(f"The model '{model}' is for {KINDS[model]}, not for {kind}.", 400, "model", "invalid_value")
    return model
