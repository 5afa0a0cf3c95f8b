"""Tables of every make, each with a stream of its own: the good rows land exactly, each bad one is a letter."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.acceptance.halts import TIMEOUT, UPSERT, expect_halt, handler
from tests.acceptance.stream import letters, source_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute


@dataclass(frozen=True)
class Case:
    """A table, what is sent, and what becomes of it."""

    make: str
    """Makes the table, of the case's own name."""
    sent: list[dict[str, Any]]
    rows: list[tuple[Any, ...]]
    """What `query` finds."""
    refused: dict[int, str]
    """Offset of each letter, and its SQLSTATE; where there is none, its reason."""
    query: str
    keys: dict[str, Any] = field(default_factory=dict)
    """Of the handler."""


CASES = {
    "partitioned": Case(
        """CREATE TABLE partitioned (id int, day date, v interval) PARTITION BY RANGE (day);
           CREATE TABLE first_half PARTITION OF partitioned FOR VALUES FROM ('2026-01-01') TO ('2026-07-01');
           CREATE TABLE second_half (v interval, day date, id int);
           ALTER TABLE partitioned ATTACH PARTITION second_half FOR VALUES FROM ('2026-07-01') TO ('2027-01-01')""",
        [{"id": 1, "day": "2026-02-01"}, {"id": 2, "day": "2027-02-01"}, {"id": 3, "day": "2026-08-01", "v": "1 day"}],
        [("first_half", 1, None), ("second_half", 3, "1 day")],
        {1: "23514"},
        "SELECT tableoid::regclass::text, id, v::text FROM partitioned ORDER BY id",
    ),
    "merged": Case(
        """CREATE TABLE merged (id int PRIMARY KEY, n int) PARTITION BY RANGE (id);
           CREATE TABLE low PARTITION OF merged FOR VALUES FROM (0) TO (10);
           INSERT INTO merged VALUES (1, 0)""",
        [{"id": 1, "n": 1}, {"id": 11, "n": 2}, {"id": 2, "n": 3}, {"id": 2, "n": 4}],
        [(1, 1), (2, 4)],
        {1: "23514"},
        "SELECT id, n FROM low ORDER BY id",
        {"table": {"name": "merged", **UPSERT}},
    ),
    "leaf": Case(
        """CREATE TABLE whole (id int) PARTITION BY LIST (id);
           CREATE TABLE leaf PARTITION OF whole FOR VALUES IN (1, 2)""",
        [{"id": 1}, {"id": 3}, {"id": 2}],
        [(1,), (2,)],
        {1: "23514"},
        "SELECT id FROM whole ORDER BY id",
    ),
    "parent": Case(
        "CREATE TABLE parent (id int); CREATE TABLE heir (more int) INHERITS (parent)",
        [{"id": 1, "more": 1}],
        [(1,)],
        {},
        "SELECT id FROM ONLY parent",
    ),
    "deferred": Case(
        """CREATE TABLE known (id int PRIMARY KEY); INSERT INTO known VALUES (1);
           CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED,
                                  of int REFERENCES known DEFERRABLE INITIALLY DEFERRED)""",
        [{"id": 1}, {"id": 2, "of": 1}, {"id": 1, "of": 1}, {"id": 4, "of": 7}, {"id": 5}],
        [(1, None), (2, 1), (5, None)],
        {2: "23505", 3: "23503"},
        "SELECT * FROM deferred ORDER BY id",
    ),
    "wordy": Case(
        "CREATE TABLE wordy (id int, took interval, host inet, near point, spans int4range[], note text, doc jsonb)",
        [
            {"id": 1, "took": "1 day 02:00", "host": "10.0.0.1/8", "near": "(1,2)", "spans": ["[1,5)", None, "empty"]},
            {"id": 2, "took": "for ever"},
            {"id": 3, "note": "tab\t, line\n, \\N and \\. é", "doc": {"a": ["\\n", 1.10]}},
            {"id": 4, "host": {"v4": "10.0.0.1"}},
            {"id": 5, "note": "a\0b"},
            {"id": 6, "spans": ["[5,1)"]},
        ],
        [
            (1, "1 day 02:00:00", "10.0.0.1/8", "(1,2)", '{"[1,5)",NULL,empty}', None, None),
            (3, None, None, None, None, "tab\t, line\n, \\N and \\. é", '{"a": ["\\\\n", 1.1]}'),
        ],
        {1: "22007", 3: "type", 4: "22021", 5: "22000"},
        "SELECT id, took::text, host::text, near::text, spans::text, note, doc::text FROM wordy ORDER BY id",
    ),
    "hosts": Case(
        "CREATE TABLE hosts (id inet PRIMARY KEY, n int, tags text[]); INSERT INTO hosts VALUES ('10.0.0.1', 0)",
        [
            {"id": "10.0.0.1", "n": 1},
            {"id": "10.0.0.2/32", "n": 2, "tags": ["a"]},
            {"id": "10.0.0.x", "n": 3},
            {"id": "10.0.0.2", "n": 4, "tags": ["NULL", None, "b,c", '"']},
        ],
        [("10.0.0.1/32", 1, None), ("10.0.0.2/32", 4, ["NULL", None, "b,c", '"'])],
        {2: "22P02"},
        "SELECT id::text, n, tags FROM hosts ORDER BY id",
        {"table": {"name": "hosts", **UPSERT}},
    ),
    "lists": Case(
        """CREATE TYPE mood AS ENUM ('sad', 'so so'); CREATE DOMAIN even AS int CHECK (value % 2 = 0);
           CREATE TABLE lists
               (id int, moods mood[], evens even[], prices numeric(10, 2)[], docs jsonb[], grid int[])""",
        [
            {"id": 1, "moods": ["so so", None], "evens": [2], "prices": [1.5], "docs": [{"a": 1}], "grid": [[1], [2]]},
            {"id": 2, "moods": ["glad"]},
            {"id": 3, "evens": [2, 3]},
            {"id": 4, "prices": [123456789.25]},
            {"id": 5, "docs": [["\0"]]},
            {"id": 6, "grid": [[1], [2, 3]]},
            {"id": 7, "grid": [], "moods": []},
            {"id": 8, "grid": [2147483648]},
        ],
        [
            (1, '{"so so",NULL}', "{2}", "{1.50}", '{"{\\"a\\": 1}"}', "{{1},{2}}"),
            (7, "{}", None, None, None, "{}"),
        ],
        {1: "22P02", 2: "23514", 3: "range", 4: "22P05", 5: "type", 7: "range"},
        "SELECT id, moods::text, evens::text, prices::text, docs::text, grid::text FROM lists ORDER BY id",
    ),
    "defaults": Case(
        """CREATE TABLE defaults (id int, kind text NOT NULL DEFAULT 'plain', n numeric(4, 1) NOT NULL DEFAULT 0.5,
               tags text[] NOT NULL DEFAULT '{}', at time NOT NULL DEFAULT '00:00:00', maybe int DEFAULT 7)""",
        [{"id": 1}, {"id": 2, "kind": "x", "n": 2, "tags": ["a"], "at": "01:00:00"}, {"id": 3, "kind": None}],
        [(1, "plain", "0.5", [], "00:00:00", None), (2, "x", "2.0", ["a"], "01:00:00", None)],
        {2: "missing"},
        "SELECT id, kind, n::text, tags, at::text, maybe FROM defaults ORDER BY id",
    ),
    "own_time": Case(
        "CREATE TABLE own_time (id int, at timestamptz NOT NULL DEFAULT now())",
        [{"id": 1}, {"id": 2, "at": "2026-01-01T00:00:00Z"}],
        [(2,)],
        {0: "missing"},
        "SELECT id FROM own_time",
    ),
    "identity": Case(
        """CREATE TABLE identity (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, n int,
                                  twice int GENERATED ALWAYS AS (n * 2) STORED)""",
        [{"id": 1, "n": 1}, {"id": 2, "n": 2, "twice": 5}, {"id": 1, "n": 3}, {"n": 4}],
        [(1, 3, 6), (2, 2, 4)],
        {3: "missing"},
        "SELECT * FROM identity ORDER BY id",
        {"table": {"name": "identity", **UPSERT}},
    ),
}


def send(kafka: KafkaServer, topic: str, *values: dict[str, Any]) -> None:
    """Produce values as JSON."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for value in values:
        producer.produce(topic, json.dumps(value), partition=0)
    assert producer.flush(TIMEOUT) == 0


def expect_settled(run: Daemon, name: str, messages: int) -> None:
    """Wait until a handler has written or dead-lettered all; it must not have halted."""

    def settled() -> bool:
        done = run.status()["handlers"][name]
        return bool(done["halt"]) or done["written"] + sum(done["dead_lettered"].values()) == messages

    wait_until(settled, TIMEOUT, f"all messages of {name}")
    assert run.status()["handlers"][name]["halt"] is None


def refusals(kafka: KafkaServer, topic: str) -> dict[int, str]:
    """Return the offset of each letter, and its SQLSTATE or else its reason."""
    found = {}
    for letter in letters(kafka.bootstrap, topic):
        headers: Any = dict(letter.headers() or [])
        found[source_of(letter)[1]] = headers.get("consumerd.sqlstate", headers["consumerd.reason"]).decode()
    return found


def test_tables_of_every_make(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """Partitions, heirs, deferred constraints, identities, defaults, arrays, types by their words: rows and letters."""
    handlers = {}
    for name, case in CASES.items():
        execute(database, case.make)
        handlers[name] = handler(topic(), name, **{"max_connections": 1, **case.keys})
        letter_topic = f"letters-{secrets.token_hex(4)}"
        handlers[name] |= {"dead_letter": {"topic": letter_topic, "create": True}}
        send(kafka, handlers[name]["topics"][0], *case.sent)
    run = daemon(handlers)
    found = {}
    for name, case in CASES.items():
        expect_settled(run, name, len(case.sent))
        rows = execute(database, case.query)
        found[name] = (rows, refusals(kafka, handlers[name]["dead_letter"]["topic"]))
    assert {name: (case.rows, case.refused) for name, case in CASES.items()} == found
    assert run.stop() == 0


@pytest.fixture
def role(database: str) -> Iterator[str]:
    """Make a role that may make the daemon's schema, and nothing else."""
    name = f"loader_{secrets.token_hex(4)}"
    (created,) = execute(database, "SELECT current_database()")
    execute(database, f"CREATE ROLE {name}; GRANT CREATE ON DATABASE {created[0]} TO {name}")
    yield name
    execute(database, f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_privileges_on_columns(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, role: str
) -> None:
    """Grants on the mapped columns alone will do; one that is lacking halts with the GRANT that mends it."""
    execute(database, "CREATE TABLE added (id int, n int, secret int DEFAULT 1)")
    execute(database, "CREATE TABLE kept (id int PRIMARY KEY, n int, secret int DEFAULT 1)")
    execute(database, f"GRANT INSERT (id, n) ON added TO {role}; GRANT INSERT (id, n), SELECT ON kept TO {role}")
    execute(database, f"GRANT UPDATE (secret) ON kept TO {role}")
    columns = {"id": "id", "n": "n"}
    name = topic()
    handlers = {
        "added": handler(name, "added", columns=columns),
        "kept": handler(name, "kept", columns=columns, table={"name": "kept", **UPSERT}),
        "more": handler(name, "added"),
    }
    send(kafka, name, {"id": 1, "n": 1}, {"id": 1, "n": 2})
    run = daemon(handlers, {"postgres": {"settings": {"role": role}}}, wait=False)
    expect_halt(run, "more", f'GRANT INSERT ("secret") ON public.added TO {role};')
    expect_halt(run, "kept", grant := f'GRANT UPDATE ("n") ON public.kept TO {role};')
    expect_settled(run, "added", 2)
    assert execute(database, "SELECT * FROM added ORDER BY n") == [(1, 1, 1), (1, 2, 1)]
    run.stop()
    execute(database, grant)
    run.start()
    expect_halt(run, "more", "GRANT INSERT")
    expect_settled(run, "kept", 2)
    assert execute(database, "SELECT * FROM kept") == [(1, 2, 1)]


def test_row_level_security(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, role: str) -> None:
    """What a policy refuses is a letter; append, whose COPY Postgres does not allow there, says so at its start."""
    execute(database, "CREATE TABLE secured (id int PRIMARY KEY, n int); ALTER TABLE secured ENABLE ROW LEVEL SECURITY")
    execute(database, "CREATE POLICY small ON secured USING (true) WITH CHECK (n < 10)")
    execute(database, f"GRANT SELECT, INSERT, UPDATE ON secured TO {role}")
    name, letter_topic = topic(), f"letters-{secrets.token_hex(4)}"
    handlers = {
        "appended": handler(name, "secured"),
        "secured": handler(
            name,
            "secured",
            table={"name": "secured", **UPSERT},
            dead_letter={"topic": letter_topic, "create": True},
        ),
    }
    send(kafka, name, {"id": 1, "n": 1}, {"id": 2, "n": 20}, {"id": 1, "n": 3}, {"id": 1, "n": 30})
    run = daemon(handlers, {"postgres": {"settings": {"role": role}}}, wait=False)
    expect_halt(run, "appended", "row-level security", f"ALTER ROLE {role} BYPASSRLS;", 'write = "upsert"')
    expect_settled(run, "secured", 4)
    assert execute(database, "SELECT * FROM secured") == [(1, 3)]
    assert refusals(kafka, letter_topic) == {1: "42501", 3: "42501"}
