"""P2, P3, P9: whoever holds a partition, each record lands once and in order; and the gaps that nobody jumps over."""

import itertools
import json
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions, NewTopic

from tests.acceptance.stream import Stream, doubled, letters, make_table, rows, source_of
from tests.acceptance.test_exactly_once import checkpoints, committed, handler
from tests.conftest import SESSION_TIMEOUT_MS, MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port, wait_until

TIMEOUT = 40  # seconds for anything that a test waits for: a session may have to time out in it
CLASSIC: dict[str, object] = {"session.timeout.ms": SESSION_TIMEOUT_MS, "heartbeat.interval.ms": 500}
PROTOCOLS: dict[str, dict[str, object]] = {
    "eager": CLASSIC | {"partition.assignment.strategy": "range"},
    "cooperative": CLASSIC | {"partition.assignment.strategy": "cooperative-sticky"},
    "static": CLASSIC,
    "kip-848": {"group.protocol": "consumer"},
}
COLUMNS = {name: name for name in ("n", "grp", "amount", "label", "doc")}
"""All but `seq`, which Postgres fills: the order in which rows came."""
HOLD = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END';
CREATE TRIGGER hold BEFORE INSERT ON events FOR EACH ROW WHEN ({rows}) EXECUTE FUNCTION hold()"""
"""Writes of some rows wait while somebody holds the lock."""


@pytest.fixture
def table(database: str) -> str:
    """Make the table, with the order in which its rows came; return the DSN."""
    make_table(database, "events")
    execute(database, "ALTER TABLE events ADD COLUMN seq bigserial")
    return database


def execute(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    """Run SQL and return its rows, if it has any."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        cursor = conn.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def config(kafka: KafkaServer, dsn: str, properties: Mapping[str, object], member: str | None = None) -> str:
    """Return a consumerd.toml with these properties and no others: KIP-848 wants none for the session."""
    lines = [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in properties.items()]
    static = [f"group_instance_id = {json.dumps(member)}"] if member else []
    return "\n".join(
        [
            "[kafka]",
            f"bootstrap_servers = {json.dumps(kafka.bootstrap)}",
            *static,
            "[kafka.properties]",
            *lines,
            f"[postgres]\ndsn = {json.dumps(dsn)}",
            f'[daemon]\nlisten = "127.0.0.1:{free_port()}"',
        ]
    )


def events(topic: str, **more: object) -> dict[str, Mapping[str, Any] | str]:
    """Return the handler of a topic, of small batches and quick retries."""
    made = handler(topic, "events", write="append")
    return {"events": made | {"columns": COLUMNS, "retry": {"max": "1s"}} | more}


def held(daemon: Daemon) -> list[int]:
    """Return the partitions that a daemon writes."""
    return [each["partition"] for each in daemon.status()["handlers"]["events"]["partitions"]]


def count(dsn: str, condition: str = "true") -> int:
    """Count rows."""
    return int(execute(dsn, f"SELECT count(*) FROM events WHERE {condition}")[0][0])


def ends(stream: Stream) -> dict[int, int]:
    """Return the end of each partition that has a record."""
    last: dict[int, int] = {}
    for partition, offset in stream.sent:
        last[partition] = max(last.get(partition, 0), offset + 1)
    return last


def done(dsn: str, stream: Stream) -> Callable[[], bool]:
    """Tell whether the checkpoints stand at the end of the stream."""
    return lambda: checkpoints(dsn, stream) == ends(stream)


def check(kafka: KafkaServer, dsn: str, stream: Stream) -> None:
    """Compare rows, their order, letters, checkpoints and committed offsets with what was sent; all have stopped."""
    assert checkpoints(dsn, stream) == ends(stream)
    assert committed(kafka, stream) == ends(stream)
    numbers = rows(dsn, "events")
    assert doubled(numbers) == {}
    assert set(numbers) == stream.good()
    assert {source_of(letter) for letter in letters(kafka.bootstrap, f"{stream.topic}.dlq")} == stream.bad()
    source = {number: place for place, number in stream.sent.items()}
    came = [source[n] for (n,) in execute(dsn, "SELECT n FROM events ORDER BY seq")]
    for partition in range(stream.partitions):
        offsets = [offset for p, offset in came if p == partition]
        assert offsets == sorted(offsets)


@contextmanager
def load(stream: Stream, per_second: float = 1500.0) -> Iterator[None]:
    """Produce as long as the block lasts."""
    over = threading.Event()

    def produce() -> None:
        while not over.is_set():
            stream.produce(100, per_second=per_second)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        yield
    finally:
        over.set()
        producer.join()


@contextmanager
def locked(dsn: str) -> Iterator[None]:
    """Lock the table for the block, which begins once a write waits for it or is told not to."""
    with psycopg.connect(dsn) as conn:
        conn.execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        yield


def blocked(dsn: str) -> bool:
    """Whether a write waits for a lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return execute(dsn, waiting) != []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_members_come_and_go_under_load(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon, protocol: str
) -> None:
    """P2, P3, P9: joins, a SIGTERM and a SIGKILL leave each record once and in order, whatever the protocol."""
    stream = Stream(kafka.bootstrap, topic(6), 6)

    def member(number: int) -> Daemon:
        name = f"member-{number}" if protocol == "static" else None
        return daemon(events(stream.topic), config(kafka, table, PROTOCOLS[protocol], name))

    def share(*members: Daemon) -> bool:
        parts = [held(each) for each in members]
        return all(parts) and sorted(itertools.chain(*parts)) == list(range(6))

    with load(stream):
        first = member(1)
        wait_until(lambda: count(table) > 500, TIMEOUT, "rows of the first")
        second = member(2)
        wait_until(lambda: share(first, second), TIMEOUT, "two that share")
        third = member(3)
        wait_until(lambda: share(first, second, third), TIMEOUT, "three that share")
        at = count(table)
        wait_until(lambda: count(table) > at + 1_000, TIMEOUT, "rows of all three")
        second.kill()  # while it writes: what Kafka knows of it is half a second old
        assert first.stop() == 0
        wait_until(lambda: share(third), TIMEOUT, "all for the third")
        first.start()
        first.wait_ready(TIMEOUT)
        wait_until(lambda: share(first, third), TIMEOUT, "two that share again")
    wait_until(done(table, stream), TIMEOUT, "the end of the stream")
    assert [first.stop(), third.stop()] == [0, 0]
    assert not re.search("halted|not settled in time", first.logs() + second.logs() + third.logs())
    check(kafka, table, stream)


def test_a_revoke_that_waits_holds_up_the_partition_that_stays_for_five_seconds_at_most(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Rule 18: a batch that does not end is cut off five seconds into a revoke; the partition that stays goes on."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    settings = config(kafka, table, PROTOCOLS["cooperative"])
    first = daemon(events(stream.topic), settings)
    second = daemon(events(stream.topic), config(kafka, table, PROTOCOLS["cooperative"]))
    wait_until(lambda: len(held(second)) == 1, TIMEOUT, "a partition for the second")
    moves = held(second)[0]
    assert second.stop() == 0
    wait_until(lambda: len(held(first)) == 2, TIMEOUT, "both for the first")
    stays = 1 - moves
    parts = [Stream(kafka.bootstrap, stream.topic, 2, stream.sent, itertools.count(parity, 2)) for parity in (0, 1)]
    execute(table, HOLD.format(rows=f"NEW.grp % 2 = {moves}"))
    with psycopg.connect(table, autocommit=True) as lock:
        lock.execute("SELECT pg_advisory_lock(1)")
        parts[moves].produce(50)
        wait_until(lambda: blocked(table), TIMEOUT, "a batch that waits")
        second.start()
        second.wait_ready()  # it is in the group, with nothing: the first is asked for a partition
        parts[stays].produce(500)
        began = time.monotonic()
        staying = len([number for number in stream.good() if number % 2 == stays])
        wait_until(lambda: count(table, f"grp % 2 = {stays}") == staying, 10, "rows of the partition that stays")
        print(f"the partition that stays waited for {time.monotonic() - began:.1f} s")  # noqa: T201 - a figure to watch
        assert count(table, f"grp % 2 = {moves}") == 0
    wait_until(done(table, stream), TIMEOUT, "the end of the stream")
    assert [first.stop(), second.stop()] == [0, 0]
    check(kafka, table, stream)


def test_a_zombie_is_fenced_and_comes_back(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P2, rule 5: stopped in the middle of a write and past its session, a member blocks and doubles nothing after."""
    stream = Stream(kafka.bootstrap, topic(4), 4)
    first = daemon(events(stream.topic), config(kafka, table, PROTOCOLS["cooperative"]))
    stream.produce(1_000)
    wait_until(done(table, stream), TIMEOUT, "the first rows")
    with locked(table):
        stream.produce(2_000)
        wait_until(lambda: blocked(table), TIMEOUT, "a write that waits")
        os.kill(first.process.pid, signal.SIGSTOP)
    second = daemon(events(stream.topic), config(kafka, table, PROTOCOLS["cooperative"]), wait=False)
    try:
        wait_until(done(table, stream), TIMEOUT, "the end of the stream, by the second")
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    stream.produce(1_000)
    wait_until(lambda: len(held(first)) == len(held(second)) == 2, TIMEOUT, "two that share")
    stream.produce(1_000)
    wait_until(done(table, stream), TIMEOUT, "the end of the stream")
    assert [first.stop(), second.stop()] == [0, 0]
    check(kafka, table, stream)


def test_a_member_that_waits_long_for_its_table_stays_in_the_group(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P4, P8: with its buffer full for twice max.poll.interval.ms it polls on, keeps its partitions, and goes on."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    run = daemon(
        events(stream.topic, batch={"max_age": "30ms", "max_messages": 100}, max_connections=1),
        config(kafka, table, CLASSIC | {"max.poll.interval.ms": SESSION_TIMEOUT_MS}),
    )
    rebalances = run.metrics()['consumerd_rebalances_total{handler="events"}']
    with locked(table):
        stream.produce(5_000)
        wait_until(lambda: blocked(table), TIMEOUT, "a write that waits")
        time.sleep(2 * SESSION_TIMEOUT_MS / 1000 + 1)
        assert run.status()["handlers"]["events"]["state"] == "waiting"
        assert held(run) == [0, 1]
    wait_until(done(table, stream), TIMEOUT, "the end of the stream")
    assert run.metrics()['consumerd_rebalances_total{handler="events"}'] == rebalances
    assert run.stop() == 0
    check(kafka, table, stream)


def test_partitions_added_under_load_are_read_from_their_start(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """Rule 13: a partition added while the daemon runs loses no message, though `start` is `latest`."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    properties = CLASSIC | {"topic.metadata.refresh.interval.ms": 1_000}
    run = daemon(events(stream.topic, start="latest"), config(kafka, table, properties))
    stream.produce(1_000)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_partitions([NewPartitions(stream.topic, 4)])[stream.topic].result(TIMEOUT)
    grown = Stream(kafka.bootstrap, stream.topic, 4, stream.sent, stream._next)
    grown.produce(1_000)
    wait_until(lambda: len(held(run)) == 4, TIMEOUT, "the new partitions")
    grown.produce(1_000)
    wait_until(done(table, grown), TIMEOUT, "the end of the stream")
    assert run.stop() == 0
    check(kafka, table, grown)


def delete_until(kafka: KafkaServer, stream: Stream, offset: int) -> None:
    """Do what retention does to partition 0."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    until = TopicPartition(stream.topic, 0, offset)
    admin.delete_records([until])[until].result(TIMEOUT)


def goes_on_after_the_gap(kafka: KafkaServer, dsn: str, stream: Stream, run: Daemon, low: int) -> None:
    """Type the command of a gap's halt, once its sentence has named what lies behind the checkpoint."""
    at = checkpoints(dsn, stream)[0]
    assert f"{stream.topic}:0: offsets {at}..{low - 1} are gone" in halt_of(run)
    command = re.findall(r"kafka-consumer-groups (.*?), then restart", halt_of(run))[0]
    kafka.tool("org.apache.kafka.tools.consumer.group.ConsumerGroupCommand", *shlex.split(command))
    run.stop()
    run.start()
    run.wait_ready()
    for offset in range(at, low):
        del stream.sent[0, offset]
    wait_until(done(dsn, stream), TIMEOUT, "the end of the stream")
    assert run.stop() == 0
    assert f"skips {at}..{low - 1}" in run.logs()
    check(kafka, dsn, stream)


def test_what_retention_took_while_it_was_stopped_is_named_exactly(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P7: a gap behind the checkpoint halts at the start, and its own command is the way on."""
    stream = Stream(kafka.bootstrap, topic(1), 1)
    run = daemon(events(stream.topic), config(kafka, table, CLASSIC))
    stream.produce(500)
    wait_until(done(table, stream), TIMEOUT, "the first rows")
    assert run.stop() == 0
    stream.produce(1_500)
    delete_until(kafka, stream, 1_000)
    run.start()
    wait_until(lambda: halt_of(run) != "", TIMEOUT, "the halt")
    goes_on_after_the_gap(kafka, table, stream, run, 1_000)


def test_what_retention_took_while_it_runs_is_named_exactly(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """P1, P7: a gap met while a batch before it is being written is named from where the checkpoint then stands."""
    stream = Stream(kafka.bootstrap, topic(1), 1)
    small = events(stream.topic, batch={"max_age": "30ms", "max_messages": 200}, max_connections=2)
    run = daemon(small, config(kafka, table, CLASSIC))
    with psycopg.connect(table, autocommit=True) as gate, psycopg.connect(table) as conn:
        gate.execute("SELECT pg_advisory_lock(1)")
        conn.execute("LOCK TABLE events")
        stream.produce(5_000)
        wait_until(lambda: b"waiting: Postgres" in run.log.read_bytes(), TIMEOUT, "an outage: the buffer is full")
        position = run.status()["handlers"]["events"]["consumed"]
        delete_until(kafka, stream, 4_500)
        conn.execute(HOLD.format(rows=f"NEW.n > {position - 100}").encode())
        conn.commit()
        with suppress(TimeoutError):  # it may wait for the batch that is being written
            wait_until(lambda: halt_of(run) != "", 5, "the halt")
    wait_until(lambda: halt_of(run) != "", TIMEOUT, "the halt")
    goes_on_after_the_gap(kafka, table, stream, run, 4_500)


@pytest.mark.parametrize("running", [True, False])
def test_nothing_of_a_topic_made_again_is_written(
    kafka: KafkaServer, table: str, topic: MakeTopic, daemon: MakeDaemon, *, running: bool
) -> None:
    """P7, rule 10: deleted and made again under load, a topic halts its handler before one message of the new one."""
    stream = Stream(kafka.bootstrap, topic(2), 2)
    run = daemon(events(stream.topic), config(kafka, table, CLASSIC))
    stream.produce(1_000)
    wait_until(done(table, stream), TIMEOUT, "the first rows")
    if not running:
        assert run.stop() == 0
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.delete_topics([stream.topic])[stream.topic].result(TIMEOUT)
    wait_until(lambda: stream.topic not in admin.list_topics(timeout=TIMEOUT).topics, TIMEOUT, "the topic's end")
    admin.create_topics([NewTopic(stream.topic, 2, 1)])[stream.topic].result(TIMEOUT)
    again = Stream(kafka.bootstrap, stream.topic, 2, _next=itertools.count(1_000_000))
    again.produce(3_000)  # more than the old one held: a position in the old one is inside the new one
    if not running:
        run.start()
    wait_until(lambda: run.running and halt_of(run) != "", TIMEOUT, "the halt")
    assert f"topic {stream.topic} was deleted and made again" in halt_of(run)
    assert set(rows(table, "events")) == stream.good()
    assert {source_of(letter) for letter in letters(kafka.bootstrap, f"{stream.topic}.dlq")} == stream.bad()
    assert checkpoints(table, stream) == ends(stream)


def halt_of(daemon: Daemon) -> str:
    """Return the sentence of a halt; nothing while there is none."""
    with suppress(OSError):  # it may not listen yet
        halt = daemon.status()["handlers"]["events"]["halt"]
        return str(halt["message"]) if halt else ""
    return ""
