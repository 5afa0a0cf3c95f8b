"""Each way to write is exact however the daemon ends: the table is as if each message had been written by itself."""

import json
import random
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.acceptance.events import PACE, caught_up, kill_while_writing
from tests.acceptance.halts import TIMEOUT, expect_halt, expect_rows, restart
from tests.acceptance.halts import handler as append_handler
from tests.acceptance.stream import POISON_EVERY, Stream, letters, slow_commits, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

KILLS = 5
KEYS = 1000
CHANGES = 4
TABLE = "CREATE TABLE {} (id int PRIMARY KEY, n bigint NOT NULL, version int, first bigint NOT NULL CHECK (first > 0))"
COLUMNS = {"id": "id", "n": "n", "version": "version", "first": "n"}
DELETE = {"tombstones": "delete", "tombstone_key": {"id": "@key.id"}}
MODES: dict[str, dict[str, Any]] = {
    "deleting": {"write": "upsert", "key": ["id"], **DELETE},
    "versioned": {"write": "upsert", "key": ["id"], "version": "version", "update": ["n", "version"]},
    "kept": {"write": "skip-existing"},
    "repeated": {"write": "skip-existing"},
    "repeated_versions": {"write": "upsert", "key": ["id"], "version": "version", "update": ["n", "version"]},
}

Row = tuple[int, int, int | None, int]


class Changes(Stream):
    """A stream of changes of some keys, each key in one partition: one in five deletes, versions go up and down."""

    def message(self, number: int) -> tuple[bytes, bytes | None]:
        """Return a change's key and value."""
        key = json.dumps({"id": key_of(number)}).encode()
        if number % POISON_EVERY == 0:
            return key, b"poison"
        change = changed(number)
        if change is None:
            return key, None
        return key, json.dumps(dict(zip(("id", "n", "version"), change, strict=False))).encode()

    def changes(self) -> Iterator[tuple[int, Row | None]]:
        """Return the good changes in the order of each partition, by key; None deletes."""
        for _, number in sorted(self.sent.items()):
            if number % POISON_EVERY:
                yield key_of(number), changed(number)

    def expected(self) -> dict[str, dict[int, Row]]:
        """Return what each mode leaves."""
        deleting: dict[int, Row] = {}
        versioned: dict[int, Row] = {}
        kept: dict[int, Row] = {}
        for key, row in self.changes():
            if row is None:
                deleting.pop(key, None)
                continue
            there = versioned.get(key)
            deleting[key] = (*row[:3], row[1])
            kept.setdefault(key, row)
            if there is None:
                versioned[key] = row
            elif there[2] is None or (row[2] is not None and row[2] >= there[2]):
                versioned[key] = (*row[:3], there[3])
        return {
            "deleting": deleting,
            "versioned": versioned,
            "kept": kept,
            "repeated": kept,
            "repeated_versions": versioned,
        }


def key_of(number: int) -> int:
    """Return the key that a change is of: each has a few changes, and there are always new ones."""
    return number % KEYS + number // (CHANGES * KEYS) * KEYS


def changed(number: int) -> Row | None:
    """Return the row that a change makes of a key; None deletes it."""
    dice = random.Random(number)
    if dice.random() < 1 / 5:
        return None
    return key_of(number), number, dice.choice([None, *range(50)]), number


def handlers(topic: str) -> dict[str, dict[str, Any]]:
    """Return a handler of each mode; their batches are small, so that a kill finds one in flight."""
    return {
        name: {
            "topics": [topic],
            "group_id": f"{topic}.{name}",
            "key_format": "json",
            "checkpoint": "kafka" if name.startswith("repeated") else "postgres",
            "table": {"name": name, **mode},
            "columns": COLUMNS,
            "batch": {"max_age": "50ms", "max_messages": 500},
            "dead_letter": {"create": True},
        }
        for name, mode in MODES.items()
    }


def landed(database: str, name: str) -> dict[int, Row]:
    """Return a table, by key."""
    return {row[0]: row for row in execute(database, f"SELECT id, n, version, first FROM {name}")}


def test_each_mode_is_exact_through_kills(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, dice: random.Random
) -> None:
    """P1 to P3: SIGKILL at random moments, and each table is what its messages make of it, one after the other."""
    name = topic(3)
    stream = Changes(kafka.bootstrap, name, 3)
    for table in MODES:
        execute(database, TABLE.format(table))
        slow_commits(database, table)
    run = daemon(handlers(name), {"kafka": {"group_instance_id": "one"}}, wait=False)
    with stream.flowing(PACE / 4):
        for _ in range(KILLS):
            kill_while_writing(run, dice)
    run.wait_ready()
    wait_until(lambda: caught_up(run, dict.fromkeys(MODES, stream)), 120, "all handlers at the end of the topic")
    assert run.stop() == 0
    expected = stream.expected()
    for table in MODES:
        assert landed(database, table) == expected[table], table
        found = {source_of(letter) for letter in letters(kafka.bootstrap, f"{name}.{table}.dlq")}
        assert found == stream.bad(), table
    assert 0 < len(expected["deleting"]) < len(expected["kept"])


def send(kafka: KafkaServer, topic: str, *messages: tuple[bytes | None, object]) -> None:
    """Produce keys and values, these as JSON."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for key, value in messages:
        producer.produce(topic, None if value is None else json.dumps(value).encode(), key, partition=0)
    assert producer.flush(TIMEOUT) == 0


def books(run: Daemon, name: str) -> dict[str, Any]:
    """Return what a handler has done with what it consumed."""
    now = run.status()["handlers"][name]
    return {key: {reason: n for reason, n in now[key].items() if n} for key in ("dead_lettered", "skipped")} | {
        key: now[key] for key in ("consumed", "written")
    }


def settled(run: Daemon, name: str, count: int) -> dict[str, Any]:
    """Wait until so many messages have been dealt with, and return the books."""

    def done() -> bool:
        now = books(run, name)
        dealt_with = int(now["written"]) + sum(now["dead_lettered"].values()) + sum(now["skipped"].values())
        return bool(dealt_with >= count)

    wait_until(done, TIMEOUT, f"{count} messages of {name}")
    return books(run, name)


def test_tombstones(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """A message without a value is passed over and counted, or a letter, or deletes; the books balance."""
    name = topic()
    tables = ("ignoring", "lettering", "deleting")
    for table in tables:
        execute(database, f"CREATE TABLE {table} (id int PRIMARY KEY, n int NOT NULL)")
    upsert = {"write": "upsert", "key": ["id"]}
    made = {table: append_handler(name, table, key_format="json") for table in tables}
    made["ignoring"]["table"] |= upsert
    made["lettering"]["table"] |= upsert | {"tombstones": "dead-letter"}
    made["deleting"]["table"] |= upsert | {"tombstones": "delete", "tombstone_key": {"id": "@key"}}
    for each in made.values():
        each["poison"] = {"max_ratio": 1.0}
    rows: list[tuple[bytes | None, object]] = [
        (b"1", {"id": 1, "n": 1}),
        (b"2", {"id": 2, "n": 1}),
        (b"1", None),
        (b"3", None),
        (b"x", None),
    ]
    rows += [(b"2", None), (b"2", {"id": 2, "n": 2}), (None, None), (b"4", {"id": 4, "n": 1}), (b"4", None)]
    send(kafka, name, *rows)
    run = daemon(made)
    done = {table: settled(run, table, 10) for table in tables}
    assert done["ignoring"] == {"consumed": 10, "written": 4, "dead_lettered": {}, "skipped": {"tombstone": 6}}
    assert done["lettering"] == {"consumed": 10, "written": 4, "dead_lettered": {"missing": 6}, "skipped": {}}
    poison = {"malformed": 1, "missing": 1}
    assert done["deleting"] == {"consumed": 10, "written": 8, "dead_lettered": poison, "skipped": {}}
    assert run.metrics()['consumerd_messages_skipped_total{handler="ignoring",reason="tombstone"}'] == 6
    assert run.stop() == 0
    found = {table: execute(database, f"SELECT * FROM {table} ORDER BY id") for table in tables}
    assert found["ignoring"] == found["lettering"] == [(1, 1), (2, 2), (4, 1)]
    assert found["deleting"] == [(2, 2)]


def test_what_exists_is_counted(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Rows that skip-existing leaves out are counted, whether the table had them or the topic has them twice."""
    name = topic()
    execute(database, "CREATE TABLE kept (id int PRIMARY KEY, n int); INSERT INTO kept VALUES (1, 0)")
    send(kafka, name, *[(None, {"id": number % 50, "n": number}) for number in range(100)])
    made = append_handler(name, "kept", table={"name": "kept", "write": "skip-existing"})
    run = daemon({"kept": made})
    assert settled(run, "kept", 100) == {"consumed": 100, "written": 49, "dead_lettered": {}, "skipped": {"exists": 51}}
    assert run.stop() == 0
    rows = execute(database, "SELECT id, n FROM kept ORDER BY id")
    assert rows == [(number, 0 if number == 1 else number) for number in range(50)]


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no_index": ({"write": "skip-existing"}, ["no unique index", "CREATE UNIQUE INDEX", 'write = "append"']),
    "no_version": ({"write": "upsert", "key": ["id"], "version": "v"}, ["version column 'v'", "not among the columns"]),
    "no_update": ({"write": "upsert", "key": ["id"], "update": ["u"]}, ["update column 'u'", "not among the columns"]),
    "json_version": ({"write": "upsert", "key": ["id"], "version": "doc"}, ["version column 'doc'", "json", "times"]),
    "bytes_key": (
        {"write": "upsert", "key": ["id"], "tombstones": "delete", "tombstone_key": {"id": "@key"}},
        ["tombstone_key", "column id is bigint", 'write key_format = "json"'],
    ),
}


def test_a_mode_that_does_not_fit_its_table(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """What [table] asks for and the table cannot do halts that handler before anything is consumed, and says why."""
    name = topic()
    for table in MISTAKES:
        index = "" if table == "no_index" else " PRIMARY KEY"
        execute(database, f"CREATE TABLE {table} (id bigint{index}, n bigint, doc json)")
    made = {table: append_handler(name, table, table={"name": table, **how}) for table, (how, _) in MISTAKES.items()}
    send(kafka, name, *[(b"1", {"id": number, "n": number}) for number in range(10)])
    run = daemon(made, wait=False)
    for table, (_, words) in MISTAKES.items():
        expect_halt(run, table, *words)
        assert run.status()["handlers"][table]["consumed"] == 0
    assert run.stop() == 0
    execute(database, "ALTER TABLE no_index ADD PRIMARY KEY (id)")
    made["bytes_key"]["key_format"] = "json"
    mended: list[tuple[str, str, object]] = [("no_version", "version", "n"), ("no_update", "update", ["n"])]
    for table, key, column in [*mended, ("json_version", "version", "n")]:
        made[table]["table"][key] = column
    for each in made.values():
        each["columns"] = {"id": "id", "n": "n"}
    restart(run, made)
    for table in MISTAKES:
        expect_rows(database, table)


@pytest.fixture
def role(database: str) -> Iterator[str]:
    """Make a role that may do nothing, and forget it after."""
    name = f"consumerd_test_{secrets.token_hex(4)}"
    ((current,),) = execute(database, "SELECT current_database()")
    execute(database, f"CREATE ROLE {name}; GRANT CREATE ON DATABASE {current} TO {name}")
    yield name
    execute(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_privileges_of_each_mode(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, role: str
) -> None:
    """A role that may only insert is told what each mode needs besides, and the grant that is told suffices."""
    name = topic()
    modes: dict[str, dict[str, Any]] = {mode: MODES[mode] for mode in ("deleting", "kept")}
    for table in modes:
        execute(database, f"CREATE TABLE {table} (id bigint PRIMARY KEY, n bigint); GRANT INSERT ON {table} TO {role}")
    made = {
        table: append_handler(name, table, table={"name": table, **mode}, key_format="json")
        for table, mode in modes.items()
    }
    run = daemon(made, {"postgres": {"settings": {"role": role}}}, wait=False)
    grants = {"deleting": "GRANT UPDATE, SELECT, DELETE ON public.deleting", "kept": "GRANT SELECT ON public.kept"}
    for table, grant in grants.items():
        expect_halt(run, table, f"{grant} TO {role};")
        execute(database, f"{grant} TO {role}")
    assert run.stop() == 0
    send(kafka, name, *[(b'{"id": %d}' % number, {"id": number, "n": number}) for number in range(20)])
    send(kafka, name, *[(b'{"id": %d}' % number, None) for number in range(10, 20)])
    restart(run)
    expect_rows(database, "kept", range(20))
    expect_rows(database, "deleting")
    assert settled(run, "deleting", 30)["written"] == 30
