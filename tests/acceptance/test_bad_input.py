"""Every kind of bad input between good rows: each good one lands exactly, each bad one is a letter, byte for byte."""

import json
import secrets
from typing import Any

import pytest
from confluent_kafka import Message, Producer
from psycopg.conninfo import make_conninfo

from tests.acceptance.stream import letters, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

TIMEOUT = 60  # seconds for everything to land
TEN_MEGABYTES = 10_000_000
MAX_MESSAGE_BYTES = 20 * 1024 * 1024  # the topic's, and the broker's
FIRST_TIMESTAMP = 1_600_000_000_000  # long past: a letter keeps it
DEEP = b"[" * 1_000 + b"]" * 1_000

Headers = list[tuple[str, str | bytes | None]]
HEADERS: Headers = [("trace", b"1"), ("trace", b"2"), ("nothing", None), ("bytes", b"\xff\x00"), ("empty", b"")]

TABLE = """\
CREATE TABLE {} (
    id bigint NOT NULL, small smallint CHECK (small <> 13), middle integer, real double precision,
    amount numeric(12, 2), any_amount numeric, title text, short varchar(5), flag boolean, at timestamptz, u uuid,
    doc jsonb, city text NOT NULL, size integer
)"""
NAMES = ("id", "small", "middle", "real", "amount", "any_amount", "title", "short", "flag", "at", "u", "doc")
COLUMNS: dict[str, Any] = {name: name for name in NAMES}
COLUMNS |= {
    "city": {"from": "address.city", "default": "unknown"},
    "size": {"from": "address.rooms.size", "default": 7},
}
ROWS = "SELECT {} FROM {} AS t ORDER BY t.id"

NOTHING = (*(None for _ in NAMES[1:]), "unknown", "7")
"""A row of which only the id was sent."""


def row(number: int, **columns: str) -> tuple[str | None, ...]:
    """Return a row as text, with what differs from an empty one."""
    names = (*NAMES, "city", "size")
    values: dict[str, str | None] = dict(zip(names, (str(number), *NOTHING), strict=True))
    return tuple((values | columns)[name] for name in names)


def value(number: int, rest: bytes = b"") -> bytes:
    """Return a message's value with an id, and ``rest`` as it is."""
    return b'{"id": %d%s}' % (number, b", " + rest if rest else b"")


FULL = (
    b'{"id": 1, "small": -32768, "middle": 2147483647, "real": 0.1, "amount": 12.50, "any_amount": "1e-20", '
    b'"title": "a \\"b\\"\\t\\u00e9\\ud83d\\ude00", "short": "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9", '
    b'"flag": false, "at": "2026-11-23T01:02:03.000004+05:30", "u": "6F9619FF-8B86-D011-B42D-00C04FC964FF", '
    b'"doc": {"b": [1.10, 123456789012345678901234567890], "a": null}, '
    b'"address": {"city": "Brno", "rooms": {"size": 3}}, "ignored": {"deep": [1]}}'
)
GOOD: list[tuple[bytes, tuple[str | None, ...]]] = [
    (
        FULL,
        row(
            1,
            small="-32768",
            middle="2147483647",
            real="0.1",
            amount="12.50",
            any_amount="0.00000000000000000001",
            title='a "b"\té😀',
            short="ééééé",
            flag="false",
            at="2026-11-22 19:32:03.000004+00",
            u="6f9619ff-8b86-d011-b42d-00c04fc964ff",
            doc='{"a": null, "b": [1.10, 123456789012345678901234567890]}',
            city="Brno",
            size="3",
        ),
    ),
    (value(2), row(2)),
    (value(3, b'"title": null, "doc": null, "address": {"rooms": {}}'), row(3)),
    (value(4, b'"small": 1, "small": 2, "doc": {"a": 1, "a": 2}'), row(4, small="2", doc='{"a": 2}')),
    (value(5, b'"at": "0001-01-01T00:00:00+14:00"'), row(5, at="0001-12-31 10:00:00+00 BC")),
    (value(6, b'"at": "9999-12-31T23:59:59.999999-14:00"'), row(6, at="10000-01-01 13:59:59.999999+00")),
    (value(7, b'"real": 1.7976931348623157e308'), row(7, real="1.7976931348623157e+308")),
    (value(8, b'"title": "", "short": "", "doc": ""'), row(8, title="", short="", doc='""')),
    (value(9, b'"amount": -9999999999.99'), row(9, amount="-9999999999.99")),
    (value(10, b'"title": "%s"' % (b"x" * TEN_MEGABYTES)), row(10, title="x" * TEN_MEGABYTES)),
    (value(11, b'"ignored": "\xff"'), row(11)),
    (value(12, b'"ignored": 123456789012345678901234567890'), row(12)),
    (value(13, b'"doc": "%s"' % (b"y" * TEN_MEGABYTES)), row(13, doc='"' + "y" * TEN_MEGABYTES + '"')),
    (value(14, b'"ignored": "a\\u0000b"'), row(14)),
    (value(2**63 - 1), row(2**63 - 1)),
]

BAD: list[tuple[bytes | None, str]] = [
    (b"", "malformed"),
    (None, "missing"),
    (b"null", "missing"),
    (b"[]", "type"),
    (b'"text"', "type"),
    (b"{}", "missing"),
    (b'{"id": null}', "missing"),
    (b'{"id": "1"}', "type"),
    (b'{"id": 1.5}', "type"),
    (b'{"id": 1', "malformed"),
    (b'{"id": 1} {"id": 2}', "malformed"),
    (b"\xef\xbb\xbf" + value(100), "malformed"),
    (b"z" * TEN_MEGABYTES, "malformed"),
    (value(100, b'"title": "\xff\xfe"'), "encoding"),
    (value(100, b'"doc": "\xff"'), "rejected"),
    (value(100, b'"title": "a\\u0000b"'), "rejected"),
    (value(100, b'"short": "a\\u0000b"'), "rejected"),
    (value(100, b'"doc": {"a": "\\u0000"}'), "rejected"),
    (value(100, b'"title": "a\x00b"'), "malformed"),
    (value(100, b'"title": "\\ud800"'), "malformed"),
    (value(100, b'"title": "\\udc00\\ud800"'), "malformed"),
    (value(100, b'"doc": "\\ud800"'), "malformed"),
    (value(100, b'"real": NaN'), "malformed"),
    (value(100, b'"real": Infinity'), "malformed"),
    (value(100, b'"real": "NaN"'), "type"),
    (value(100, b'"doc": NaN'), "malformed"),
    (value(100, b'"amount": "NaN"'), "range"),
    (value(2**63), "range"),
    (value(-(2**63) - 1), "range"),
    (value(10**30), "range"),
    (value(100, b'"small": 32768'), "range"),
    (value(100, b'"small": 13'), "rejected"),
    (value(100, b'"middle": -2147483649'), "range"),
    (value(100, b'"real": 1e999'), "range"),
    (value(100, b'"amount": 10000000000'), "range"),
    (value(100, b'"amount": 9999999999.999'), "rejected"),
    (value(100, b'"any_amount": 1e999999999'), "range"),
    (value(100, b'"short": "sixsix"'), "range"),
    (value(100, b'"flag": 1'), "type"),
    (value(100, b'"u": "6f9619ff"'), "type"),
    (value(100, b'"at": "2026-11-23T01:02:03"'), "type"),
    (value(100, b'"at": "99999-01-01T00:00:00Z"'), "type"),
    (value(100, b'"at": "-5000-01-01T00:00:00Z"'), "type"),
    (value(100, b'"at": 1700000000'), "type"),
    (value(100, b'"doc": ' + DEEP), "malformed"),
    (value(100, b'"ignored": ' + DEEP), "malformed"),
    (value(100, b'"address": {"city": null}'), "missing"),
    (value(100, b'"address": {"city": 5}'), "type"),
    (value(100, b'"address": "Brno"'), "type"),
    (value(100, b'"address": {"rooms": {"size": 2147483648}}'), "range"),
]

KEYS = (b"key", None, b"", b"\xff\x00")


def produce(kafka: KafkaServer, topic: str) -> tuple[list[tuple[str | None, ...]], list[tuple[Any, ...]]]:
    """Send good ones and bad ones in turns; return the rows and the letters that are to be."""
    settings: dict[str, Any] = {"bootstrap.servers": kafka.bootstrap, "message.max.bytes": MAX_MESSAGE_BYTES}
    producer = Producer(settings)
    rows, refused = [], []
    for number, (bad, reason) in enumerate(BAD):
        good, expected = GOOD[number] if number < len(GOOD) else (value(1_000 + number), row(1_000 + number))
        producer.produce(topic, good, timestamp=FIRST_TIMESTAMP)
        rows.append(expected)
        key, timestamp = KEYS[number % len(KEYS)], FIRST_TIMESTAMP + number
        producer.produce(topic, bad, key=key, headers=HEADERS, timestamp=timestamp)
        refused.append((reason, key, bad, HEADERS, timestamp, str(2 * number + 1)))
    assert producer.flush(TIMEOUT) == 0
    return sorted(rows, key=lambda each: int(each[0] or 0)), refused


def letter(message: Message) -> tuple[Any, ...]:
    """Return what a letter must keep, and why it is one; its own headers stand before ours."""
    headers: Any = message.headers()
    ours = dict(headers[len(HEADERS) :])
    reason, offset = ours["consumerd.reason"].decode(), ours["__connect.errors.offset"].decode()
    return reason, message.key(), message.value(), headers[: len(HEADERS)], message.timestamp()[1], offset


@pytest.mark.parametrize("write", ["append", "upsert"])
def test_good_rows_land_and_bad_ones_are_letters(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, write: str
) -> None:
    """No input crashes, is skipped, or changes a value: each is its row, or a letter with its reason, byte for byte."""
    name = topic(config={"max.message.bytes": str(MAX_MESSAGE_BYTES)})
    execute(database, TABLE.format("t"))
    rows, refused = produce(kafka, name)
    table: dict[str, Any] = {"name": "t", "write": write, "tombstones": "dead-letter"}
    if write == "upsert":
        execute(database, "CREATE UNIQUE INDEX ON t (id)")
        table["key"] = ["id"]
    letter_topic = f"letters-{secrets.token_hex(4)}"
    handler = {"topics": [name], "table": table, "columns": COLUMNS, "poison": {"max_ratio": 1.0}}
    handler |= {"dead_letter": {"topic": letter_topic, "create": True}}
    run = daemon({f"bad-{write}": handler})

    def settled() -> bool:
        done = run.status()["handlers"][f"bad-{write}"]
        return bool(done["halt"]) or done["written"] + sum(done["dead_lettered"].values()) == 2 * len(BAD)

    wait_until(settled, TIMEOUT, "rows and letters")
    assert run.status()["handlers"][f"bad-{write}"]["halt"] is None
    columns = ", ".join(f"{column}::text" for column in COLUMNS)
    landed = execute(make_conninfo(database, options="-c timezone=UTC"), ROWS.format(columns, "t"))
    assert [each[0] for each in rows] == [each[0] for each in landed]
    assert [] == [(_short(e), _short(r)) for e, r in zip(rows, landed, strict=True) if e != r]
    found = [
        letter(each) for each in sorted(letters(kafka.bootstrap, letter_topic), key=lambda each: source_of(each)[1])
    ]
    assert [] == [(e[0], f[0], _short(e[2:3])) for e, f in zip(refused, found, strict=True) if e[0] != f[0]]
    assert [] == [(_short(e), _short(f)) for e, f in zip(refused, found, strict=True) if e != f]


def test_a_unique_value_that_moves_from_key_to_key(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P4, P5: rows that are valid one after the other, and not in the order of an upsert's statement, all land."""
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, email text UNIQUE)")
    execute(database, "INSERT INTO users VALUES (1, 'a'), (2, 'b')")
    name = topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for number, email in [
        (2, "c"),
        (1, "b"),
        *((number, str(number)) for number in range(3, 100)),
        (99, "d"),
        (5, "99"),
    ]:
        producer.produce(name, json.dumps({"id": number, "email": email}))
    producer.flush(TIMEOUT)
    table = {"name": "users", "write": "upsert", "key": ["id"]}
    run = daemon({"users": {"topics": [name], "table": table, "dead_letter": {"create": True}}})
    wait_until(lambda: run.status()["handlers"]["users"]["written"] >= 101, TIMEOUT, "all rows")
    assert not any(run.status()["handlers"]["users"]["dead_lettered"].values())
    assert run.stop() == 0
    rows = dict(execute(database, "SELECT id, email FROM users"))
    assert rows == {number: str(number) for number in range(3, 100)} | {1: "b", 2: "c", 5: "99", 99: "d"}


def test_a_column_that_was_widened(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """P4: what fits the table as it is now is a row, though it did not fit when the table was read."""
    execute(database, "CREATE TABLE wide (id bigint NOT NULL, v integer NOT NULL)")
    name = topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap})

    def send(*values: object) -> None:
        for number, value in enumerate(values):
            producer.produce(name, json.dumps({"id": number, "v": value}))
        producer.flush(TIMEOUT)

    send(1)
    run = daemon(
        {"wide": {"topics": [name], "table": {"name": "wide", "write": "append"}, "dead_letter": {"create": True}}}
    )
    wait_until(lambda: run.status()["handlers"]["wide"]["written"] == 1, TIMEOUT, "the first row")
    execute(database, "ALTER TABLE wide ALTER v TYPE text, ALTER v DROP NOT NULL")
    send("a", None, 2, "b")
    wait_until(lambda: run.status()["handlers"]["wide"]["written"] == 4, TIMEOUT, "those that fit now")
    assert execute(database, "SELECT v FROM wide ORDER BY ctid") == [("1",), ("a",), (None,), ("b",)]
    assert run.status()["handlers"]["wide"]["dead_lettered"]["type"] == 1
    assert run.stop() == 0


def _short(whole: tuple[Any, ...]) -> str:
    """Return what an assertion shows of something that may have 10 MB."""
    return json.dumps([repr(part)[:80] for part in whole])
