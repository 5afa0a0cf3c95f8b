"""Rule 28: `checkpoint = "kafka"` loses nothing, repeats a batch of a partition at most, and needs no table of ours."""

import itertools
import random
import re
import threading

import pytest

from tests.acceptance.events import PACE, Events, MakeEvents, commit, committed, kill_while_writing, wait_for_halt
from tests.acceptance.stream import POISON_EVERY, Stream, doubled, rows, slow_commits
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

KILLS = 5
BATCH = 500


@pytest.fixture
def events(events: MakeEvents) -> MakeEvents:
    """Make handlers without checkpoints in Postgres."""

    def make(dsn: str, partitions: int = 2, **keys: object) -> Events:
        return events(dsn, partitions, **{"checkpoint": "kafka", **keys})

    return make


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
    database: str, events: MakeEvents, dice: random.Random
) -> None:
    """SIGKILL again and again loses nothing and repeats at most one batch of each partition for each kill."""
    made = events(database, 3)
    slow_commits(database, "events")
    run = made.start({"kafka": {"group_instance_id": "one"}}, wait=False)
    with made.stream.flowing(PACE):
        for _ in range(KILLS):
            kill_while_writing(run, dice)
    run.wait_ready()
    made.catches_up()
    assert run.stop() == 0
    assert all(count <= KILLS * BATCH for count in repeats(made.stream, database).values())
    assert set(made.stream.lettered()) == made.stream.bad()
    assert execute(database, "SELECT to_regclass('consumerd.checkpoint')") == [(None,)]


def test_a_clean_stop_repeats_nothing(database: str, events: MakeEvents) -> None:
    """SIGTERM under load and a new start leave each record once: the last commit was acknowledged (P9)."""
    made = events(database, 3)
    run = made.start()
    with made.stream.flowing(PACE):
        wait_until(lambda: made.written() > 2_000, 30, "the first rows")
        assert run.stop() == 0
    made.start_again()
    made.catches_up()
    assert run.stop() == 0
    made.stream.check(database)


def test_a_lost_connection_repeats_nothing(breakable_database: str, events: MakeEvents) -> None:
    """Of a COMMIT whose answer was lost the transaction's id tells what became of it: nothing is written again."""
    made = events(breakable_database, 3)
    slow_commits(breakable_database, "events")
    run = made.start()
    ended = 0
    with made.stream.flowing(PACE):
        for _ in range(15):
            ended += len(
                execute(
                    breakable_database,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'consumerd/%' "
                    "AND state <> 'idle'",
                )
            )
            threading.Event().wait(0.3)
    assert ended > 0
    made.catches_up()
    assert run.stop() == 0
    made.stream.check(breakable_database)


def test_what_is_kept_in_kafka(kafka: KafkaServer, database: str, events: MakeEvents) -> None:
    """An operator's offset is gone on from; a partition added later is read from its start, with `latest` too."""
    made = events(database, 2, start="latest")
    made.stream.produce(1000)
    run = made.start()
    wait_until(lambda: len(made.partitions()) == 2, 30, "both partitions")
    assert run.stop() == 0
    assert sum(rows(database, "events").values()) == 0
    assert sorted(committed(made.stream).values()) == [500, 500]

    commit(made.stream, {0: 400})
    topic = made.stream.topic
    kafka.tool(
        "kafka-topics",
        *("--bootstrap-server", kafka.bootstrap, "--alter", "--topic", topic, "--partitions", "3"),
    )
    stream = Stream(kafka.bootstrap, topic, 3, made.stream.sent, itertools.count(1000))
    stream.produce(300)
    made.start_again()
    expected = {n for (p, o), n in stream.sent.items() if n % POISON_EVERY and (p == 2 or o >= (400, 500)[p])}
    wait_until(lambda: set(rows(database, "events")) == expected, 30, "what is above the offsets")
    assert run.stop() == 0


def test_a_checkpoint_in_postgres_is_not_forgotten(kafka: KafkaServer, database: str, events: MakeEvents) -> None:
    """A group with a checkpoint in Postgres halts, and goes on after the command that the halt names."""
    made = events(database, 1, checkpoint="postgres")
    made.stream.produce(500)
    exact = made.start()
    made.catches_up()
    assert exact.stop() == 0
    made.keys = {"checkpoint": "kafka"}
    again = made.start(wait=False)
    sentence = wait_for_halt(again)
    assert again.stop() == 0
    kafka.typed(re.findall("kafka-consumer-groups .*? --execute", sentence)[0])
    made.stream.produce(500)
    made.start_again()
    wait_until(lambda: set(rows(database, "events")) == made.stream.good(), 30, "the rest")
    assert again.stop() == 0
    made.stream.check(database)


def test_a_unique_index_is_refused(database: str, events: MakeEvents) -> None:
    """A batch that is repeated would be refused by a unique index and dead-lettered: such a table halts the handler."""
    made = events(database, 1)
    execute(database, "ALTER TABLE events ADD PRIMARY KEY (n)")
    run = made.start(wait=False)
    assert "unique index" in wait_for_halt(run)
    assert run.stop() == 0
