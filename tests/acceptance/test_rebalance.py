"""P2, P3, P9: whoever holds a partition, each record lands once and in order; and the gaps that nobody jumps over."""

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from contextlib import closing, suppress

import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions, NewTopic

from tests.acceptance.events import (
    Events,
    MakeEvents,
    checkpoints,
    committed,
    halt_of,
    handler,
    held,
    members,
    wait_for_halt,
)
from tests.acceptance.stream import COLUMNS, Stream
from tests.conftest import SESSION_TIMEOUT_MS, MakeDaemon
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port, wait_until
from tests.servers.sql import blocked, execute, locked

TIMEOUT = 40  # seconds for anything that a test waits for: a session may have to time out in it
CLASSIC: dict[str, object] = {"session.timeout.ms": SESSION_TIMEOUT_MS, "heartbeat.interval.ms": 500}
LONG_SESSION: dict[str, object] = {"session.timeout.ms": 30_000}
SHORT = 15  # seconds: much less than such a session
PROTOCOLS: dict[str, dict[str, object]] = {
    "eager": CLASSIC | {"partition.assignment.strategy": "range"},
    "cooperative": CLASSIC | {"partition.assignment.strategy": "cooperative-sticky"},
    "static": CLASSIC,
    "kip-848": {"group.protocol": "consumer"},
}
HOLD = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END';
CREATE TRIGGER hold BEFORE INSERT ON events FOR EACH ROW WHEN ({rows}) EXECUTE FUNCTION hold()"""
"""Writes of some rows wait while somebody holds the lock."""


@pytest.fixture
def events(events: MakeEvents) -> MakeEvents:
    """Make tables with the order in which their rows came."""

    def make(dsn: str, partitions: int = 2, **keys: object) -> Events:
        made = events(dsn, partitions, **{"retry": {"max": "1s"}, "columns": COLUMNS, **keys})
        execute(dsn, "ALTER TABLE events ADD COLUMN seq bigserial")
        return made

    return make


def join(
    made: Events, properties: Mapping[str, object] = CLASSIC, member: str | None = None, *, wait: bool = True
) -> Daemon:
    """Start one more member with these properties and no others: KIP-848 wants none for the session."""
    lines = [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in properties.items()]
    static = [f"group_instance_id = {json.dumps(member)}"] if member else []
    config = [
        "[kafka]",
        f"bootstrap_servers = {json.dumps(made.stream.bootstrap)}",
        *static,
        "[kafka.properties]",
        *lines,
        f"[postgres]\ndsn = {json.dumps(made.dsn)}",
        f'[daemon]\nlisten = "127.0.0.1:{free_port()}"',
    ]
    return made.start("\n".join(config), wait=wait)


def count(dsn: str, condition: str = "true") -> int:
    """Count rows."""
    return int(execute(dsn, f"SELECT count(*) FROM events WHERE {condition}")[0][0])


def lands(made: Events) -> None:
    """Wait until the checkpoints stand at the end of the stream."""
    wait_until(lambda: checkpoints(made.dsn, made.stream) == made.stream.ends(), TIMEOUT, "the end of the stream")


def check(made: Events) -> None:
    """Compare rows, their order, letters, checkpoints and committed offsets with what was sent; all have stopped."""
    stream = made.stream
    assert checkpoints(made.dsn, stream) == stream.ends()
    assert committed(stream) == stream.ends()
    stream.check(made.dsn)
    source = {number: place for place, number in stream.sent.items()}
    came = [source[n] for (n,) in execute(made.dsn, "SELECT n FROM events ORDER BY seq")]
    for partition in range(stream.partitions):
        offsets = [offset for p, offset in came if p == partition]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_members_come_and_go_under_load(database: str, events: MakeEvents, protocol: str) -> None:
    """P2, P3, P9: joins, a SIGTERM and a SIGKILL leave each record once and in order, whatever the protocol."""
    made = events(database, 6)
    stream = made.stream

    def member(number: int) -> Daemon:
        name = f"member-{number}" if protocol == "static" else None
        return join(made, PROTOCOLS[protocol], name)

    def share(*members: Daemon) -> bool:
        parts = [held(each) for each in members]
        return all(parts) and sorted(itertools.chain(*parts)) == list(range(6))

    with stream.flowing(1500.0):
        first = member(1)
        wait_until(lambda: count(database) > 500, TIMEOUT, "rows of the first")
        second = member(2)
        wait_until(lambda: share(first, second), TIMEOUT, "two that share")
        third = member(3)
        wait_until(lambda: share(first, second, third), TIMEOUT, "three that share")
        at = count(database)
        wait_until(lambda: count(database) > at + 1_000, TIMEOUT, "rows of all three")
        second.kill()  # while it writes: what Kafka knows of it is half a second old
        assert first.stop() == 0
        wait_until(lambda: share(third), TIMEOUT, "all for the third")
        first.start()
        first.wait_ready(TIMEOUT)
        wait_until(lambda: share(first, third), TIMEOUT, "two that share again")
    lands(made)
    assert [first.stop(), third.stop()] == [0, 0]
    assert not re.search("halted|not settled in time", first.logs() + second.logs() + third.logs())
    check(made)


def test_a_member_that_is_fenced_by_its_own_name_joins_again(database: str, events: MakeEvents) -> None:
    """P4, P9: another with its `group_instance_id` takes the partitions; it says so, is not ready, and joins anew."""
    made = events(database)
    stream = made.stream
    daemon = join(made, CLASSIC, "one")
    stream.produce(100)
    lands(made)
    group = {"group.id": stream.topic, "group.instance.id": "one", "enable.auto.commit": False}
    twin = Consumer({"bootstrap.servers": stream.bootstrap, **group, **PROTOCOLS["cooperative"]})
    twin.subscribe([stream.topic])
    with closing(twin):
        wait_until(lambda: bool([twin.poll(0.1), *twin.assignment()][1:]), TIMEOUT, "the twin's partitions")
        wait_until(lambda: "another member has group_instance_id 'one'" in daemon.logs(), TIMEOUT, "the sentence")
        assert daemon.get("/readyz") == (503, "events: waiting\n")
        stream.produce(100)
        lands(made)
        assert daemon.get("/readyz")[0] == 200
    assert daemon.stop() == 0
    check(made)


def test_a_revoke_that_waits_holds_up_the_partition_that_stays_for_five_seconds_at_most(
    database: str, events: MakeEvents
) -> None:
    """Rule 18: a batch that does not end is cut off five seconds into a revoke; the partition that stays goes on."""
    made = events(database)
    stream = made.stream
    first = join(made, PROTOCOLS["cooperative"])
    second = join(made, PROTOCOLS["cooperative"])
    wait_until(lambda: len(held(second)) == 1, TIMEOUT, "a partition for the second")
    moves = held(second)[0]
    assert second.stop() == 0
    wait_until(lambda: len(held(first)) == 2, TIMEOUT, "both for the first")
    stays = 1 - moves
    parts = [Stream(stream.bootstrap, stream.topic, 2, stream.sent, itertools.count(parity, 2)) for parity in (0, 1)]
    execute(database, HOLD.format(rows=f"NEW.grp % 2 = {moves}"))
    with psycopg.connect(database, autocommit=True) as lock:
        lock.execute("SELECT pg_advisory_lock(1)")
        parts[moves].produce(50)
        wait_until(lambda: blocked(database), TIMEOUT, "a batch that waits")
        second.start()
        second.wait_ready()  # it is in the group, with nothing: the first is asked for a partition
        parts[stays].produce(500)
        began = time.monotonic()
        staying = len([number for number in stream.good() if number % 2 == stays])
        wait_until(lambda: count(database, f"grp % 2 = {stays}") == staying, 10, "rows of the partition that stays")
        print(f"the partition that stays waited for {time.monotonic() - began:.1f} s")  # noqa: T201 - a figure to watch
        assert count(database, f"grp % 2 = {moves}") == 0
    lands(made)
    assert [first.stop(), second.stop()] == [0, 0]
    check(made)


def test_a_zombie_is_fenced_and_comes_back(database: str, events: MakeEvents) -> None:
    """P2, rule 5: stopped in the middle of a write and past its session, a member blocks and doubles nothing after."""
    made = events(database, 4)
    stream = made.stream
    first = join(made, PROTOCOLS["cooperative"])
    stream.produce(1_000)
    lands(made)
    with locked(database, "events"):
        stream.produce(2_000)
        wait_until(lambda: blocked(database), TIMEOUT, "a write that waits")
        os.kill(first.process.pid, signal.SIGSTOP)
    second = join(made, PROTOCOLS["cooperative"], wait=False)
    try:
        lands(made)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    stream.produce(1_000)
    wait_until(lambda: len(held(first)) == len(held(second)) == 2, TIMEOUT, "two that share")
    stream.produce(1_000)
    lands(made)
    assert [first.stop(), second.stop()] == [0, 0]
    check(made)


def test_a_member_that_waits_long_for_its_table_stays_in_the_group(database: str, events: MakeEvents) -> None:
    """P4, P8: with its buffer full for twice max.poll.interval.ms it polls on, keeps its partitions, and goes on."""
    made = events(database, batch={"max_age": "30ms", "max_messages": 100}, max_connections=1)
    stream = made.stream
    run = join(made, CLASSIC | {"max.poll.interval.ms": SESSION_TIMEOUT_MS})
    rebalances = run.metrics()['consumerd_rebalances_total{handler="events"}']
    with locked(database, "events"):
        stream.produce(5_000)
        wait_until(lambda: blocked(database), TIMEOUT, "a write that waits")
        time.sleep(2 * SESSION_TIMEOUT_MS / 1000 + 1)
        status = run.status()["handlers"]["events"]
        assert (status["state"], status["partitions_paused"], run.get("/readyz")[0]) == ("waiting", 2, 200)
        assert run.metrics()['consumerd_partitions_paused{handler="events"}'] == 2
        assert held(run) == [0, 1]
    lands(made)
    assert run.status()["handlers"]["events"]["partitions_paused"] == 0
    assert run.metrics()['consumerd_rebalances_total{handler="events"}'] == rebalances
    assert run.stop() == 0
    check(made)


def test_partitions_added_under_load_are_read_from_their_start(database: str, events: MakeEvents) -> None:
    """Rule 13: a partition added while the daemon runs loses no message, though `start` is `latest`."""
    made = events(database, start="latest")
    stream = made.stream
    run = join(made, CLASSIC | {"topic.metadata.refresh.interval.ms": 1_000})
    stream.produce(1_000)
    admin = AdminClient({"bootstrap.servers": stream.bootstrap})
    admin.create_partitions([NewPartitions(stream.topic, 4)])[stream.topic].result(TIMEOUT)
    made.stream = Stream(stream.bootstrap, stream.topic, 4, stream.sent, stream._next)
    made.stream.produce(1_000)
    wait_until(lambda: len(held(run)) == 4, TIMEOUT, "the new partitions")
    made.stream.produce(1_000)
    lands(made)
    assert run.stop() == 0
    check(made)


def delete_until(stream: Stream, offset: int) -> None:
    """Do what retention does to partition 0."""
    admin = AdminClient({"bootstrap.servers": stream.bootstrap})
    until = TopicPartition(stream.topic, 0, offset)
    admin.delete_records([until])[until].result(TIMEOUT)


def goes_on_after_the_gap(kafka: KafkaServer, made: Events, low: int) -> None:
    """Type the command of a gap's halt, once its sentence has named what lies behind the checkpoint."""
    stream, run = made.stream, made.run
    at = checkpoints(made.dsn, stream)[0]
    assert f"{stream.topic}:0: offsets {at}..{low - 1} are gone" in halt_of(run)
    kafka.typed(re.findall("(kafka-consumer-groups .*?);", halt_of(run))[0])
    run.stop()
    made.start_again()
    for offset in range(at, low):
        del stream.sent[0, offset]
    lands(made)
    assert run.stop() == 0
    assert f"skips {at}..{low - 1}" in run.logs()
    check(made)


def test_what_retention_took_while_it_was_stopped_is_named_exactly(
    kafka: KafkaServer, database: str, events: MakeEvents
) -> None:
    """P7: a gap behind the checkpoint halts at the start, and its own command is the way on."""
    made = events(database, 1)
    stream = made.stream
    run = join(made)
    stream.produce(500)
    lands(made)
    assert run.stop() == 0
    stream.produce(1_500)
    delete_until(stream, 1_000)
    run.start()
    wait_for_halt(run)
    goes_on_after_the_gap(kafka, made, 1_000)


def test_what_retention_took_while_it_runs_is_named_exactly(
    kafka: KafkaServer, database: str, events: MakeEvents
) -> None:
    """P1, P7: a gap met while a batch before it is being written is named from where the checkpoint then stands."""
    made = events(database, 1, batch={"max_age": "30ms", "max_messages": 200}, max_connections=2)
    stream = made.stream
    run = join(made)
    with psycopg.connect(database, autocommit=True) as gate, psycopg.connect(database) as conn:
        gate.execute("SELECT pg_advisory_lock(1)")
        conn.execute("LOCK TABLE events")
        stream.produce(5_000)
        wait_until(lambda: b"waiting: Postgres" in run.log.read_bytes(), TIMEOUT, "an outage: the buffer is full")
        position = run.status()["handlers"]["events"]["consumed"]
        delete_until(stream, 4_500)
        conn.execute(HOLD.format(rows=f"NEW.n > {position - 100}").encode())
        conn.commit()
        with suppress(TimeoutError):  # it may wait for the batch that is being written
            wait_until(lambda: halt_of(run) != "", 5, "the halt")
    wait_for_halt(run)
    goes_on_after_the_gap(kafka, made, 4_500)


@pytest.mark.parametrize("running", [True, False])
def test_nothing_of_a_topic_made_again_is_written(database: str, events: MakeEvents, *, running: bool) -> None:
    """P7, rule 10: deleted and made again under load, a topic halts its handler before one message of the new one."""
    made = events(database)
    stream = made.stream
    run = join(made)
    stream.produce(1_000)
    lands(made)
    if not running:
        assert run.stop() == 0
    admin = AdminClient({"bootstrap.servers": stream.bootstrap})
    admin.delete_topics([stream.topic])[stream.topic].result(TIMEOUT)
    wait_until(lambda: stream.topic not in admin.list_topics(timeout=TIMEOUT).topics, TIMEOUT, "the topic's end")
    admin.create_topics([NewTopic(stream.topic, 2, 1)])[stream.topic].result(TIMEOUT)
    again = Stream(stream.bootstrap, stream.topic, 2, _next=itertools.count(1_000_000))
    again.produce(3_000)  # more than the old one held: a position in the old one is inside the new one
    if not running:
        run.start()
    assert f"topic {stream.topic} was deleted and made again" in wait_for_halt(run)
    stream.check(database)
    assert checkpoints(database, stream) == stream.ends()


@pytest.mark.parametrize("protocol", ["cooperative", "kip-848"])
def test_a_spare_member_is_ready(database: str, events: MakeEvents, protocol: str) -> None:
    """A member that the group has let in without a partition is ready and running, whatever the protocol."""
    made = events(database, 1)
    first = join(made, PROTOCOLS[protocol])
    wait_until(lambda: held(first) == [0], TIMEOUT, "the partition")
    spare = join(made, PROTOCOLS[protocol])  # waits until it is ready
    assert held(spare) == []
    assert made.state() == "running"


def test_partitions_that_came_while_a_static_member_was_away_are_read(database: str, events: MakeEvents) -> None:
    """The broker gives a static member back what it had, without a rebalance; what is new is asked for."""
    made = events(database, 1)
    often = LONG_SESSION | {"topic.metadata.refresh.interval.ms": 300}
    daemon = join(made, often, made.stream.topic)
    made.stream.produce(100)
    lands(made)
    assert daemon.stop() == 0
    admin = AdminClient({"bootstrap.servers": made.stream.bootstrap})
    admin.create_partitions([NewPartitions(made.stream.topic, 2)])[made.stream.topic].result(TIMEOUT)
    stream = made.stream
    made.stream = Stream(stream.bootstrap, stream.topic, 2, stream.sent, stream._next)
    made.stream.produce(100)
    made.start_again()
    wait_until(lambda: made.partitions() == [0, 1], SHORT, "the partition that is new")
    lands(made)
    assert daemon.stop() == 0
    check(made)


def test_a_spare_member_that_goes_says_so(
    kafka: KafkaServer, database: str, events: MakeEvents, daemon: MakeDaemon
) -> None:
    """One without a partition leaves its group at once: a rebalance under way would wait for its session."""
    made = events(database, 1)
    stays = join(made, LONG_SESSION)
    made.stream.produce(100)
    lands(made)
    config = {"kafka": {"properties": LONG_SESSION}, "postgres": {"dsn": database}}
    handlers = {"events": handler(made.stream.topic, "events", write="append") | made.keys}
    goes = daemon(handlers, config, "--until-end", wait=False)
    assert goes.process.wait(TIMEOUT) == 0
    wait_until(lambda: members(kafka, made.stream.topic) == 1, SHORT, "a group of one member")
    assert stays.stop() == 0
    check(made)
