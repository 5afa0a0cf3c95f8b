"""What one sees from outside: metrics, pages and logs; and that no value of a row is ever among it."""

import json
import os
import pty
import re
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, get_args

import pytest
from confluent_kafka import Producer

from consumerd.errors import HaltReason, PoisonReason, Source
from tests.acceptance.stream import letters
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute, locked

METRICS_PAGE = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
TIMEOUT = 30  # seconds for anything that a test waits for
MESSAGES = 10_000

HALTS = get_args(HaltReason)
POISON = get_args(PoisonReason)
COUNTERS: dict[str, list[dict[str, str]]] = {
    "fenced_writes_total": [{}],
    "flushes_total": [{"reason": r} for r in ("messages", "bytes", "age", "pressure", "revoke", "drain", "tail")],
    "halts_total": [{"reason": reason} for reason in HALTS],
    "isolations_total": [{}],
    "messages_dead_lettered_total": [{"reason": reason} for reason in POISON],
    "messages_skipped_total": [{"reason": reason} for reason in ("where", "tombstone", "exists", *POISON)],
    "retries_total": [{"cause": cause} for cause in get_args(Source)],
    "batch_messages_count": [{}],
    "batch_bytes_count": [{}],
    "batch_write_duration_seconds_count": [{}],
    "end_to_end_latency_seconds_count": [{}],
    "connection_wait_seconds_count": [{}],
}
"""Every counter of a handler with all its label values: there before anything happened, at 0."""

GAUGES = (
    "partitions_assigned",
    "partitions_paused",
    "buffered_bytes",
    "buffer_limit_bytes",
    "last_commit_timestamp_seconds",
)
PARTITION_SERIES = (
    "messages_consumed_total",
    "rows_written_total",
    "lag_messages",
    "lag_seconds",
    "checkpoint_offset",
)


def handler(topic: str, table: str, /, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler of ``topic`` into ``table``, in append unless told otherwise."""
    return {
        "topics": [topic],
        "table": {"name": table, "write": "append"},
        "dead_letter": {"create": True, "topic": f"letters-{secrets.token_hex(4)}"},
        **more,
    }


def send(kafka: KafkaServer, topic: str, values: Iterable[bytes], partitions: int = 1) -> None:
    """Produce values, in turns to each partition."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number, value in enumerate(values):
        producer.produce(topic, value, key=b"key", partition=number % partitions)
    assert producer.flush(TIMEOUT) == 0


def series(name: str, **labels: str) -> str:
    """Return a sample's name as ``Daemon.metrics`` has it."""
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"consumerd_{name}{{{inside}}}"


def settle(daemon: Daemon, name: str, count: int) -> dict[str, Any]:
    """Wait until a handler has written or dead-lettered so many, and its lag is 0; return its status."""

    def settled() -> bool:
        now = daemon.status()["handlers"][name]
        done = now["written"] + sum(now["dead_lettered"].values())
        known = [partition["high_watermark"] is not None for partition in now["partitions"]]
        return done >= count and now["lag_messages"] == 0 and known != [] and all(known)

    wait_until(settled, TIMEOUT, f"{count} messages of {name}")
    answer: dict[str, Any] = daemon.status()["handlers"][name]
    return answer


def documented(table: str) -> set[str]:
    """Return the keys in the first column of a table."""
    return {key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    """Return the log's lines, each of which must be JSON."""
    return [json.loads(line) for line in daemon.logs().splitlines()]


def test_every_series_is_there_before_anything_happens(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Counters begin at 0 with all label values, gauges are set, an idle handler has no lag."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic(partitions=2)
    run = daemon({"idle": handler(name, "t")})
    idle = {series(metric, handler="idle", **labels): 0.0 for metric, each in COUNTERS.items() for labels in each}
    wait_until(lambda: len(run.status()["handlers"]["idle"]["partitions"]) == 2, TIMEOUT, "both partitions")
    metrics = run.metrics()
    assert idle == {sample: metrics.get(sample) for sample in idle}
    assert [] == [gauge for gauge in GAUGES if series(gauge, handler="idle") not in metrics]
    partitions = [
        series(metric, handler="idle", topic=name, partition=str(number))
        for metric in PARTITION_SERIES
        for number in range(2)
    ]
    assert dict.fromkeys(partitions, 0.0) == {sample: metrics.get(sample) for sample in partitions}
    states = ("starting", "waiting", "running", "stopping", "stopped", "halted")
    expected = [float(state == "running") for state in states]
    assert expected == [metrics.get(series("handler_state", handler="idle", state=state)) for state in states]
    assert 2.0 == metrics[series("partitions_assigned", handler="idle")]
    assert 0.0 < metrics[series("buffer_limit_bytes", handler="idle")]
    assert 1.0 == metrics[series("build_info", version=run.status()["version"])]
    assert 0.0 == metrics[series("partitions_paused", handler="idle")]
    assert 1.0 == metrics["consumerd_config_last_reload_successful"]
    assert run.status()["reload"]["at"] == metrics["consumerd_config_last_reload_success_timestamp_seconds"]


def test_the_books_balance_and_no_message_has_a_line(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """After 10,000 messages consumed is written plus dead-lettered, lag is 0, and the log has a few lines of state."""
    execute(database, "CREATE TABLE t (id bigint NOT NULL)")
    name, letters = topic(partitions=2), MESSAGES // 100
    values = [b'{"id": %d}' % number if number % 100 else b"{}" for number in range(MESSAGES)]
    run = daemon({"books": handler(name, "t")}, {"log": {"heartbeat": "1s"}})
    send(kafka, name, values, partitions=2)
    status = settle(run, "books", MESSAGES)
    assert [(MESSAGES - letters,)] == execute(database, "SELECT count(*) FROM t")
    assert (MESSAGES, MESSAGES - letters, {"missing": letters}) == (
        status["consumed"],
        status["written"],
        status["dead_lettered"],
    )
    metrics = run.metrics()
    found: Counter[str] = Counter()
    for sample, value in metrics.items():
        found[sample.partition("{")[0].removeprefix("consumerd_")] += int(value)
    assert MESSAGES == found["messages_consumed_total"]
    assert MESSAGES == found["rows_written_total"] + found["messages_dead_lettered_total"]
    assert letters == metrics[series("messages_dead_lettered_total", handler="books", reason="missing")]
    assert MESSAGES == found["checkpoint_offset"]
    assert (0, 0) == (found["lag_messages"], found["lag_seconds"])
    assert MESSAGES == found["batch_messages_sum"]
    assert found["batch_messages_count"] == found["flushes_total"] == found["connection_wait_seconds_count"]
    assert 0 < found["last_commit_timestamp_seconds"]

    wait_until(lambda: run.logs().count('"heartbeat"') >= 3, TIMEOUT, "heartbeats")
    logged = lines(run)
    beat = [line for line in logged if line["message"] == "heartbeat"][-1]
    facts = ("handler", "state", "written", "dead_lettered", "skipped", "lag_messages", "lag_seconds")
    assert ("books", "running", MESSAGES - letters, letters, 0, 0, 0.0) == tuple(beat[fact] for fact in facts)
    assert 0 < beat["rows_per_second"]
    others = [line for line in logged if line["message"] != "heartbeat"]
    assert len(others) < 20, Counter(line["message"] for line in others)


def test_lag_is_what_is_not_written(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """While a table is locked lag_messages counts up and lag_seconds ages; both are 0 once it is written."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic()
    run = daemon({"lagging": handler(name, "t", batch={"max_age": "100ms"})})
    labels = {"handler": "lagging", "topic": name, "partition": "0"}
    messages, seconds = series("lag_messages", **labels), series("lag_seconds", **labels)
    with locked(database, "t"):
        send(kafka, name, [b'{"id": 1}'] * 7)
        wait_until(lambda: run.metrics()[messages] == 7 and run.metrics()[seconds] >= 1, TIMEOUT, "lag")
        assert run.metrics()[seconds] < TIMEOUT
        assert 200 == run.get("/readyz")[0]
    settle(run, "lagging", 7)
    assert (0.0, 0.0) == (run.metrics()[messages], run.metrics()[seconds])


def test_pages_say_what_is(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Each page answers with its kind of content, any other path with 404; logs without a terminal are JSON."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic()
    run = daemon({"pages": handler(name, "t")})
    send(kafka, name, [b'{"id": 1}'])
    status = settle(run, "pages", 1)
    assert (200, "ok\n") == run.get("/healthz")
    assert (200, "ready\n") == run.get("/readyz")
    assert (404, "one of: / /metrics /healthz /readyz /status\n") == run.get("/nothing")
    assert run.get("/")[1].startswith("<!doctype html>")
    assert 200 == run.get("/metrics?name[]=x")[0]
    assert run.process.pid == run.status()["pid"]
    assert ("running", True, None, {}) == tuple(status[key] for key in ("state", "ready", "halt", "waiting_for"))
    assert [
        {
            "topic": name,
            "partition": 0,
            "checkpoint": 1,
            "high_watermark": 1,
            "lag_messages": 0,
            "lag_seconds": 0.0,
            "rows_per_second": status["rows_per_second"],
        }
    ] == status["partitions"]
    process, handlers = re.findall(r"\| key[^|]*\|[^|]*\|\n\|---\|---\|\n((?:\|.*\n)+)", METRICS_PAGE)
    assert set(run.status()) == documented(process)
    assert set(status) == documented(handlers)
    assert 0 == run.stop()
    logged = lines(run)
    assert [] == [line for line in logged if not {"time", "level", "logger", "message"} <= line.keys()]
    assert all(datetime.fromisoformat(line["time"]).utcoffset() is not None for line in logged)
    said = [line["message"] for line in logged if line.get("handler") == "pages"]
    assert ["running", "stopping", "stopped"] == [word for word in said if word in {"running", "stopping", "stopped"}]


def test_a_terminal_gets_readable_lines(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """On a terminal a line is time, level, handler, words and fields, not JSON."""
    execute(database, "CREATE TABLE t (id bigint)")
    run = daemon({"seen": handler(topic(), "t")})
    run.stop()
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "consumerd", "run", "-c", str(run.config)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    os.set_blocking(master, False)
    text = ""

    def runs() -> bool:
        nonlocal text
        with suppress(BlockingIOError):
            text += os.read(master, 65_536).decode()
        return "seen: running" in text

    try:
        wait_until(runs, TIMEOUT, "the line that says it runs")
        process.terminate()
        assert 0 == process.wait(TIMEOUT)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    readable = re.compile(r"\d\d:\d\d:\d\d (debug|info|warning|error) (\S+: )?\S.*")
    complete = text.split("\r\n")[:-1]
    assert [] == [line for line in complete if not readable.fullmatch(line)]


SECRETS: Sequence[str] = tuple(f"secret{secrets.token_hex(6)}" for _ in range(12))
NUMBER = "987654321987"  # a secret in number columns
TABLE = """\
CREATE TABLE {} (
    id bigint, title text CHECK (title NOT LIKE 'bad%'), short varchar(20), small smallint, at timestamptz, u uuid,
    doc jsonb, amount numeric(12, 2), flag boolean, n bigint CHECK (n < 1000)
)"""
FAILURES = (
    '{"id": 1, "title": "%s", "short": "%s"}',  # repeated: a unique index refuses it
    '{"id": "%s"}',
    '{"id": 2, "short": "%s%s"}',
    '{"id": 3, "title": "bad%s"}',
    '{"id": 4, "n": NUMBER}',
    '{"id": 5, "small": NUMBER}',
    '{"id": 6, "title": "a\\u0000%s"}',
    '{"id": 7, "doc": {"%s": "a\\u0000%s"}}',
    '{"id": 8, "at": "%s"}',
    '{"id": 9, "u": "%s"}',
    '{"id": 10, "amount": "%s"}',
    '{"id": 11, "amount": NUMBERNUMBER}',
    '{"id": 12, "flag": "%s"}',
    '{"id": 13, "title": {"%s": "%s"}}',
    '{"id": 14, "title": "%s", "doc": NaN}',
    '{"id": 15, "title": "\\ud800%s"}',
    '{"id": 16, "doc": "%s", "n": 1NUMBER}',
    '"%s"',
    '["%s", NUMBER]',
    "%s",
)


@pytest.mark.parametrize("write", ["append", "upsert"])
def test_no_value_of_a_row_is_seen_outside(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, write: str
) -> None:
    """Whatever fails and wherever, secrets of rows are in their letters' values and in no log, page or header."""
    execute(database, TABLE.format("t") + "; CREATE UNIQUE INDEX ON t (id)")
    name = topic()
    made = handler(name, "t", poison={"max_ratio": 1.0})
    made["table"] = {"name": "t", "write": write} | ({"key": ["id"]} if write == "upsert" else {})
    run = daemon({f"secrets-{write}": made}, {"log": {"level": "debug", "heartbeat": "1s"}})
    values = [_filled(template, number) for number, template in enumerate(FAILURES)]
    send(kafka, name, [_filled(FAILURES[0], 0), *values])
    good = 1 if write == "append" else 2
    settle(run, f"secrets-{write}", len(values) + 1)
    found = letters(kafka.bootstrap, made["dead_letter"]["topic"])
    run_outputs = [run.get("/status")[1], run.get("/metrics")[1], run.get("/readyz")[1]]
    assert 0 == run.stop()
    headers = [repr(letter.headers()) for letter in found]
    outputs = "\n".join([*run_outputs, run.logs(), *headers])
    assert [] == [secret for secret in (*SECRETS, NUMBER) if secret in outputs]
    assert sorted(values[good - 1 :]) == sorted(letter.value() or b"" for letter in found)


def _filled(template: str, number: int) -> bytes:
    secret = SECRETS[number % len(SECRETS)]
    return template.replace("%s", secret).replace("NUMBER", NUMBER).encode()
