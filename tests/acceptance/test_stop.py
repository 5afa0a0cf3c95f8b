"""Stops, hand-overs and the memory bound: nothing is lost, nothing is doubled, nothing hangs."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Producer

from tests.acceptance.events import MakeEvents, held
from tests.acceptance.stream import COLUMNS
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until
from tests.servers.sql import blocked, execute, locked

TIMEOUT = 30  # seconds for anything that a test waits for
NOT_DRAINED = 75
RATE = 2_000
"""Messages/s while members come and go."""


def handler(topic: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler of ``topic`` that appends to table t."""
    return {
        "topics": [topic],
        "table": {"name": "t", "write": "append"},
        "dead_letter": {"create": True},
        "retry": {"max": "1s"},
        **more,
    }


def ids(database: str) -> list[int]:
    """Return all ids of table t, doubles included."""
    return [number for (number,) in execute(database, "SELECT id FROM t ORDER BY id")]


def count(database: str, table: str = "t") -> int:
    """Count the rows of a table."""
    ((rows,),) = execute(database, f"SELECT count(*) FROM {table}")
    return int(rows)


def send(kafka: KafkaServer, topic: str, numbers: range, partitions: int = 1, filling: bytes = b"") -> None:
    """Produce a message with an id for each number, in turns to each partition."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "queue.buffering.max.kbytes": 1_000_000})
    for number in numbers:
        value = b'{"id": %d, "filling": "%s"}' % (number, filling)
        producer.produce(topic, value, partition=number % partitions)
        producer.poll(0)
    assert producer.flush(TIMEOUT) == 0


def consumed(daemon: Daemon, name: str) -> int:
    """Return how many messages a handler has received."""
    return int(daemon.status()["handlers"][name]["consumed"])


@contextmanager
def writing(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, drain_timeout: str
) -> Iterator[Daemon]:
    """Give a daemon whose write waits for its table; ended in the block, it must write all of it once when started."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic()
    run = daemon({"writing": handler(name)}, {"daemon": {"drain_timeout": drain_timeout}})
    with locked(database, "t"):
        send(kafka, name, range(100))
        wait_until(lambda: blocked(database), TIMEOUT, "a write that waits")
        yield run
    assert [] == ids(database)
    run.start()
    wait_until(lambda: count(database) >= 100, TIMEOUT, "the rows")
    assert 0 == run.stop()
    assert list(range(100)) == ids(database)


def test_a_clean_stop_writes_what_is_gathered_and_repeats_nothing(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """SIGTERM writes messages that would have waited for an hour, commits them, exits 0; the next run repeats none."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic(partitions=3)
    run = daemon({"stop": handler(name, batch={"max_age": "1h"})})
    send(kafka, name, range(1_000), partitions=3)
    wait_until(lambda: consumed(run, "stop") == 1_000, TIMEOUT, "messages to gather")
    assert 0 == count(database)
    assert 0 == run.stop()
    assert list(range(1_000)) == ids(database)

    send(kafka, name, range(1_000, 1_010), partitions=3)
    run.start()
    run.wait_ready()
    wait_until(lambda: consumed(run, "stop") == 10, TIMEOUT, "the new messages")
    assert 0 == run.stop()
    assert list(range(1_010)) == ids(database)
    assert "Postgres went back" not in run.logs()
    assert "operator" not in run.logs()


def test_a_drain_that_takes_too_long_ends_with_75_and_loses_nothing(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """With its table locked the daemon gives up after drain_timeout, and writes all of it once, at the next start."""
    with writing(kafka, database, topic, daemon, "2s") as run:
        began = time.monotonic()
        assert NOT_DRAINED == run.stop()
        assert 1.5 < time.monotonic() - began < 10


def test_a_second_signal_ends_it_at_once(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A second SIGTERM while draining exits with 75 at once, whatever drain_timeout says, and loses nothing."""
    with writing(kafka, database, topic, daemon, "1h") as run:
        run.process._popen.send_signal(signal.SIGTERM)
        wait_until(lambda: '"message":"stopping"' in run.logs(), TIMEOUT, "the drain")
        began = time.monotonic()
        assert NOT_DRAINED == run.stop()
        assert time.monotonic() - began < 3


def test_members_come_and_go_under_load(database: str, events: MakeEvents) -> None:
    """A second member takes half, and gives it back at its stop: no row is lost or doubled, and what stays goes on."""
    made = events(database, 4, batch={"max_age": "100ms"}, columns=COLUMNS)
    execute(database, "ALTER TABLE events ADD COLUMN at timestamptz DEFAULT clock_timestamp()")
    first = made.start()
    with made.stream.flowing(RATE):
        wait_until(lambda: made.written() > 0, TIMEOUT, "the first rows")
        second = made.start()
        wait_until(lambda: len(held(second)) == 2, TIMEOUT, "the second's half")
        kept = set(held(first))
        written = count(database, "events")
        wait_until(lambda: count(database, "events") > written + RATE, TIMEOUT, "a second of both")
        assert sorted(kept | set(held(second))) == list(range(4))
        assert 0 == second.stop()
        wait_until(lambda: len(held(first)) == 4, TIMEOUT, "the other half")
    made.run = first
    made.catches_up()
    assert 0 == first.stop()
    made.stream.check(database)
    pauses = execute(
        database,
        "SELECT p, max(extract(epoch FROM pause))::float8 FROM (SELECT n % 4 AS p, at - lag(at) OVER "
        "(PARTITION BY n % 4 ORDER BY at) AS pause FROM events) AS pauses GROUP BY p",
    )
    assert [] == [pause for pause in pauses if pause[0] in kept and pause[1] > 3]


def test_memory_stays_bounded_however_long_the_table_is_locked(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """300 MB of backlog and a locked table cost max_buffered, not 300 MB; unlocked, all of it lands once."""
    execute(database, "CREATE TABLE t (id bigint)")
    partitions, messages = 4, 30_000
    name = topic(partitions=partitions)
    given = {"daemon": {"max_buffered": "32MiB"}}
    made = {"bounded": handler(name, columns={"id": "id"})}
    run = daemon(made, given)
    idle = run.memory()
    with locked(database, "t"):
        send(kafka, name, range(messages), partitions=partitions, filling=b"x" * 10_000)
        wait_until(lambda: blocked(database), TIMEOUT, "a write that waits")
        highest = idle
        enough = time.monotonic() + 5  # long past PAUSE_AFTER; what leaks would go on growing

        def watched() -> bool:
            nonlocal highest
            highest = max(highest, run.memory())
            return time.monotonic() > enough

        wait_until(watched, TIMEOUT, "memory to grow")
        assert 200 == run.get("/healthz")[0]
    wait_until(lambda: count(database) >= messages, TIMEOUT, "all rows")
    assert list(range(messages)) == ids(database)
    assert highest < idle + 32 + 64, f"{highest:.0f} MiB, idle {idle:.0f} MiB"
