"""Every source of a column's value, and `where`, on a real broker and a real table."""

import json
import secrets
from datetime import UTC, date, datetime
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.acceptance.halts import checkpoint, expect_halt, handler
from tests.acceptance.stream import letters, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

TIMEOUT = 90  # seconds for anything that a test waits for
FIRST = 1_700_000_000_000
"""The first message's timestamp; each has a millisecond more."""
KEPT = {"retention.ms": "-1"}
"""The broker deletes what is older than a week by its timestamp, half a minute after its start for the first time."""
COLUMNS: dict[str, Any] = {
    "topic": "@topic",
    "part": "@partition",
    "off": "@offset",
    "at": "@timestamp",
    "id": "@key.id",
    "region": {"from": "@key.region", "default": "?"},
    "trace": "@headers.trace-id",
    "attempt": {"from": "@headers.attempt", "default": 0},
    "raw": '@headers["raw bytes"]',
    "sku": "items[0].sku",
    "odd": '["odd.name"]',
    "made": {"from": "ts", "unit": "ms"},
    "day": {"from": "@headers.day", "unit": "s"},
    "doc": "@value",
}
TABLE = """\
CREATE TABLE t (
    topic text, part int, off bigint, at timestamptz, id bigint NOT NULL, region text, trace text NOT NULL, attempt int,
    raw bytea, sku varchar(5) CHECK (sku <> 'never'), odd text, made timestamptz, day date, doc json
)"""
UNIQUE = "CREATE UNIQUE INDEX ON t (part, off)"
Headers = list[tuple[str, str | bytes | None]]


def message(number: int, **more: object) -> dict[str, Any]:
    """Return a message that is taken, numbered in its key and value."""
    value = {"kind": "buy", "items": [{"sku": f"s{number}"}, 7], "odd.name": "x", "ts": number * 1000 + 5, "n": 1.50}
    headers: Headers = [("trace-id", "old"), ("trace-id", f"t{number}"), ("raw bytes", b"\xff\x00")]
    return {"key": {"id": number, "region": "eu"}, "value": value, "headers": headers} | more


def without(number: int, *names: str) -> dict[str, Any]:
    """Return a message whose headers lack some."""
    it = message(number)
    return it | {"headers": [header for header in it["headers"] if header[0] not in names]}


def changed(number: int, **fields: object) -> dict[str, Any]:
    """Return a message with other fields in its value."""
    it = message(number)
    return it | {"value": it["value"] | fields}


GOOD: dict[int, dict[str, object]] = {
    0: {},
    4: {"attempt": 3, "day": date(1970, 1, 2)},
    6: {"region": "?", "raw": None, "sku": None, "made": None, "odd": None},
    14: {},
}
"""What is a row, by number, and where it differs from the first."""
MESSAGES: list[tuple[dict[str, Any], str | None]] = [
    (message(0), None),
    (changed(1, kind="sell"), "where"),
    (without(2, "trace-id"), "missing"),
    (changed(3, kind="sell", items="wrong", ts="wrong"), "where"),
    (message(4) | {"headers": [*message(4)["headers"], ("attempt", b"3"), ("day", b"86400.5")]}, None),
    (changed(5, items=[{"sku": 5}]), "type"),
    (without(6, "raw bytes") | {"key": {"id": 6}, "value": {"kind": "buy", "items": [], "ts": None}}, None),
    (message(7, key=None), "missing"),
    (changed(8, items=[{"sku": "never"}]), "rejected"),
    (changed(9, kind=5), "type"),
    (changed(10, ts="2023-11-14"), "type"),
    (without(11, "trace-id") | {"value": {"kind": "sell"}}, "where"),
    (message(12, key={"id": "x"}), "type"),
    (changed(13, items=[{"sku": "far too long"}]), "range"),
    (message(14), None),
    (changed(15, kind=None), "where"),
]


def send(kafka: KafkaServer, topic: str) -> list[bytes]:
    """Produce them; return the values."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    values = []
    for number, (each, _) in enumerate(MESSAGES):
        key = None if each["key"] is None else json.dumps(each["key"])
        values.append(json.dumps(each["value"]).encode())
        producer.produce(topic, values[-1], key, 1, headers=each["headers"], timestamp=FIRST + number)
    assert producer.flush(TIMEOUT) == 0
    return values


def settle(run: Daemon, name: str, messages: int) -> dict[str, Any]:
    """Wait until so many messages are rows, letters or skipped; return the handler's status."""

    def settled() -> bool:
        now = run.status()["handlers"][name]
        done = now["written"] + sum(now["dead_lettered"].values()) + sum(now["skipped"].values())
        return bool(now["halt"]) or (done == messages and now["lag_messages"] == 0)

    wait_until(settled, TIMEOUT, "all messages")
    status: dict[str, Any] = run.status()["handlers"][name]
    assert status["halt"] is None
    return status


@pytest.mark.parametrize("write", ["append", "upsert"])
def test_every_source(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, write: str) -> None:
    """P1, P2: each source lands in its column, each refused message is its letter, what `where` leaves is counted."""
    execute(database, TABLE)
    execute(database, UNIQUE)
    name, letter_topic = topic(partitions=2, config=KEPT), f"letters-{secrets.token_hex(4)}"
    values = send(kafka, name)
    more: dict[str, Any] = {"table": {"name": "t", "write": write}, "poison": {"max_ratio": 1.0}}
    if write == "upsert":
        more["table"]["key"] = ["part", "off"]
    more |= {"key_format": "json", "where": "kind == 'buy'", "columns": COLUMNS}
    more["dead_letter"] = {"topic": letter_topic, "create": True}
    run = daemon({"sources": handler(name, "t", **more)})
    status = settle(run, "sources", len(MESSAGES))
    first: dict[str, object] = {"topic": name, "part": 1, "region": "eu", "attempt": 0, "raw": b"\xff\x00", "odd": "x"}
    expected = [
        first
        | {"off": n, "id": n, "trace": f"t{n}", "sku": f"s{n}", "day": None, "doc": values[n].decode()}
        | {"at": datetime.fromtimestamp(FIRST // 1000, UTC).replace(microsecond=n * 1000)}
        | {"made": datetime.fromtimestamp(n, UTC).replace(microsecond=5000)}
        | differs
        for n, differs in GOOD.items()
    ]
    names = list(COLUMNS)
    found = execute(database, f"SELECT {', '.join(names).replace('doc', 'doc::text')} FROM t ORDER BY off")
    assert expected == [dict(zip(names, row, strict=True)) for row in found]
    reasons = {(1, n): why for n, (_, why) in enumerate(MESSAGES) if why not in {None, "where"}}
    headers: dict[Any, dict[str, Any]] = {
        source_of(letter): dict(letter.headers() or []) for letter in letters(kafka.bootstrap, letter_topic)
    }
    assert reasons == {source: each["consumerd.reason"].decode() for source, each in headers.items()}
    assert (b"trace", b"id") == (headers[1, 2]["consumerd.column"], headers[1, 7]["consumerd.column"])
    assert status["skipped"] == {"where": 4}
    metrics = run.metrics()
    assert metrics['consumerd_messages_skipped_total{handler="sources",reason="where"}'] == 4
    assert metrics[f'consumerd_rows_written_total{{handler="sources",partition="1",topic="{name}"}}'] == len(GOOD)
    assert run.stop() == 0


def test_what_is_skipped_is_checkpointed(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P1, P2: the checkpoint moves over what `where` leaves; a kill repeats nothing and loses nothing."""
    execute(database, "CREATE TABLE t (n bigint PRIMARY KEY)")
    name = topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number in range(30_000):
        producer.produce(name, json.dumps({"n": number, "odd": number % 3 == 1}))
        producer.poll(0)
    producer.flush(TIMEOUT)
    batch = {"max_messages": 500}
    run = daemon({"odd": handler(name, "t", where="odd", columns={"n": "n"}, batch=batch)})
    wait_until(lambda: run.status()["handlers"]["odd"]["written"] > 1_000, TIMEOUT, "some rows")
    run.kill()
    run.start()
    run.wait_ready()
    wait_until(lambda: checkpoint(database, "consumerd.odd") == 30_000, TIMEOUT, "the checkpoint behind all")
    found = [n for (n,) in execute(database, "SELECT n FROM t ORDER BY n")]
    assert found == list(range(1, 30_000, 3))
    for number in range(30_000, 30_500):
        producer.produce(name, json.dumps({"n": number, "odd": False}))
    producer.flush(TIMEOUT)
    wait_until(
        lambda: checkpoint(database, "consumerd.odd") == 30_500, TIMEOUT, "the checkpoint behind what is skipped"
    )
    assert execute(database, "SELECT count(*) FROM t") == [(len(found),)]
    assert not any(run.status()["handlers"]["odd"]["dead_lettered"].values())
    assert run.stop() == 0


def test_keys_that_are_text_or_bytes(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """One topic's keys are text for one handler, and bytes for another, which takes any value as text."""
    execute(database, "CREATE TABLE texts (id bigint, at bigint); CREATE TABLE raws (id bytea, body text, n bytea)")
    name = topic(config=KEPT)
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    producer.produce(name, b"no json", b"42", headers=[("n", b"\x00")], timestamp=FIRST)
    producer.produce(name, b"{}", b"\xff", timestamp=FIRST)
    producer.flush(TIMEOUT)
    texts = handler(
        name, "texts", key_format="text", columns={"id": "@key", "at": "@timestamp"}, poison={"max_ratio": 1}
    )
    raws = handler(name, "raws", columns={"id": "@key", "body": "@value", "n": "@headers.n"})
    run = daemon({"texts": texts, "raws": raws})
    settle(run, "raws", 2)
    assert settle(run, "texts", 2)["dead_lettered"] == {"malformed": 1}
    assert execute(database, "SELECT id, at FROM texts") == [(42, FIRST)]
    found = execute(database, "SELECT id, body, n FROM raws ORDER BY body")
    assert sorted(found) == [(b"42", "no json", b"\x00"), (b"\xff", "{}", None)]
    assert run.stop() == 0


def test_unknown_fields_are_letters(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """A field that nothing reads makes a letter that names it, where that is asked for."""
    execute(database, "CREATE TABLE t (id bigint)")
    name, letter_topic = topic(), f"letters-{secrets.token_hex(4)}"
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for body in (b'{"id": 1}', b'{"id": 2, "surprise": 1}', b'{"id": 3}'):
        producer.produce(name, body)
    producer.flush(TIMEOUT)
    more: dict[str, Any] = {"decode": {"unknown_fields": "dead-letter"}, "poison": {"max_ratio": 1.0}}
    run = daemon({"strict": handler(name, "t", **more, dead_letter={"topic": letter_topic, "create": True})})
    assert settle(run, "strict", 3)["dead_lettered"] == {"unknown_field": 1}
    assert execute(database, "SELECT id FROM t ORDER BY id") == [(1,), (3,)]
    (letter,) = letters(kafka.bootstrap, letter_topic)
    headers = dict(letter.headers() or [])
    assert headers["__connect.errors.exception.message"] == b"the field surprise is read by no column"
    assert run.stop() == 0


def test_a_source_that_does_not_go_with_its_column(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P6: a source of another kind than its column halts the handler with what to write, and nothing is consumed."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic()
    run = daemon({"wrong": handler(name, "t", columns={"id": "@key"})}, wait=False)
    expect_halt(run, "wrong", "column id of t is bigint, and @key goes into bytea alone", 'write key_format = "text"')
    assert run.status()["handlers"]["wrong"]["consumed"] == 0
