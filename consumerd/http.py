"""What the outside asks: /metrics, /healthz, /readyz, /status.

The standard library's threading server: it needs no dependency, and it answers though the event loop should hang, which
is what /healthz tells. Everything else is computed on the loop, so that no page sees a half-made change.
"""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                """Say nothing: a line for each scrape is noise."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConsumerdError(
                f"cannot listen on {host}:{port} (daemon.listen): {error.strerror}; each daemon needs a port of its own"
            ) from error
        self._server.daemon_threads = True
        self.address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> Page:
        """Return a page; runs on a thread of the server."""
        pages = {"/metrics": _metrics, "/healthz": _health, "/readyz": _ready, "/status": _status_page}
        page = pages.get(path)
        if page is None:
            return 404, "text/plain", b"one of: " + " ".join(pages).encode() + b"\n"
        try:
            return asyncio.run_coroutine_threadsafe(self._page(page), self._loop).result(LOOP_TIMEOUT)
        except (TimeoutError, RuntimeError):
            return 503, "text/plain", b"the event loop does not answer\n"

    async def _page(self, page: Callable[[dict[str, Any]], Page]) -> Page:
        return page(self._status())


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
