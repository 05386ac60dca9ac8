"""nginx with the shipped site file, on a free port and in a folder of its own."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest
from station import ROOT, until

SITE = ROOT / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
needs_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed (Debian: nginx-light)")

_MAIN = """
{user}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


def free_port() -> int:
    """Find a port that nobody uses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def swap(text: str, old: str, new: str) -> str:
    """Replace what the shipped file must hold exactly once."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {SITE}"
    return text.replace(old, new)


class Nginx:
    """One nginx in front of `upstream` (host:port or unix:path)."""

    def __init__(self, folder: Path, upstream: str, site: str | None = None) -> None:
        assert NGINX
        self.folder = folder
        self.port = free_port()
        text = site or SITE.read_text()
        text = swap(text, "    listen 80 default_server;", f"    listen 127.0.0.1:{self.port} default_server;")
        text = swap(text, "    listen [::]:80 default_server;  ", "    # ")
        text = swap(text, "    server 127.0.0.1:8080;", f"    server {upstream};")
        text = swap(text, "/var/log/nginx/nbgate.log", f"{folder}/access.log")
        (folder / "site.conf").write_text(text)
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(_MAIN.format(folder=folder, user=user))
        argv = [NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
        with open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(argv, stdout=err, stderr=err)

    def __enter__(self) -> Self:
        try:
            until(lambda: self._listens() or self.process.poll() is not None, what="nginx's start")
            assert self.process.poll() is None, (self.folder / "err").read_text()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(20)


class Answer:
    """One whole answer."""

    def __init__(self, found: http.client.HTTPResponse) -> None:
        self.status = found.status
        self.headers = {name.lower(): value for name, value in found.getheaders()}
        self.body = found.read()


def ask(port: int, method: str, path: str, source: str = "127.0.0.1", **more: Any) -> Answer:
    """Send one request from a loopback address; `body` and `headers` as http.client has them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=(source, 0))
    try:
        connection.request(method, path, **more)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def exchange(port: int, request: bytes, last: bytes = b"\0") -> bytes:
    """Send bytes as they are, and read until the end or until `last`."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(request)
        found = b""
        while not found.endswith(last) and (data := sock.recv(65536)):
            found += data
        return found
