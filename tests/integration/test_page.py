"""The page at / in a browser: what it makes of /status, and what it lets nobody make of it."""

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import orjson
import pytest

from consumerd import metrics
from consumerd.http import HttpServer
from tests.servers.browser import Dom, chromium, dom

NOW = 1_700_000_000.0
MARKUP = '<img src="x" onerror="document.body.id = \'owned\'"><script>document.body.id = "owned"</script>&lt;b&gt;'
LONG = "t" * 249


def partition(topic: str, number: int, messages: int = 0, seconds: float = 0.0) -> dict[str, Any]:
    """Make a partition's part."""
    return {
        "topic": topic,
        "partition": number,
        "checkpoint": 987_654_321,
        "high_watermark": 987_654_321 + messages,
        "lag_messages": messages,
        "lag_seconds": seconds,
        "rows_per_second": 60.5,
    }


def handler(state: str = "running", **more: object) -> dict[str, Any]:
    """Make a handler's part."""
    return {
        "group_id": "consumerd.orders",
        "topics": ["orders"],
        "table": "sales.orders",
        "state": state,
        "state_since": NOW - 4000,
        "ready": True,
        "halt": None,
        "waiting_for": {},
        "last_error": None,
        "errors": [],
        "last_commit": NOW - 7.2,
        "rows_per_second": 12_345.6,
        "batch_messages": 1200.4,
        "batch_write_seconds": 0.0123,
        "consumed": 98_765_432,
        "written": 98_765_000,
        "dead_lettered": {"type": 30, "range": 120},
        "skipped": {"where": 5},
        "lag_messages": 512,
        "lag_seconds": 130.0,
        "buffered_bytes": 12 << 20,
        "buffer_limit_bytes": 256 << 20,
        "partitions_paused": 0,
        "partitions": [partition("orders", 0)],
        **more,
    }


def daemon(**handlers: dict[str, Any]) -> dict[str, Any]:
    """Make what /status says."""
    return {
        "version": "1.2.3",
        "pid": 4711,
        "started": NOW - 40_000,
        "now": NOW,
        "uptime_seconds": 40_000.0,
        "reload": {"at": NOW - 40_000, "successful": True, "error": None},
        "handlers": handlers,
    }


def hostile() -> dict[str, Any]:
    """Make a handler that halted, with markup in all that it says, and long names."""
    return handler(
        "halted",
        halt={"reason": MARKUP, "message": MARKUP, "commands": [f"consumerd resume {MARKUP}", "another"]},
        errors=[{"message": f"error {MARKUP}", "first": NOW - 9, "last": NOW, "count": 1}],
        topics=[MARKUP, LONG],
        table=MARKUP,
        group_id=MARKUP,
        dead_lettered={MARKUP: 1},
        last_commit=None,
        partitions=[partition(MARKUP, 0), partition(LONG, 0, 10**12, 10.0**7)],
    )


def three() -> dict[str, Any]:
    """Make a daemon of three handlers: one runs, one waits, one has halted."""
    many = [partition("orders", number, number * 3, 10.0 * max(0, number - 150)) for number in range(200)]
    met = [
        {"message": "Postgres is away", "first": NOW - 60, "last": NOW, "count": 9},
        {"message": "Kafka was away", "first": NOW - 600, "last": NOW - 300, "count": 2},
    ]
    waiting = handler(
        "waiting", waiting_for={"postgres": "Postgres is away"}, errors=met, batch_messages=None, partitions=[]
    )
    return daemon(orders=handler(partitions=many), views=waiting, **{MARKUP: hostile()})


@pytest.fixture(scope="module")
def page() -> Dom:
    """Give the page as the daemon's own server gives it."""

    async def shown() -> Dom:
        server = HttpServer("127.0.0.1", 0, three)
        try:
            return await asyncio.to_thread(dom, f"http://{server.address}/")
        finally:
            await asyncio.to_thread(server.close)

    chromium()
    return asyncio.run(shown())


def test_what_the_daemon_says_is_shown(page: Dom) -> None:
    """The worst handler is first; each has its state in words, what it waits for, its books, and what failed before."""
    assert page.texts("h2") == [f"{MARKUP} halted for 66 min", "views waiting for 66 min", "orders running for 66 min"]
    assert page.texts("title") == ["1 halted, 1 waiting, 1 running - consumerd"]
    assert page.texts("div", "said")[1] == "Waits for postgres: Postgres is away"
    assert page.texts("summary")[1] == "Last error 5 min ago"
    (before,) = (text for text in page.texts("li") if "Kafka" in text)
    assert re.fullmatch(r"\S+ \S+, 5 min ago, 2 times since \S+ \S+: Kafka was away", before)
    facts = list(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert ("Last commit", "none yet") in facts
    assert ("A batch, on average", "none lately") in facts
    assert dict(facts[-11:]) == {
        "Rows/s": "12,346",
        "Lag": "512 messages",
        "Oldest not written": "2 min",
        "A batch, on average": "1,200 messages in 13 ms",
        "Last commit": "7 s ago",
        "Partitions": "200",
        "Memory": "12 MiB of 256 MiB",
        "Consumed": "98,765,432",
        "Rows written": "98,765,000",
        "Dead letters": "150 (range 120, type 30)",
        "Skipped": "5 (where 5)",
    }


def test_each_state_has_its_place() -> None:
    """The page orders and counts handlers by each state that there is."""
    page = files("consumerd").joinpath("page.html").read_text(encoding="utf-8")
    (listed,) = re.findall(r"const FIRST = (\[.*\]);", page)
    assert sorted(orjson.loads(listed)) == sorted(metrics.STATES)


def test_nothing_that_is_said_becomes_markup(page: Dom) -> None:
    """Markup in names and sentences is text on the page, and no element, attribute or script of it."""
    assert f"Halted ({MARKUP}): {MARKUP}" in page.texts("p")
    assert page.texts("code") == [f"consumerd resume {MARKUP}", "another"]
    assert f"1 ({MARKUP} 1)" in page.texts("dd")
    assert f"{MARKUP}:0" in page.texts("td")
    assert [each.tag for each in page.elements if each.tag in {"img", "b"}] == []
    assert len(page.texts("script")) == 1
    assert [each.attributes.get("id") for each in page.elements if each.tag == "body"] == [None]


def test_many_partitions_are_folded(page: Dom) -> None:
    """Of 200 partitions the ten that are furthest behind are seen, the others one click away."""
    seen = [text for text in page.texts("tr", outside="details") if text.startswith("orders")]
    assert [int(text[7:10]) for text in seen] == list(range(199, 189, -1))
    assert seen[0] == "orders:1995978 min61987654321987654918"
    assert page.texts("summary")[-1] == "190 more, with a lag of 567 messages at most"
    assert len([text for text in page.texts("tr") if text.startswith("orders")]) == 200


async def test_a_daemon_that_is_gone_is_said_to_be() -> None:
    """When the daemon no longer answers, the page says so and since when, and keeps what it knew."""
    chromium()
    loop = asyncio.get_running_loop()
    server: HttpServer

    def once() -> dict[str, Any]:
        loop.call_soon(server.close)
        return daemon(orders=handler())

    server = HttpServer("127.0.0.1", 0, once)
    page = await asyncio.to_thread(dom, f"http://{server.address}/", milliseconds=15_000)
    (said,) = (each.text for each in page.elements if each.attributes.get("id") == "answer")
    assert re.fullmatch(
        r"The daemon does not answer \(.+\): none since \S+ \S+, and what is below was said then\.", said
    )
    assert page.texts("h2") == ["orders running for 66 min"]


def test_it_fits_a_narrow_window() -> None:
    """At 400 px nothing is wider than the window, whatever the names are."""
    chromium()
    with serving(daemon(orders=hostile(), others=handler())) as url:
        page = dom(f"{url}frame")
    (measured,) = (str(each.attributes["id"]) for each in page.elements if each.tag == "body")
    needed, there = map(int, measured.split())
    assert needed <= there <= 400


async def test_the_browser_is_told_to_load_nothing_else() -> None:
    """The policy allows the page's own script and style by their hashes; nothing on it comes from elsewhere."""
    server = HttpServer("127.0.0.1", 0, dict)
    try:
        headers, body = await asyncio.to_thread(get, server.address)
    finally:
        await asyncio.to_thread(server.close)
    policy = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind])
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    assert re.findall(r"https?://|//\w|\son\w+=|innerHTML|insertAdjacent|document\.write|\bstyle=", body) == []


def get(address: str) -> tuple[dict[str, str], str]:
    """Return the headers and the body of /."""
    connection = HTTPConnection(address, timeout=10)
    connection.request("GET", "/")
    answer = connection.getresponse()
    return dict(answer.getheaders()), answer.read().decode()


FRAME = b"""<!doctype html><title>A window of 400 px</title><body>
<iframe src="/" style="width: 400px; height: 1000px; border: 0"></iframe>
<script>
setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument.documentElement;
  document.body.id = `${page.scrollWidth} ${page.clientWidth}`;
}, 1000);
</script>
"""
"""A browser's own window is no narrower than 500 px."""


@contextmanager
def serving(status: dict[str, Any]) -> Iterator[str]:
    """Serve the page without the daemon's policy, which would keep it out of a frame."""
    bodies = {"/": files("consumerd").joinpath("page.html").read_bytes(), "/frame": FRAME}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if self.path in bodies else "application/json")
            self.end_headers()
            self.wfile.write(bodies.get(self.path, orjson.dumps(status)))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
