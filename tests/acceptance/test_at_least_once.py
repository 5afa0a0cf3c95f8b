"""Rule 28: `checkpoint = "kafka"` loses nothing, repeats a batch of a partition at most, and needs no table of ours."""

import itertools
import random
import threading

import psycopg
from confluent_kafka import Consumer, TopicPartition

from tests.acceptance.stream import Stream, doubled, letters, make_table, rows, slow_commits, source_of
from tests.acceptance.test_exactly_once import PACE, caught_up, committed, handlers_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import wait_until

KILLS = 5
BATCH = 500


def handler(topic: str) -> dict[str, object]:
    """Return a handler without checkpoints in Postgres, of small batches."""
    return {
        "topics": [topic],
        "group_id": topic,
        "checkpoint": "kafka",
        "table": {"name": "events", "write": "append"},
        "batch": {"max_age": "30ms", "max_messages": BATCH},
        "dead_letter": {"create": True},
    }


def repeats(stream: Stream, database: str) -> dict[int, int]:
    """Return how many records of each partition are in the table more than once; each that should be is there."""
    found = rows(database, "events")
    assert set(found) == stream.good()
    partition_of = {number: partition for (partition, _), number in stream.sent.items()}
    again = dict.fromkeys(range(stream.partitions), 0)
    for number, count in doubled(found).items():
        again[partition_of[number]] += count - 1
    return again


def test_a_crash_repeats_one_batch_of_a_partition_at_most(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """SIGKILL again and again loses nothing and repeats at most one batch of each partition for each kill."""
    stream = Stream(kafka.bootstrap, topic(3), 3)
    make_table(database, "events")
    slow_commits(database, "events")
    run = daemon({"events": handler(stream.topic)}, {"kafka": {"group_instance_id": "one"}}, wait=False)
    over = threading.Event()

    def produce() -> None:
        while not over.is_set():
            stream.produce(200, per_second=PACE)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for _ in range(KILLS):
            run.wait_ready()
            wait_until(lambda: all(handler["written"] for handler in handlers_of(run)), 30, "rows of this run")
            threading.Event().wait(random.uniform(0.0, 0.5))
            run.kill()
            run.start()
    finally:
        over.set()
        producer.join()
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), 60, "the end of the topic")
    assert run.stop() == 0
    assert all(count <= KILLS * BATCH for count in repeats(stream, database).values())
    assert {source_of(letter) for letter in letters(kafka.bootstrap, f"{stream.topic}.dlq")} == stream.bad()
    with psycopg.connect(database) as conn:
        assert conn.execute("SELECT to_regclass('consumerd.checkpoint')").fetchone() == (None,)


def test_a_clean_stop_repeats_nothing(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """SIGTERM under load and a new start leave each record once: the last commit was acknowledged (P9)."""
    stream = Stream(kafka.bootstrap, topic(3), 3)
    make_table(database, "events")
    run = daemon({"events": handler(stream.topic)})
    producer = threading.Thread(target=stream.produce, args=[12_000], kwargs={"per_second": PACE})
    producer.start()
    try:
        wait_until(lambda: run.status()["handlers"]["events"]["written"] > 2_000, 30, "the first rows")
        assert run.stop() == 0
    finally:
        producer.join()
    run.start()
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic, again")
    assert run.stop() == 0
    assert set(repeats(stream, database).values()) == {0}


def test_a_lost_connection_repeats_nothing(
    kafka: KafkaServer,
    breakable_postgres: PostgresServer,
    breakable_database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
) -> None:
    """Of a COMMIT whose answer was lost the transaction's id tells what became of it: nothing is written again."""
    stream = Stream(kafka.bootstrap, topic(3), 3)
    make_table(breakable_database, "events")
    slow_commits(breakable_database, "events")
    run = daemon({"events": handler(stream.topic)}, {"postgres": {"dsn": breakable_database}})
    producer = threading.Thread(target=stream.produce, args=[20_000], kwargs={"per_second": PACE})
    producer.start()
    ended = 0
    while producer.is_alive():
        with psycopg.connect(breakable_database, autocommit=True) as conn:
            ended += conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'consumerd/%' "
                "AND state <> 'idle'"
            ).rowcount
        threading.Event().wait(0.3)
    producer.join()
    assert ended > 0
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    assert run.stop() == 0
    assert set(repeats(stream, breakable_database).values()) == {0}


def test_what_is_kept_in_kafka(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """An operator's offset is gone on from; a partition added later is read from its start, with `latest` too."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    stream.produce(1000)
    make_table(database, "events")
    run = daemon({"events": {**handler(stream.topic), "start": "latest"}})
    wait_until(lambda: len(run.status()["handlers"]["events"]["partitions"]) == 2, 30, "both partitions")
    assert run.stop() == 0
    assert sum(rows(database, "events").values()) == 0
    assert sorted(committed(kafka, stream).values()) == [500, 500]

    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": stream.topic})
    consumer.commit(offsets=[TopicPartition(stream.topic, 0, 400)], asynchronous=False)
    consumer.close()
    kafka.tool(
        "org.apache.kafka.tools.TopicCommand",
        *("--bootstrap-server", kafka.bootstrap, "--alter", "--topic", stream.topic, "--partitions", "3"),
    )
    stream = Stream(kafka.bootstrap, stream.topic, 3, stream.sent, itertools.count(1000))
    stream.produce(300)
    run.start()
    run.wait_ready()
    expected = {n for (p, o), n in stream.sent.items() if n % 47 and (p == 2 or o >= (400, 500)[p])}
    wait_until(lambda: set(rows(database, "events")) == expected, 30, "what is above the offsets")
    assert run.stop() == 0


def test_a_checkpoint_in_postgres_is_not_forgotten(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A group with a checkpoint in Postgres halts, and goes on after the command that the halt names."""
    stream = Stream(kafka.bootstrap, topic(1), 1)
    stream.produce(500)
    make_table(database, "events")
    exact = handler(stream.topic) | {"checkpoint": "postgres"}
    run = daemon({"events": exact})
    wait_until(lambda: caught_up(run, {"events": stream}), 30, "the end of the topic")
    assert run.stop() == 0
    again = daemon({"events": handler(stream.topic)}, {"postgres": {"dsn": database}}, wait=False)
    wait_until(lambda: _state(again) == "halted", 30, "the halt")
    sentence = str(handlers_of(again)[0]["halt"]["message"])
    assert again.stop() == 0
    command = sentence.partition("kafka-consumer-groups ")[2].partition(" --execute")[0]
    kafka.tool("org.apache.kafka.tools.consumer.group.ConsumerGroupCommand", *command.split(), "--execute")
    stream.produce(500)
    again.start()
    again.wait_ready()
    wait_until(lambda: set(rows(database, "events")) == stream.good(), 30, "the rest")
    assert again.stop() == 0
    assert set(repeats(stream, database).values()) == {0}


def _state(run: Daemon) -> str | None:
    try:
        return str(handlers_of(run)[0]["state"])
    except (OSError, IndexError):
        return None


def test_a_unique_index_is_refused(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> None:
    """A batch that is repeated would be refused by a unique index and dead-lettered: such a table halts the handler."""
    make_table(database, "events", "PRIMARY KEY")
    run = daemon({"events": handler(topic(1))}, wait=False)
    wait_until(lambda: _state(run) == "halted", 30, "the halt")
    assert "unique index" in str(handlers_of(run)[0]["halt"]["message"])
    assert run.stop() == 0
