"""The shipped nginx.conf in front of a real station, and in front of upstreams that are scripted."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from frontkit import SITE, Nginx, ask, exchange, free_port, needs_nginx, swap
from harness import Asked, Peer, ScriptedUpstream
from station import ROOT, Station, clean_env, until

from nbgate.config import parse

pytestmark = needs_nginx

KEY = "sk-front-0123456789abcdefghijklmnopqrstuvwxyzABCDEF"
NEAR = "sk-near-0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
TOML = f"""
[channels.demo]
type = "demo"
[[keys]]
key = "{KEY}"
account = "front"
[[keys]]
key = "{NEAR}"
account = "near"
networks = ["127.0.0.2/32"]
"""
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello."}]}
UPGRADE = {
    "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
    "sec-websocket-key": "MTIzNDU2Nzg5MDEyMzQ1Ng==",
}  # fmt: skip


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """A station that believes X-Forwarded-For from 127.0.0.1 alone."""
    with Station(tmp_path_factory.mktemp("station"), TOML, 'trusted_proxies = ["127.0.0.1/32"]') as one:
        yield one


@pytest.fixture(scope="module")
def front(station: Station, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """nginx before the station."""
    with Nginx(tmp_path_factory.mktemp("nginx"), f"127.0.0.1:{station.port}") as one:
        yield one


@pytest.fixture
def before(tmp_path: Path, scripted: Callable[..., ScriptedUpstream]) -> Iterator[Callable[..., Any]]:
    """Make an nginx before a scripted upstream."""
    with contextlib.ExitStack() as stack:

        def make(handler: Callable[[Asked, Peer], Any], site: str | None = None) -> tuple[Nginx, ScriptedUpstream]:
            upstream = scripted(handler)
            return stack.enter_context(Nginx(tmp_path, f"127.0.0.1:{upstream.port}", site)), upstream

        yield make


def fine(asked: Asked, peer: Peer) -> None:
    """Answer 200."""
    peer.json(200, b"{}")


def rows(station: Station) -> list[dict[str, Any]]:
    return [json.loads(line) for line in station.access.read_text().splitlines()] if station.access.exists() else []


# -- answers


def test_nginx_relays_a_whole_answer(front: Nginx) -> None:
    found = ask(front.port, "POST", "/v1/chat/completions", body=json.dumps(CHAT), headers=HEADERS)
    assert found.status == 200
    assert json.loads(found.body)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/chat/completions", CHAT, b"data: [DONE]"),
        ("/v1/messages", {**CHAT, "max_tokens": 500}, b"event: message_stop"),
        ("/v1/responses", {"model": "gpt-4o-mini", "input": "Say hello."}, b"event: response.completed"),
    ],
)
def test_nginx_passes_every_event_on_as_it_comes(front: Nginx, path: str, body: dict[str, Any], last: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=20)
    began = time.monotonic()
    connection.request("POST", path, json.dumps({**body, "stream": True}), HEADERS)
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    events, stamps = b"", []
    while data := answer.read1(65536):
        events += data
        stamps.append(time.monotonic() - began)
        # Whole events only: what the documentation's JavaScript sample counts on.
        assert data.endswith(b"\n\n")
    connection.close()
    assert last in events
    # The demo writes a word each 30 ms: nothing may gather on the way.
    assert len(stamps) >= 5 and stamps[0] < stamps[-1] / 2


def test_nginx_keeps_its_connection_to_nbgate(before: Callable[..., Any]) -> None:
    front, upstream = before(fine)
    assert [ask(front.port, "POST", "/v1/embeddings", body="{}").status for _ in range(8)] == [200] * 8
    assert (len(upstream.asked), upstream.connections) == (8, 1)


def test_nginx_tells_nbgate_at_once_that_a_client_left(front: Nginx, station: Station) -> None:
    with socket.create_connection(("127.0.0.1", front.port), timeout=20) as sock:
        body = json.dumps({**CHAT, "stream": True, "user": "leaver"}).encode()
        head = f"POST /v1/chat/completions?leaver HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in sock.recv(65536)
    row = until(lambda: next((r for r in rows(station) if r["path"].endswith("?leaver")), None), what="the log line")
    assert row["outcome"] == "client_gone"


# -- bounds


@pytest.mark.parametrize(
    "framing", ["Content-Length: 33554433\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n2000001\r\nx"]
)
def test_nginx_refuses_a_body_beyond_the_bound_before_it_is_sent(front: Nginx, framing: str) -> None:
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    head, _, body = exchange(front.port, (request + framing).encode(), b"}}").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ") and b"application/json" in head
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_nginx_and_nbgate_take_a_body_of_exactly_the_bound(front: Nginx) -> None:
    body = json.dumps(CHAT).encode()
    body += b" " * ((32 << 20) - len(body))
    assert ask(front.port, "POST", "/v1/chat/completions", body=body, headers=HEADERS).status == 200


def test_nginx_has_the_bounds_of_nbgates_defaults() -> None:
    server = parse("", {}).server
    text = SITE.read_text()

    def of(name: str) -> list[str]:
        return re.findall(rf"^ +{name} ([^;]+);", text, re.MULTILINE)

    assert of("client_max_body_size") == [f"{server.max_body_mb}m", f"{server.max_upload_mb}m"]
    assert of("client_header_timeout") == [f"{server.head_timeout_s:g}s"]
    assert of("client_body_timeout") == [f"{server.body_timeout_s:g}s"]
    assert of("send_timeout") == [f"{server.write_timeout_s:g}s"]
    to_nbgate, from_clients = of("keepalive_timeout")
    assert from_clients == f"{server.keepalive_s:g}s" and float(to_nbgate.rstrip("s")) < server.keepalive_s
    lines, each = of("large_client_header_buffers")[0].split()
    assert (each, int(lines) * server.max_line_kb) == (f"{server.max_line_kb}k", server.max_head_kb)
    total_s = parse('[channels.d]\ntype = "demo"', {}).channels["d"].timeouts.total_s
    assert float(of("proxy_read_timeout")[0].rstrip("s")) > total_s


@pytest.mark.parametrize(("size", "status"), [(8_000, 200), (9_000, 431)])
def test_nginx_bounds_a_header_line_and_says_so_in_json(before: Callable[..., Any], size: int, status: int) -> None:
    front, upstream = before(fine)
    found = ask(front.port, "GET", "/v1/models", headers={"x-long": "x" * size})
    assert (found.status, len(upstream.asked)) == (status, int(status == 200))
    assert status == 200 or json.loads(found.body)["error"]["code"] == "headers_too_large"


# -- failures


def test_nginx_never_repeats_a_call_that_was_sent(before: Callable[..., Any]) -> None:
    def handler(asked: Asked, peer: Peer) -> None:
        if len(upstream.asked) == 1:
            peer.json(200, b"{}")
        else:
            peer.reset()

    front, upstream = before(handler)
    # The second goes over the connection that the first left, where nginx would repeat by itself if it were allowed.
    assert ask(front.port, "POST", "/v1/chat/completions", body="{}").status == 200
    found = ask(front.port, "POST", "/v1/chat/completions", body="{}")
    assert (found.status, len(upstream.asked)) == (502, 2)
    assert json.loads(found.body)["error"]["code"] == "service_unavailable"


def test_nginx_never_repeats_a_websocket(before: Callable[..., Any]) -> None:
    front, upstream = before(lambda asked, peer: peer.reset())
    assert ask(front.port, "GET", "/v1/realtime", headers=UPGRADE).status == 502
    assert len(upstream.asked) == 1


def test_nginx_answers_for_a_station_that_is_down(tmp_path: Path) -> None:
    with Nginx(tmp_path, f"127.0.0.1:{free_port()}") as front:
        found = ask(front.port, "POST", "/v1/messages", body="{}")
    assert (found.status, found.headers["content-type"]) == (502, "application/json")
    body = json.loads(found.body)
    assert (body["type"], body["error"]["type"]) == ("error", "api_error")


def test_nginx_leaves_nbgates_own_errors_alone(front: Nginx) -> None:
    found = ask(front.port, "GET", "/v1/models")
    assert found.status == 401 and json.loads(found.body)["error"]["code"] == "invalid_api_key"
    assert found.headers["x-request-id"]


# -- who asks


def test_nginx_says_who_asks_whatever_the_client_claims(before: Callable[..., Any]) -> None:
    front, upstream = before(fine)
    claims = "X-Forwarded-For: 9.9.9.9\r\nx-forwarded-for: 8.8.8.8\r\nX_Forwarded_For: 7.7.7.7\r\n"
    exchange(front.port, f"GET / HTTP/1.1\r\nHost: a\r\n{claims}Connection: close\r\n\r\n".encode())
    head = upstream.asked[0].head.lower()
    assert re.findall(rb"^x.forwarded.for: *(.*)\r", head, re.MULTILINE) == [b"127.0.0.1"]


@pytest.mark.parametrize(
    ("through", "source", "claim", "status"),
    [
        ("nginx", "127.0.0.2", "", 200),
        ("nginx", "127.0.0.3", "", 403),
        ("nginx", "127.0.0.3", "127.0.0.2", 403),
        ("nginx", "127.0.0.1", "127.0.0.2", 403),
        ("directly", "127.0.0.1", "127.0.0.2", 200),
        ("directly", "127.0.0.3", "127.0.0.2", 403),
    ],
)
def test_networks_of_a_key_hold_behind_nginx(
    front: Nginx, station: Station, through: str, source: str, claim: str, status: int
) -> None:
    port = front.port if through == "nginx" else station.port
    headers = {"authorization": f"Bearer {NEAR}"} | ({"x-forwarded-for": claim} if claim else {})
    assert ask(port, "GET", "/v1/models", source=source, headers=headers).status == status


@pytest.mark.parametrize(
    "path",
    [
        *("/metrics", "//metrics", "/%6detrics", "/v1/../metrics", "/metrics?x"),
        *("/api", "/api/keys", "/v1/api/keys", "/%61pi/keys"),
    ],
)
def test_nginx_shows_the_operators_pages_to_nobody_else(before: Callable[..., Any], path: str) -> None:
    front, upstream = before(fine)
    found = ask(front.port, "GET", path, source="127.0.0.2")
    assert (found.status, upstream.asked) == (403, [])
    assert json.loads(found.body)["error"]["type"] == "permission_error"
    assert ask(front.port, "GET", path).status == 200


# -- WebSockets


@pytest.mark.parametrize("path", ["/v1/realtime", "/realtime?model=gpt-realtime", "/v1/responses"])
def test_nginx_carries_a_websocket_both_ways(before: Callable[..., Any], path: str) -> None:
    async def handler(asked: Asked, peer: Peer) -> None:
        peer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello")
        peer.write((await peer.reader.readexactly(4)).upper())
        peer.writer.close()

    front, upstream = before(handler)
    lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
    with socket.create_connection(("127.0.0.1", front.port), timeout=20) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
        found = b""
        while not found.endswith(b"hello"):
            found += sock.recv(4096)
        sock.sendall(b"data")
        assert sock.recv(4096) == b"DATA"
    assert upstream.asked[0].headers["upgrade"] == "websocket"


@pytest.mark.parametrize(
    "request_line, lines",
    [
        ("GET /v1/chat/completions HTTP/1.1", "Connection: Upgrade\r\nUpgrade: websocket"),
        ("GET /v1/realtime/x HTTP/1.1", "Connection: Upgrade\r\nUpgrade: websocket"),
        ("GET /v1/realtime HTTP/1.0", "Connection: Upgrade\r\nUpgrade: websocket"),
        ("GET /v1/realtime HTTP/1.1", "Upgrade: websocket"),
        ("GET /v1/realtime HTTP/1.1", "Connection: notupgrade\r\nUpgrade: websocket"),
        ("GET /v1/realtime HTTP/1.1", "Connection: Upgrade\r\nUpgrade: h2c"),
        ("GET /v1/realtime HTTP/1.1", "Connection: Upgrade\r\nUpgrade: websocket, h2c"),
        ("POST /v1/responses HTTP/1.1", "Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0"),
    ],
)
def test_nginx_upgrades_nothing_but_websockets(before: Callable[..., Any], request_line: str, lines: str) -> None:
    front, upstream = before(fine)
    with socket.create_connection(("127.0.0.1", front.port), timeout=20) as sock:
        sock.sendall(f"{request_line}\r\nHost: a\r\n{lines}\r\n\r\n".encode())
        assert b" 200 " in sock.recv(4096)
    assert "upgrade" not in upstream.asked[0].headers
    assert "upgrade" not in upstream.asked[0].headers.get("connection", "")


# -- variants


def test_nginx_serves_tls_and_http2_by_the_lines_that_are_commented(before: Callable[..., Any], tmp_path: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl is not installed")
    argv = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made = [*argv, "-keyout", str(tmp_path / "privkey.pem"), "-out", str(tmp_path / "fullchain.pem")]
    subprocess.run(made, check=True, capture_output=True)
    port = free_port()
    site = re.sub(r"^    # ((?:ssl_|add_header|listen 443 )[^\n]*;)$", r"    \1", SITE.read_text(), flags=re.MULTILINE)
    site = swap(site, "    listen 443 ssl", f"    listen 127.0.0.1:{port} ssl")
    site = site.replace("/etc/letsencrypt/live/api.example.com", str(tmp_path))
    before(fine, site)
    context = ssl.create_default_context(cafile=str(tmp_path / "fullchain.pem"))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), 20) as sock, context.wrap_socket(sock) as tls:
        assert (tls.selected_alpn_protocol(), tls.version()) == ("h2", "TLSv1.3")
    context.set_alpn_protocols(["http/1.1"])
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("strict-transport-security")) == (200, "max-age=31536000")
    answer.read()
    connection.close()


def test_nginx_keeps_queries_out_of_its_log(before: Callable[..., Any]) -> None:
    front, _ = before(fine)
    ask(front.port, "GET", "/v1/models?api_key=sk-secret")
    log = front.folder / "access.log"
    assert "/v1/models HTTP/1.1" in until(log.read_text) and "secret" not in log.read_text()


_ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="nbgate")
os.execv(sys.executable, [sys.executable, "-m", "nbgate", "serve", "-c", sys.argv[2]])
"""


def test_nginx_reaches_a_station_on_a_unix_socket_that_systemd_holds(tmp_path: Path) -> None:
    file, path, out = tmp_path / "station.toml", tmp_path / "held.sock", tmp_path / "out"
    server = f'[server]\nworkers = 2\ndata_dir = "{tmp_path}/data"\ntrusted_proxies = ["unix:"]\n'
    file.write_text(f'{server}[logging]\naccess = ""\n{TOML}')
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        held.bind(str(path))
        held.listen()
        front = stack.enter_context(Nginx(tmp_path, f"unix:{path}"))
        for _ in range(2):  # a restart: what came between waits in the queue that systemd holds
            out.write_text("")
            early = socket.create_connection(("127.0.0.1", front.port), timeout=20)
            stack.enter_context(early).sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            argv = [sys.executable, "-c", _ACTIVATED, str(held.fileno()), str(file)]
            with open(out, "ab") as stdout:
                env = clean_env(PYTHONPATH=str(ROOT))
                process = subprocess.Popen(argv, cwd=tmp_path, stdout=stdout, env=env, pass_fds=[held.fileno()])
            try:
                assert early.recv(4096).startswith(b"HTTP/1.1 200 ")
                until(lambda: "curl" in out.read_text())
                assert f" on unix:{path}\n" in out.read_text()
                headers = {"authorization": f"Bearer {NEAR}"}
                assert ask(front.port, "GET", "/v1/models", source="127.0.0.2", headers=headers).status == 200
                assert ask(front.port, "GET", "/v1/models", source="127.0.0.1", headers=headers).status == 403
            finally:
                process.terminate()
                assert process.wait(20) == 0
        assert path.is_socket(), "a socket of systemd's is not ours to remove"


def test_nginx_variants_name_the_sockets_that_the_units_make() -> None:
    unit = (ROOT / "deploy" / "nbgate.socket").read_text()
    assert "# server unix:/run/nbgate.sock;" in SITE.read_text() and "\nListenStream=/run/nbgate.sock\n" in unit
