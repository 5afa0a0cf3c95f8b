"""P10: Kafka's own tools take effect exactly, with the checkpoint in Postgres; what is lost or restored resets nothing.

rules.md 10 and 11 on a real broker and a real database. The lines of rule 10 that halt are in test_halts.py.
"""

import json
import random
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.acceptance.stream import POISON_EVERY, Stream, make_table, rows
from tests.acceptance.test_exactly_once import caught_up, checkpoints, committed, handler, handlers_of
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

TIMEOUT = 30
TOOL = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"
PARTITIONS = 3
CRASHES = 4


def tool(kafka: KafkaServer, group: str, *arguments: str) -> str:
    """Run kafka-consumer-groups for a group."""
    return kafka.tool(TOOL, "--bootstrap-server", kafka.bootstrap, "--group", group, *arguments)


def expected(stream: Stream, times: dict[tuple[int, int], int]) -> Counter[int]:
    """Return how often each good record's number belongs into the table, given how often its offset was read."""
    return Counter({n: times[source] for source, n in stream.sent.items() if n % POISON_EVERY and times[source]})


def read_once(stream: Stream) -> dict[tuple[int, int], int]:
    """Return every offset as read once."""
    return dict.fromkeys(stream.sent, 1)


def read_again(stream: Stream, times: dict[tuple[int, int], int], offsets: dict[int, int]) -> None:
    """Count what is read again from these offsets on."""
    for partition, offset in stream.sent:
        if partition in offsets and offset >= offsets[partition]:
            times[partition, offset] += 1


def run_to_the_end(run: Daemon, stream: Stream) -> None:
    """Start, catch up, stop."""
    run.start()
    run.wait_ready()
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
    assert run.stop() == 0


@pytest.fixture
def stream(kafka: KafkaServer, topic: MakeTopic) -> Stream:
    """Make a topic and send some."""
    made = Stream(kafka.bootstrap, topic(PARTITIONS), PARTITIONS)
    made.produce(900)
    return made


@pytest.fixture
def run(database: str, stream: Stream, daemon: MakeDaemon) -> Daemon:
    """Run a daemon, its table without a key, to the end of what was sent, and stop it."""
    make_table(database, "events")
    made = daemon({"events": handler(stream.topic, "events", write="append")})
    wait_until(lambda: caught_up(made, {"events": stream}), TIMEOUT, "the end of the topic")
    assert made.stop() == 0
    return made


def test_every_way_to_reset_takes_effect_exactly(
    kafka: KafkaServer, database: str, stream: Stream, run: Daemon, tmp_path: Path
) -> None:
    """Each variant of --reset-offsets repeats exactly the messages from where it sets the group, once."""
    times = read_once(stream)
    time.sleep(0.002)  # a millisecond between the two halves, for --to-datetime
    between = datetime.now(UTC)
    stream.produce(300)
    run_to_the_end(run, stream)
    times = {source: times.get(source, 1) for source in stream.sent}
    assert rows(database, "events") == expected(stream, times)

    first, second, whole = stream.topic + ":0", stream.topic + ":1", ("--topic", stream.topic)
    later = dict.fromkeys(range(PARTITIONS), 300)
    plan = tmp_path / "plan.csv"
    plan.write_text(f"{stream.topic},2,250\n", encoding="utf-8")
    variants: list[tuple[tuple[str, ...], dict[int, int]]] = [
        (("--to-earliest", *whole), dict.fromkeys(range(PARTITIONS), 0)),
        (("--to-latest", *whole), {}),
        (("--to-current", *whole), {}),
        (("--to-offset", "399", "--topic", first), {0: 399}),
        (("--shift-by", "-7", "--topic", second), {1: 393}),
        (("--to-datetime", between.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z", *whole), later),
        (("--by-duration", "P1D", "--all-topics"), dict.fromkeys(range(PARTITIONS), 0)),
        (("--from-file", str(plan)), {2: 250}),
    ]
    for arguments, offsets in variants:
        tool(kafka, stream.topic, "--reset-offsets", "--execute", *arguments)
        run_to_the_end(run, stream)
        read_again(stream, times, offsets)
        assert rows(database, "events") == expected(stream, times), arguments
        assert committed(kafka, stream) == checkpoints(database, stream)


def test_a_crash_at_any_moment_of_adopting_repeats_nothing(
    kafka: KafkaServer, database: str, stream: Stream, run: Daemon
) -> None:
    """Rule 11: killed at random moments around its start, the daemon repeats an operator's range exactly once."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to repeat a failure
    dice = random.Random(seed)
    times = read_once(stream)
    for _ in range(CRASHES):
        to = dice.randrange(300)
        tool(kafka, stream.topic, "--reset-offsets", "--execute", "--topic", stream.topic, "--to-offset", str(to))
        read_again(stream, times, dict.fromkeys(range(PARTITIONS), to))
        run.start()
        threading.Event().wait(dice.uniform(0.5, 1.6))
        run.kill()
        wait_for_no_member(kafka, stream.topic)
        run_to_the_end(run, stream)
        assert rows(database, "events") == expected(stream, times)


def wait_for_no_member(kafka: KafkaServer, group: str) -> None:
    """Wait until the broker has dropped a killed member."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})

    def empty() -> bool:
        (future,) = admin.describe_consumer_groups([group]).values()
        return not future.result(TIMEOUT).members

    wait_until(empty, TIMEOUT, "a group without members")


def test_a_crash_between_checkpoint_and_acknowledgement_repeats_nothing(
    kafka: KafkaServer, database: str, stream: Stream, run: Daemon
) -> None:
    """Rule 11: no row is written before Kafka has acknowledged the stamp of an adopted offset."""
    tool(kafka, stream.topic, "--reset-offsets", "--execute", "--topic", stream.topic, "--to-offset", "100")
    wanted = dict.fromkeys(range(PARTITIONS), 100)
    with psycopg.connect(database) as conn:
        conn.execute("LOCK TABLE consumerd.checkpoint IN SHARE MODE")
        run.start()
        wait_until(lambda: waits_for_lock(database), TIMEOUT, "the claim")
        kafka.freeze()
        try:
            conn.commit()
            wait_until(lambda: 100 in checkpoints(database, stream).values(), TIMEOUT, "an adopted checkpoint")
            threading.Event().wait(1.0)
            assert sum(rows(database, "events").values()) == len(stream.good())
            run.kill()
        finally:
            kafka.thaw()
    wait_for_no_member(kafka, stream.topic)
    run_to_the_end(run, stream)
    times = read_once(stream)
    read_again(stream, times, wanted)
    assert rows(database, "events") == expected(stream, times)


def waits_for_lock(database: str) -> bool:
    """Whether the daemon waits for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'consumerd/%' AND wait_event_type = 'Lock'"
    )
    with psycopg.connect(database) as conn:
        return conn.execute(query.encode()).fetchone() != (0,)


def test_what_is_ahead_or_behind_in_kafka_changes_nothing(
    kafka: KafkaServer, database: str, stream: Stream, run: Daemon
) -> None:
    """Rule 10: a stamped offset behind the checkpoint changes nothing; ahead of it, Postgres went back, and is told."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": stream.topic})
    asked = [TopicPartition(stream.topic, 0)]
    behind = json.loads(consumer.committed(asked, timeout=TIMEOUT)[0].metadata or "") | {"offset": 120}
    consumer.commit(offsets=[TopicPartition(stream.topic, 0, 120, metadata=json.dumps(behind))], asynchronous=False)
    consumer.close()
    run_to_the_end(run, stream)
    assert rows(database, "events") == expected(stream, read_once(stream))
    assert committed(kafka, stream) == checkpoints(database, stream)

    numbers = [n for (partition, offset), n in stream.sent.items() if partition == 1 and offset >= 200]
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("UPDATE consumerd.checkpoint SET next_offset = 200 WHERE partition = 1")
        conn.execute("DELETE FROM events WHERE n = ANY (%s)", [numbers])
    run_to_the_end(run, stream)
    assert rows(database, "events") == expected(stream, read_once(stream))
    assert "Postgres went back: 200..299 had been written" in run.logs()


def test_a_copied_stamp_is_an_operators_offset(kafka: KafkaServer, database: str, stream: Stream, run: Daemon) -> None:
    """Rule 10: metadata of ours at another offset was copied by a tool: the offset is adopted."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": stream.topic})
    (old,) = consumer.committed([TopicPartition(stream.topic, 2)], timeout=TIMEOUT)
    consumer.commit(offsets=[TopicPartition(stream.topic, 2, 50, metadata=old.metadata)], asynchronous=False)
    consumer.close()
    run_to_the_end(run, stream)
    times = read_once(stream)
    read_again(stream, times, {2: 50})
    assert rows(database, "events") == expected(stream, times)


def test_another_consumers_group_is_taken_over(
    kafka: KafkaServer, database: str, stream: Stream, daemon: MakeDaemon
) -> None:
    """Rule 10: without a checkpoint, offsets that another consumer committed are where it goes on."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": stream.topic})
    consumer.commit(offsets=[TopicPartition(stream.topic, p, 100 * p) for p in range(2)], asynchronous=False)
    consumer.close()
    make_table(database, "events")
    run = daemon({"events": handler(stream.topic, "events", write="append")})
    wait_until(lambda: caught_up(run, {"events": stream}), TIMEOUT, "the end of the topic")
    assert run.stop() == 0
    taken = {source: int(source[1] >= (0, 100, 0)[source[0]]) for source in stream.sent}
    assert rows(database, "events") == expected(stream, taken)


def test_an_emptied_database_halts(kafka: KafkaServer, database: str, stream: Stream, run: Daemon) -> None:
    """Rule 10: offsets of ours without their checkpoints are those of another or a new database; nothing is written."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("DROP SCHEMA consumerd CASCADE")
    run.start()
    assert "another database" in halt_of(run)
    assert run.stop() == 0
    with psycopg.connect(database, autocommit=True) as conn:
        store = json.loads(stamp_of(kafka, stream))["store"]
        conn.execute("UPDATE consumerd.store SET store = %s", [store])
    run.start()
    assert "it was restored or emptied" in halt_of(run)
    assert run.stop() == 0
    assert rows(database, "events") == expected(stream, read_once(stream))


def stamp_of(kafka: KafkaServer, stream: Stream) -> str:
    """Return the metadata of a committed offset."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": stream.topic})
    try:
        return str(consumer.committed([TopicPartition(stream.topic, 0)], timeout=TIMEOUT)[0].metadata)
    finally:
        consumer.close()


def halt_of(run: Daemon) -> str:
    """Wait for the handler's halt and return its sentence."""

    def halt() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] | None = handlers_of(run)[0]["halt"]
        except OSError:
            return None
        return found

    wait_until(lambda: halt() is not None, TIMEOUT, "the halt")
    return str((halt() or {})["message"])
