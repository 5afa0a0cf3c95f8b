"""`consumerd status`: what the running daemon says of itself, asked over HTTP, for a terminal of 80 columns."""

from __future__ import annotations

import http.client
import time
from contextlib import closing
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import orjson

from consumerd.commands.tables import aligned
from consumerd.errors import ConsumerdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from consumerd.config import DaemonConfig

    Status = Mapping[str, Any]

ANSWER_TIMEOUT = 10.0
"""Seconds to answer: the daemon gives its event loop five, and says so when that hangs."""
INTERVAL = 2.0
"""Seconds between two looks of `--watch`."""
WIDTH = 80
PRESENT = 5.0
"""Seconds of lag that are not worth an order: rows would change places at each look."""
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""To a screen of its own without a cursor, and back to what was there (xterm's control sequences)."""
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a daemon that listens anywhere is
UNITS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"))


class NoSuchHandler(ConsumerdError):  # noqa: N818 - as its root's other kinds
    """The daemon has none of that name."""


def ask(daemon: DaemonConfig, handler: str | None = None) -> Status:
    """Return what /status says, of one handler if it is named; raises ConsumerdError, NoSuchHandler."""
    host, port = ANYWHERE.get(daemon.listen_host, daemon.listen_host), daemon.listen_port
    if port == 0:
        raise ConsumerdError("daemon.listen has port 0, and which port that became is in the log alone: write one")
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=ANSWER_TIMEOUT)) as connection:
            connection.request("GET", "/status")
            answer = connection.getresponse()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConsumerdError(
            f"no daemon answers at {daemon.listen} (daemon.listen): {why}; start it with `consumerd run`"
        ) from error
    if answer.status == http.client.SERVICE_UNAVAILABLE:
        raise ConsumerdError(f"the daemon at {daemon.listen} is there, but {body.decode(errors='replace').strip()}")
    try:
        status: dict[str, Any] = orjson.loads(body)
        handlers = status["handlers"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ConsumerdError(f"what answers at {daemon.listen} (daemon.listen) is not consumerd") from error
    if handler is None:
        return status
    if handler not in handlers:
        raise NoSuchHandler(f"the daemon runs no handler {handler}; it runs: {', '.join(sorted(handlers))}")
    return {**status, "handlers": {handler: handlers[handler]}}


def text(status: Status, *, whole: bool) -> str:
    """Return the handlers as a table, and below it what is wrong; `whole` adds the partitions."""
    now, handlers = status["now"], status["handlers"]
    reload, ago = status["reload"], duration(now - status["reload"]["at"])
    read = f"configuration read {ago} ago" if reload["successful"] else f"the reload {ago} ago was refused:"
    up = duration(status["uptime_seconds"])
    lines = [f"consumerd {status['version']}, process {status['pid']}, up {up}, {read}"]
    lines += [] if reload["successful"] else _prose(reload["error"])
    head = ("HANDLER", "STATE", "PARTS", "LAG", "OLDEST", "ROWS/S", "BATCH", "DEAD")
    rows = [head, *(_row(name, handler) for name, handler in handlers.items())]
    lines += ["", *aligned(rows, right=range(2, 8))]
    for name, handler in handlers.items():
        lines += _troubles(name, handler, now)
        lines += _whole(handler, now) if whole else []
    return "\n".join(lines)


def as_json(status: Status) -> str:
    """Return it as it was told, in one line."""
    return orjson.dumps(status).decode()


def line(status: Status) -> str:
    """Return a line for each handler."""
    clock = time.strftime("%H:%M:%S", time.localtime(status["now"]))
    return "\n".join(
        f"{clock} {name} {each['state']}, {len(each['partitions'])} partitions, lag {each['lag_messages']:,} messages "
        f"({duration(each['lag_seconds'])}), {each['rows_per_second']:,.0f} rows/s"
        for name, each in status["handlers"].items()
    )


def watch(look: Callable[[], Status], show: Callable[[Status], str], *, screen: bool = False) -> Iterator[str]:
    """Look again and again; a daemon that is away for a while is said to be. For a screen each look is drawn on it.

    The first look raises ConsumerdError: what was never there is not waited for.
    """
    status = look()
    while True:
        frame = show(status)
        yield drawn(frame, *get_terminal_size()) if screen else f"{frame}\n"
        while True:
            time.sleep(INTERVAL)
            try:
                status = look()
                break
            except ConsumerdError as error:
                said = f"{time.strftime('%H:%M:%S')} {error}"
                yield drawn(f"{said}\n\n{frame}", *get_terminal_size()) if screen else f"{said}\n"


def drawn(frame: str, columns: int, rows: int) -> str:
    """Return what draws a frame over the one before; what does not fit on the screen is counted in its last line."""
    lines = frame.splitlines()
    heights = [max(1, -(-len(each) // columns)) for each in lines]
    if sum(heights) > rows:
        fit = 0
        while sum(heights[: fit + 1]) < rows:
            fit += 1
        lines = [*lines[:fit], f"... {len(lines) - fit} lines more: name a handler, or make the window larger"]
    return HOME + f"{REST_OF_LINE}\n".join(lines) + REST_OF_LINE + REST_OF_SCREEN


def duration(seconds: float) -> str:
    """Return a time in the two units that matter: `12 ms`, `42 s`, `9 min`, `3 h 12 min`, `5 d 3 h`."""
    if 0 < seconds < 1:
        return f"{-(-seconds * 1000 // 1):.0f} ms"
    if seconds < 120:  # noqa: PLR2004 - until two of the next unit
        return f"{max(0, int(seconds))} s"
    if seconds < 7_200:  # noqa: PLR2004
        return f"{int(seconds) // 60} min"
    large, name, small, of = UNITS[seconds < 172_800]  # noqa: PLR2004
    return f"{int(seconds) // large} {name} {int(seconds) % large // small} {of}"


def _row(name: str, handler: Status) -> tuple[str, ...]:
    write = handler["batch_write_seconds"]
    return (
        name,
        handler["state"].upper() if handler["halt"] else handler["state"],
        str(len(handler["partitions"])),
        _short(handler["lag_messages"]),
        duration(handler["lag_seconds"]),
        _short(handler["rows_per_second"]),
        "-" if write is None else duration(write),
        _short(sum(handler["dead_lettered"].values())),
    )


def _short(number: float) -> str:
    """Return a number in at most seven characters."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:,.0f}"


def _troubles(name: str, handler: Status, now: float) -> Iterator[str]:
    """Say what a handler's state hangs on, and its last error if that is another."""
    since = duration(now - handler["state_since"])
    said = []
    if halt := handler["halt"]:
        said.append(halt["message"])
        yield from ("", f"{name} halted {since} ago ({halt['reason']}):", *_prose(halt["message"]))
        if halt["commands"]:
            yield from ("  What to type, as said above:", *(f"    {command}" for command in halt["commands"]))
    for source, sentence in handler["waiting_for"].items():
        said.append(sentence)
        yield from ("", f"{name} waits for {source}, {handler['state']} for {since}:", *_prose(sentence))
    if handler["errors"] and not any(handler["last_error"] in each for each in said):
        last = handler["errors"][0]
        times = f", {last['count']:,} times" if last["count"] > 1 else ""
        yield from ("", f"{name}, last error {duration(now - last['last'])} ago{times}:", *_prose(last["message"]))


def _whole(handler: Status, now: float) -> Iterator[str]:
    """Tell the rest of what there is of a handler: its books, and its partitions, the largest lag first."""
    commit = handler["last_commit"]
    mib = 1 << 20
    memory = f"{handler['buffered_bytes'] / mib:.1f} MiB of {handler['buffer_limit_bytes'] / mib:.0f} MiB"
    yield ""
    yield from _prose(f"{', '.join(handler['topics'])} into {handler['table']}, as group {handler['group_id']}", "")
    yield from _prose(f"consumed {handler['consumed']:,}, written {handler['written']:,} rows since the start", "")
    yield from _prose(f"dead letters {_by_reason(handler['dead_lettered'])}", "")
    yield from _prose(f"skipped {_by_reason(handler['skipped'])}", "")
    last = "no commit yet" if commit is None else f"last commit {duration(now - commit)} ago"
    yield f"{last}; memory {memory}; {handler['partitions_paused']} partitions not read now"
    if handler["partitions"]:
        head = ("PARTITION", "LAG", "OLDEST", "ROWS/S", "CHECKPOINT", "END")
        rows = [head, *(_partition(each) for each in sorted(handler["partitions"], key=_lag))]
        yield from ("", *aligned(rows, right=range(1, 6)))


def _partition(it: Status) -> tuple[str, ...]:
    high = it["high_watermark"]
    return (
        f"{it['topic']}:{it['partition']}",
        f"{it['lag_messages']:,}",
        duration(it["lag_seconds"]),
        f"{it['rows_per_second']:,.0f}",
        f"{it['checkpoint']}",
        "not known" if high is None else f"{high}",
    )


def _lag(it: Status) -> tuple[float, int, str, int]:
    """Order by lag; little of it is none, and one of an unknown age counts by its messages."""
    seconds, messages = it["lag_seconds"], it["lag_messages"]
    return -seconds if seconds >= PRESENT else 0, 0 if seconds else -messages, it["topic"], it["partition"]


def _by_reason(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items(), key=lambda it: -it[1]))
    return f"{sum(counts.values()):,}" + (f" ({reasons})" if reasons else "")


def _prose(sentence: str, indent: str = "  ") -> list[str]:
    """Return lines that a terminal does not break; a word that is longer stays whole, to be copied."""
    return wrap(
        sentence,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
