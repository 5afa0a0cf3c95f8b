"""What `consumerd status` makes of /status: a table of 80 columns, what is wrong, and a screen that redraws itself."""

from typing import Any

import pytest

from consumerd.commands import status as it
from consumerd.errors import ConsumerdError

NOW = 1_700_000_000.0
SENTENCE = (
    "cannot connect to Postgres: connection to server at 10.0.0.7, port 5432 failed: Connection refused, as often"
)
COMMAND = (
    "kafka-consumer-groups --bootstrap-server one:9092,two:9092 --group consumerd.clicks --reset-offsets --execute"
)


def partition(number: int, messages: int = 0, seconds: float = 0.0) -> dict[str, Any]:
    """Make a partition's part."""
    return {
        "topic": "orders",
        "partition": number,
        "checkpoint": 123_456_789,
        "high_watermark": 123_456_789 + messages,
        "lag_messages": messages,
        "lag_seconds": seconds,
        "rows_per_second": 12.5,
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
        "last_commit": NOW - 0.4,
        "rows_per_second": 123_456_789.0,
        "batch_messages": 1200.5,
        "batch_write_seconds": 0.0123,
        "consumed": 1000,
        "written": 900,
        "dead_lettered": {"type": 60, "range": 40},
        "skipped": {},
        "lag_messages": 98_765_432,
        "lag_seconds": 12_345.6,
        "buffered_bytes": 1 << 20,
        "buffer_limit_bytes": 256 << 20,
        "partitions_paused": 0,
        "partitions": [partition(0), partition(1, 7, 1.2), partition(2, 3, 42.0), partition(3, 9, 12.0)],
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
        "reload": {"at": NOW - 60, "successful": True, "error": None},
        "handlers": handlers,
    }


def test_handlers_are_a_table_of_80_columns() -> None:
    """However large the numbers, the table and what is said below it fit; only a command is longer, to be copied."""
    halt = {"reason": "gap", "message": f"{SENTENCE}; type {COMMAND}", "commands": [COMMAND]}
    met = {"message": "Kafka: no broker", "first": NOW - 300, "last": NOW - 200, "count": 12}
    shown = it.text(
        daemon(
            a_name_of_20_letters=handler(),
            idle=handler("waiting", waiting_for={"postgres": SENTENCE}, last_error="Kafka: no broker", errors=[met]),
            clicks=handler("halted", halt=halt, last_error=halt["message"], batch_write_seconds=None),
        ),
        whole=False,
    )
    lines = shown.splitlines()
    assert lines[0] == "consumerd 1.2.3, process 4711, up 11 h 6 min, configuration read 60 s ago"
    assert lines[2].split() == ["HANDLER", "STATE", "PARTS", "LAG", "OLDEST", "ROWS/S", "BATCH", "DEAD"]
    assert lines[3].split(maxsplit=2)[:2] == ["a_name_of_20_letters", "running"]
    assert " ".join(lines[3].split()[2:]) == "4 98.8M 3 h 25 min 123.5M 13 ms 100"
    assert lines[5].split()[:2] == ["clicks", "HALTED"]
    assert [line for line in lines if len(line) > 80] == [f"    {COMMAND}"]
    assert "idle waits for postgres, waiting for 66 min:" in lines
    assert "idle, last error 3 min ago, 12 times:" in lines
    assert "clicks halted 66 min ago (gap):" in lines
    assert "  What to type, as said above:" in lines
    assert not [line for line in lines if line.startswith("clicks, last error")], "the halt is the last error"


def test_a_handler_alone_has_its_partitions() -> None:
    """A named handler's books and partitions are told, those furthest behind first; little lag is no order."""
    lines = it.text(daemon(orders=handler()), whole=True).splitlines()
    table = lines.index(next(line for line in lines if line.startswith("PARTITION")))
    assert [line.split()[0] for line in lines[table + 1 :]] == ["orders:2", "orders:3", "orders:0", "orders:1"]
    assert lines[table + 1].split() == ["orders:2", "3", "42", "s", "12", "123456789", "123456792"]
    assert "orders into sales.orders, as group consumerd.orders" in lines
    assert "dead letters 100 (type 60, range 40)" in lines
    assert "skipped 0" in lines


def test_a_refused_reload_is_told() -> None:
    """The mistakes of a configuration that was not taken stand at the top."""
    status = daemon(orders=handler())
    status["reload"] = {"at": NOW - 60, "successful": False, "error": "orders.toml:3: table.wirte: unknown key"}
    lines = it.text(status, whole=False).splitlines()
    assert lines[0].endswith("the reload 60 s ago was refused:")
    assert lines[1] == "  orders.toml:3: table.wirte: unknown key"


def test_a_line_for_each_handler() -> None:
    """Where nothing can be redrawn each look is a line for each handler."""
    first, second = it.line(daemon(a=handler(), b=handler("halted"))).splitlines()
    assert first[8:] == " a running, 4 partitions, lag 98,765,432 messages (3 h 25 min), 123,456,789 rows/s"
    assert " b halted, " in second


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0101, "11 ms"),
        (1.9, "1 s"),
        (119.9, "119 s"),
        (120, "2 min"),
        (7_199, "119 min"),
        (7_200, "2 h 0 min"),
        (172_799, "47 h 59 min"),
        (180_000, "2 d 2 h"),
        (-3, "0 s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    """A time has the one or two units that matter."""
    assert it.duration(seconds) == text


def test_drawn() -> None:
    """A frame is drawn over the last one, what was there is wiped out; what does not fit is counted."""
    assert it.drawn("one\ntwo", 10, 5) == "\x1b[Hone\x1b[K\ntwo\x1b[K\x1b[J"
    assert it.drawn("1\n2\n3\n4", 10, 4).splitlines()[-1].startswith("4")
    clipped = it.drawn("1\n" + "x" * 25 + "\n3\n4", 10, 5)
    assert clipped.splitlines()[:2] == ["\x1b[H1\x1b[K", "x" * 25 + "\x1b[K"]
    assert "... 2 lines more" in clipped


def test_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is away for a while is said to be, with what it said last, and looked for again."""
    answers = iter(["first", ConsumerdError("no daemon answers"), "second"])
    monkeypatch.setattr(it, "INTERVAL", 0.0)

    def look() -> Any:  # noqa: ANN401 - what the test answers
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lines = it.watch(look, str)
    assert next(lines) == "first\n"
    assert next(lines)[8:] == " no daemon answers\n"
    assert next(lines) == "second\n"


def test_watch_waits_for_no_daemon_that_was_never_there() -> None:
    """The first look fails as it does without --watch."""

    def look() -> Any:  # noqa: ANN401
        raise ConsumerdError("no daemon answers")

    with pytest.raises(ConsumerdError):
        next(it.watch(look, str))
