"""`consumerd try`: what a handler would make of real messages, with nothing written and no group joined."""

import json
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

OK, FAILED, USAGE = 0, 1, 2
TIMEOUT = 60

TABLE = """\
CREATE TABLE parts (
    id bigint PRIMARY KEY, name varchar(8) NOT NULL, price numeric(8, 2) CHECK (price > 0), made timestamptz, doc jsonb
)"""
GOOD = b'{"id": %d, "name": "bolt", "price": 1.50, "made": "2026-11-23T10:15:00Z", "doc": {"a": [1, null]}}'
ROW = {"name": "bolt", "price": 1.50, "made": "2026-11-23T10:15:00Z", "doc": {"a": [1, None]}}

SPLIT = """\
def split(record):
    return [{"id": number, "name": "bolt", "price": number} for number in record["ids"]]
"""


class Bench:
    """A topic, a table and a handler between them, with no daemon."""

    def __init__(self, kafka: KafkaServer, database: str, topic: str, folder: Path) -> None:
        self.kafka, self.database, self.topic, self.folder = kafka, database, topic, folder

    def handler(self, **keys: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
        """Return the handler."""
        return {"topics": [self.topic], "table": {"name": "parts", "write": "append"}, **keys}

    def configure(self, **keys: Any) -> Path:  # noqa: ANN401 - TOML
        """Write the files."""
        config = {"kafka": {"bootstrap_servers": self.kafka.bootstrap}, "postgres": {"dsn": self.database}}
        return write_config(self.folder, config, {"parts": self.handler(**keys)})

    def send(self, *values: bytes | None, partition: int = 0) -> None:
        """Send messages to one partition."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap})
        for value in values:
            producer.produce(self.topic, value, partition=partition)
        assert producer.flush(TIMEOUT) == 0

    def lines(self, *arguments: str) -> list[dict[str, Any]]:
        """Run `try` and return its JSON lines."""
        done = consumerd("try", "parts", "-o", "json", *arguments, cwd=self.folder)
        assert (OK, "") == (done.returncode, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def bench(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Bench:
    """Set up topic, table and files."""
    execute(database, TABLE)
    made = Bench(kafka, database, topic(2), tmp_path)
    made.configure()
    return made


def test_rows_and_refusals(bench: Bench) -> None:
    """Each message is its row as it would be written, or the reason why not, Postgres's own included."""
    bench.send(
        GOOD % 1,
        b'{"id": 2, "name": "far too long"}',
        b'{"id": 3, "name": "nut", "price": -1}',
        GOOD % 1,
        b'{"id": 4, "name": "nut", "doc": null}',
    )
    first, long, negative, twice, nulls = bench.lines()
    assert {"topic": bench.topic, "partition": 0, "offset": 0, "row": {"id": 1} | ROW} == first
    assert ("range", "decode", "name") == tuple(long["refused"][key] for key in ("reason", "stage", "column"))
    assert ("rejected", "23514") == tuple(negative["refused"][key] for key in ("reason", "sqlstate"))
    assert ("rejected", "23505", 3) == (*(twice["refused"][key] for key in ("reason", "sqlstate")), twice["offset"])
    assert {"id": 4, "name": "nut", "price": None, "made": None, "doc": None} == nulls["row"]


def test_nothing_is_changed(bench: Bench) -> None:
    """No row, no checkpoint, no group and no topic is there afterwards."""
    bench.send(GOOD % 1, b"nonsense")
    admin = AdminClient({"bootstrap.servers": bench.kafka.bootstrap})

    def there() -> tuple[set[str], set[str]]:
        groups = {group.group_id for group in admin.list_consumer_groups().result(TIMEOUT).valid}
        return groups, set(admin.list_topics(timeout=TIMEOUT).topics)

    before = there()
    bench.lines()
    assert before == there()
    assert [] == execute(bench.database, "SELECT * FROM parts")
    assert [] == execute(bench.database, "SELECT 1 FROM pg_namespace WHERE nspname = 'consumerd'")


def test_the_last_or_the_first(bench: Bench) -> None:
    """-n counts over all partitions, from the topic's end, or from its beginning."""
    for number in range(3):
        bench.send(GOOD % (2 * number), partition=0)
        bench.send(GOOD % (2 * number + 1), partition=1)

    def ids(*arguments: str) -> set[int]:
        return {line["row"]["id"] for line in bench.lines(*arguments)}

    assert {3, 4, 5} == ids("-n", "3")
    assert {0, 1} == ids("-n", "2", "--from-beginning")
    assert set(range(6)) == ids()


def test_an_empty_topic(bench: Bench) -> None:
    """A topic without messages is told, and no error."""
    done = consumerd("try", "parts", cwd=bench.folder)
    assert (OK, "") == (done.returncode, done.stderr)
    assert "The topics hold no message." in done.stdout


def test_what_was_written_is_no_duplicate(bench: Bench, daemon: MakeDaemon) -> None:
    """Messages that an append has written are shown as rows, though the table would refuse them a second time."""
    bench.send(GOOD % 1)
    dead_letter = {"topic": f"{bench.topic}.dlq", "create": True}
    run = daemon({"parts": bench.handler(dead_letter=dead_letter)}, {"postgres": {"dsn": bench.database}})
    wait_until(lambda: run.status()["handlers"]["parts"]["written"] == 1, TIMEOUT, "the row")
    assert run.stop() == 0
    bench.send(GOOD % 1)
    before, after = bench.lines()
    assert ({"id": 1} | ROW, "23505") == (before["row"], after["refused"]["sqlstate"])


def test_upsert_is_tried_as_such(bench: Bench) -> None:
    """A key that comes twice is two rows where the later one replaces the other."""
    bench.configure(table={"name": "parts", "write": "upsert", "key": ["id"]})
    bench.send(GOOD % 1, GOOD % 1)
    assert [1, 1] == [line["row"]["id"] for line in bench.lines()]
    assert [] == execute(bench.database, "SELECT * FROM parts")


def test_a_transform(bench: Bench) -> None:
    """A message is what the handler's transform makes of it: several rows, none, or a refusal of all of them."""
    bench.configure(transform={"function": "parts:split"})
    (bench.folder / "handlers" / "parts.py").write_text(SPLIT)
    bench.send(b'{"ids": [1, 2]}', b'{"ids": []}', b'{"ids": [3, -3]}', b'{"ids": 5}')
    one, two, skipped, refused, raised = bench.lines()
    assert (1, 2) == (one["row"]["id"], two["row"]["id"])
    assert "transform" == skipped["skipped"]
    assert ("23514", 2) == (refused["refused"]["sqlstate"], refused["offset"])
    assert "transform" == raised["refused"]["reason"]


def test_arrays(bench: Bench) -> None:
    """An array is shown as JSON has it, its elements of JSON too."""
    execute(bench.database, "ALTER TABLE parts ADD sizes numeric(4, 1)[], ADD docs jsonb[]")
    bench.send(b'{"id": 1, "name": "bolt", "sizes": [[1.5, 2], [null, 3]], "docs": [{"a": 1}, null]}')
    (row,) = (line["row"] for line in bench.lines())
    assert ([[1.5, 2], [None, 3]], [{"a": 1}, None]) == (row["sizes"], row["docs"])


def test_tombstones(bench: Bench) -> None:
    """A tombstone is what the handler makes of it: passed over, or the key whose row it deletes."""
    bench.send(None)
    assert ["tombstone"] == [line["skipped"] for line in bench.lines()]
    producer = Producer({"bootstrap.servers": bench.kafka.bootstrap})
    producer.produce(bench.topic, None, b"7", partition=1)
    assert producer.flush(TIMEOUT) == 0
    deletes = {"tombstones": "delete", "tombstone_key": {"id": "@key"}}
    bench.configure(table={"name": "parts", "write": "upsert", "key": ["id"], **deletes}, key_format="json")
    _, deletion = bench.lines()
    assert {"id": 7} == deletion["deletes"]


def test_a_table_for_people(bench: Bench) -> None:
    """On a terminal rows are a table, each refusal is a sentence, and what was not changed is said."""
    bench.send(GOOD % 1, b'{"id": 2, "name": "nut", "price": -1}', b"{")
    done = consumerd("try", "parts", cwd=bench.folder)
    assert (OK, "") == (done.returncode, done.stderr)
    header, row, rejected, malformed, _, counts, promise = done.stdout.splitlines()
    assert ["message", "id", "name", "price", "made", "doc"] == header.split()
    assert [f"{bench.topic}:0@0", "1", "bolt", "1.50", "2026-11-23T10:15:00Z", '{"a":', "[1,", "null]}"] == row.split()
    assert rejected.startswith(f"{bench.topic}:0@1 is refused: rejected: ")
    assert "parts_price_check" in rejected
    assert "(SQLSTATE 23514)" in rejected
    assert malformed.startswith(f"{bench.topic}:0@2 is refused: malformed: ")
    assert "3 messages: 1 rows of parts, 2 refused, 0 skipped." == counts
    assert "The table is not changed" in promise


def test_mistakes(bench: Bench) -> None:
    """A handler that is not there, and a table that does not fit, are one sentence each."""
    done = consumerd("try", "prats", cwd=bench.folder)
    assert (USAGE, "there is no handler prats; there are: parts\n") == (done.returncode, done.stderr)
    execute(bench.database, "DROP TABLE parts")
    done = consumerd("try", "parts", cwd=bench.folder)
    assert FAILED == done.returncode
    assert "table parts does not exist" in done.stderr
    assert 1 == len(done.stderr.splitlines())
