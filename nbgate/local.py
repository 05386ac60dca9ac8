"""What the gateway answers by itself: home, health, metrics, models.

What lives here: one function per such operation of `ROUTES`, in the table
`LOCAL`. What must not: anything that asks an upstream or a store. Heat: cold.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

import orjson

from nbgate import __version__
from nbgate.call import ANTHROPIC_VERSION, AUTHORIZATION, X_API_KEY
from nbgate.errors import GateError
from nbgate.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from nbgate.call import Call

_JSON: Final = b"application/json"
_HTML: Final = b"text/html; charset=utf-8"

_HOME: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }}
pre {{ padding: 1rem; overflow-x: auto; border: 1px solid #8884; border-radius: .5rem }}
</style>
<h1>{name}</h1>
<p>One base URL and one key for every model. This station speaks the APIs of OpenAI and Claude.</p>
<h2>Base URL</h2>
<pre>{base}</pre>
<h2>First request</h2>
<pre>curl -N {base}/v1/chat/completions \\
  -H 'Authorization: Bearer YOUR_API_KEY' \\
  -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'</pre>
<h2>Models</h2>
<p>{models}</p>
<p><small>nbgate {version}</small></p>
</html>
"""


async def _home(call: Call) -> None:
    state = call.state
    host = next((v for n, v in call.scope["headers"] if n == b"host"), b"") or b"localhost"
    base = state.site.public_url or "http://" + host.decode("ascii", "replace")
    names = state.public_models
    page = _HOME.format(
        name=html.escape(state.site.name),
        base=html.escape(base),
        model=html.escape(names[0]) if names else "gpt-4o",
        models=", ".join(f"<code>{html.escape(n)}</code>" for n in names) or "None yet: add a channel.",
        version=__version__,
    )
    policy = b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
    await call.answer(200, _HTML, page.encode(), [(b"content-security-policy", policy)])


async def _live(call: Call) -> None:
    await call.answer(200, _JSON, b'{"status":"ok"}')


async def _ready(call: Call) -> None:
    if call.app.ready and not call.app.shedding:
        await call.answer(200, _JSON, b'{"status":"ready"}')
    elif call.app.ready:
        raise GateError("service_unavailable", "The gateway is overloaded.", retry_after_s=1.0)
    else:
        raise GateError("service_unavailable", "The gateway is starting or shutting down.", retry_after_s=1.0)


async def _metrics(call: Call) -> None:
    # APPSEC: names of channels and models are the operator's business.
    if not _from_metrics_network(call):
        if call.values[AUTHORIZATION] is None and call.values[X_API_KEY] is None:
            raise GateError(
                "invalid_api_key", "The metrics need the admin key, or an address in admin.metrics_networks."
            )
        if not call.authenticate("openai").admin:
            raise GateError("permission_denied")
    render = call.app.metrics.prepare()
    body = await asyncio.get_running_loop().run_in_executor(None, render)
    await call.answer(200, CONTENT_TYPE, body)


def _from_metrics_network(call: Call) -> bool:
    networks = call.state.metrics_networks
    if not networks or not call.peer:
        return False
    address = ip_address(call.peer)
    return any(address in network for network in networks)


# models


def _models(call: Call) -> list[str]:
    assert call.key is not None
    names = call.state.models_of(call.key.groups)
    return [name for name in names if call.key.may_use(name)]


async def _model_list(call: Call) -> None:
    names = _models(call)
    if call.family == "gemini":
        body: dict[str, Any] = {"models": [_gemini_model(name) for name in names]}
    elif call.values[ANTHROPIC_VERSION] is not None:
        body = {
            "data": [_claude_model(call, name) for name in names],
            "has_more": False,
            "first_id": names[0] if names else None,
            "last_id": names[-1] if names else None,
        }
    else:
        body = {"object": "list", "data": [_openai_model(call, name) for name in names]}
    await call.answer(200, _JSON, orjson.dumps(body))


async def _model_get(call: Call) -> None:
    assert call.match is not None
    name = call.match.params["id"]
    if name not in _models(call):
        raise GateError(
            "model_not_found", f"The model `{name[:100]}` does not exist or you do not have access to it.", "model"
        )
    if call.family == "gemini":
        body = _gemini_model(name)
    elif call.values[ANTHROPIC_VERSION] is not None:
        body = _claude_model(call, name)
    else:
        body = _openai_model(call, name)
    await call.answer(200, _JSON, orjson.dumps(body))


def _openai_model(call: Call, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(call.state.made_at), "owned_by": "nbgate"}


def _claude_model(call: Call, name: str) -> dict[str, Any]:
    made_at = datetime.fromtimestamp(int(call.state.made_at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": name, "display_name": name, "created_at": made_at}


def _gemini_model(name: str) -> dict[str, Any]:
    methods = ["embedContent"] if "embed" in name else ["generateContent", "streamGenerateContent", "countTokens"]
    return {"name": f"models/{name}", "displayName": name, "supportedGenerationMethods": methods}


LOCAL: Final[dict[str, Callable[[Call], Awaitable[None]]]] = {
    "home": _home,
    "health.live": _live,
    "health.ready": _ready,
    "metrics": _metrics,
    "models.list": _model_list,
    "models.get": _model_get,
}
