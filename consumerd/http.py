"""What the outside asks: /metrics, /healthz, /readyz, /status, and / for people.

The standard library's threading server: it needs no dependency, and it answers though the event loop should hang, which
is what /healthz tells. Everything else is computed on the loop, so that no page sees a half-made change. The page at /
is one file, `page.html`, that asks for /status itself; the browser is told to run and load nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from consumerd import metrics
from consumerd.errors import ConsumerdError

if TYPE_CHECKING:
    from collections.abc import Callable

LOOP_TIMEOUT = 5.0
"""Seconds that the loop has to answer, before the process is not healthy."""

Page = tuple[int, str, bytes]
"""Status code, content type, body."""
HTML = "text/html; charset=utf-8"
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""Of every answer."""


class HttpServer:
    """Serves on its own thread until closed; `status` is called on the event loop."""

    def __init__(self, host: str, port: int, status: Callable[[], dict[str, Any]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._status = status
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, kind, body = server.answer(self.path.partition("?")[0])
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                for name, value in HEADERS.items():
                    self.send_header(name, value)
                if kind == HTML:
                    self.send_header("Content-Security-Policy", policy(body))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                """Say nothing: a line for each scrape is noise."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            way = "each daemon needs a port of its own" if taken else "write an address of this host that it may use"
            raise ConsumerdError(f"cannot listen on {host}:{port} (daemon.listen): {error.strerror}; {way}") from error
        self._server.daemon_threads = True
        self.address = f"{host}:{self._server.server_address[1]}"
        self.on_loopback = ip_address(self._server.socket.getsockname()[0]).is_loopback
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> Page:
        """Return a page; runs on a thread of the server."""
        if path == "/":
            return 200, HTML, files("consumerd").joinpath("page.html").read_bytes()
        pages = {"/metrics": _metrics, "/healthz": _health, "/readyz": _ready, "/status": _status_page}
        page = pages.get(path)
        if page is None:
            return 404, "text/plain", b"one of: / " + " ".join(pages).encode() + b"\n"
        try:
            return asyncio.run_coroutine_threadsafe(self._page(page), self._loop).result(LOOP_TIMEOUT)
        except (TimeoutError, RuntimeError):
            return 503, "text/plain", b"the event loop does not answer\n"

    async def _page(self, page: Callable[[dict[str, Any]], Page]) -> Page:
        return page(self._status())


def policy(page: bytes) -> str:
    """Return what a browser may do on a page: run its own script and style, known by their hashes, and ask for /status.

    (Content Security Policy Level 3, 2.4.) Whatever a name or a sentence should bring into it is not run, nor loaded.
    """
    own = [
        f"{kind}-src {' '.join(_hash(text) for text in re.findall(rb'<%b>(.*?)</%b>' % (tag, tag), page, re.DOTALL))}"
        for kind, tag in (("script", b"script"), ("style", b"style"))
    ]
    others = ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return "; ".join(["default-src 'none'", *own, *others])


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


def _metrics(_: dict[str, Any]) -> Page:
    return 200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry)


def _health(_: dict[str, Any]) -> Page:
    return 200, "text/plain", b"ok\n"


def _ready(status: dict[str, Any]) -> Page:
    """Return 200 when every handler has joined its group and none is halted."""
    waiting = [f"{name}: {handler['state']}" for name, handler in status["handlers"].items() if not handler["ready"]]
    if waiting:
        return 503, "text/plain", "\n".join(waiting).encode() + b"\n"
    return 200, "text/plain", b"ready\n"


def _status_page(status: dict[str, Any]) -> Page:
    return 200, "application/json", orjson.dumps(status, option=orjson.OPT_INDENT_2) + b"\n"
