"""Keys of a handler's file, each changed in one of several handlers over the same messages, and what it changes."""

import secrets
import time
from datetime import UTC, datetime

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

from tests.acceptance.halts import (
    TIMEOUT,
    checkpoint,
    expect_halt,
    expect_rows,
    handler,
    landed,
    make_tables,
    send,
)
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute, locked

WRITERS_THAT_WAIT = """\
SELECT application_name, count(*)::int FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock' AND application_name LIKE 'consumerd/%' GROUP BY 1"""
LARGEST_TRANSACTION = "SELECT max(rows) FROM (SELECT count(*)::int AS rows FROM {} GROUP BY xmin::text) AS transactions"


def test_start(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """`start`: a new group reads all that is there, nothing of it, or what was sent from a time on."""
    name = topic()
    make_tables(database, "all_of_it", "later", "new_ones")
    send(kafka, name, range(10))
    time.sleep(0.002)  # the milliseconds of the two differ
    between = datetime.now(UTC).isoformat()
    send(kafka, name, range(10, 20))
    run = daemon(
        {
            "all_of_it": handler(name, "all_of_it"),
            "later": handler(name, "later", start=between),
            "new_ones": handler(name, "new_ones", start="latest"),
        }
    )
    wait_until(lambda: checkpoint(database, "consumerd.new_ones") == 20, TIMEOUT, "the start of new_ones")
    send(kafka, name, range(20, 30))
    expect_rows(database, "all_of_it", range(30))
    expect_rows(database, "later", range(10, 30))
    expect_rows(database, "new_ones", range(20, 30))
    assert run.stop() == 0


def test_max_connections(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """`max_connections`: so many writes, of different partitions, are under way side by side, and no more."""
    name = topic(4)
    make_tables(database, "alone", "together")
    batch = {"max_messages": 10, "max_age": "100ms"}  # a write has one partition's
    run = daemon(
        {
            "alone": handler(name, "alone", batch=batch, max_connections=1),
            "together": handler(name, "together", batch=batch, max_connections=3),
        }
    )
    with locked(database, "alone"), locked(database, "together"):
        producer = Producer({"bootstrap.servers": kafka.bootstrap})
        for number in range(80):
            producer.produce(name, b'{"id": %d, "n": %d}' % (number, number), partition=number % 4)
        assert producer.flush(TIMEOUT) == 0
        expected = {"consumerd/alone": 1, "consumerd/together": 3}
        wait_until(lambda: dict(execute(database, WRITERS_THAT_WAIT)) == expected, TIMEOUT, "writers that wait")
    for table in ("alone", "together"):
        expect_rows(database, table, range(80))
    assert run.stop() == 0


def test_a_batch_has_its_bounds(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """`batch` bounds a transaction of one partition by messages, bytes and age; where they are larger, it is larger."""
    name = topic()
    make_tables(database, "of_any_size", "of_seven", "of_one_kib", "of_an_hour")
    send(kafka, name, range(1000, 2000))
    size = len(b'{"id": 1000, "n": 1000}')
    run = daemon(
        {
            "of_any_size": handler(name, "of_any_size"),
            "of_seven": handler(name, "of_seven", batch={"max_messages": 7}),
            "of_one_kib": handler(name, "of_one_kib", batch={"max_bytes": "1KiB"}),
            "of_an_hour": handler(name, "of_an_hour", batch={"max_age": "1h"}),
        }
    )
    largest = {}
    for table in ("of_any_size", "of_seven", "of_one_kib"):
        expect_rows(database, table, range(1000, 2000))
        ((largest[table],),) = execute(database, LARGEST_TRANSACTION.format(table))
    assert largest["of_seven"] <= 7 < largest["of_one_kib"] <= 1024 // size < largest["of_any_size"]
    status = run.status()["handlers"]["of_an_hour"]
    assert (1000, 0) == (status["consumed"], status["written"])
    assert run.stop() == 0
    assert landed(database, "of_an_hour") == landed(database, "of_any_size")


def test_the_dead_letter_topic_is_made_as_told(
    kafka: KafkaServer, admin: AdminClient, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """`dead_letter`: its topic has the name, the partitions and the retention given; too many replicas halt."""
    name, letters = topic(), f"letters-{secrets.token_hex(4)}"
    make_tables(database, "by_default", "as_told", "too_many")
    told = {"create": True, "topic": letters, "partitions": 3, "retention_ms": 86_400_000}
    run = daemon(
        {
            "by_default": handler(name, "by_default"),
            "as_told": handler(name, "as_told", dead_letter=told),
            "too_many": handler(name, "too_many", dead_letter={"create": True, "replication": 2}),
        },
        wait=False,
    )
    why = "dead-letter topic consumerd.too_many.dlq cannot be made: "
    expect_halt(run, "too_many", why, "replication factor of 2", "correct [dead_letter]", "replication = 2")
    send(kafka, name)
    for table in ("by_default", "as_told"):
        expect_rows(database, table)
    assert (1, "-1", "CreateTime") == made(admin, "consumerd.by_default.dlq")
    assert (3, "86400000", "LogAppendTime") == made(admin, letters)
    assert run.stop() == 0


def made(admin: AdminClient, topic: str) -> tuple[int, str, str]:
    """Return the partitions, the retention and the kind of timestamps of a topic."""
    (future,) = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic)]).values()
    settings = {key: entry.value for key, entry in future.result(TIMEOUT).items()}
    partitions = len(admin.list_topics(topic, timeout=TIMEOUT).topics[topic].partitions)
    return partitions, settings["retention.ms"], settings["message.timestamp.type"]
