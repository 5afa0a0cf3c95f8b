"""Stops, hand-overs and the memory bound: nothing is lost, nothing is doubled, nothing hangs."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Producer

from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import wait_until

TIMEOUT = 30  # seconds for anything that a test waits for
MIB = 1024 * 1024
NOT_DRAINED = 75


def handler(topic: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler of ``topic`` that appends to table t."""
    return {
        "topics": [topic],
        "table": {"name": "t", "write": "append"},
        "dead_letter": {"create": True},
        "retry": {"max": "1s"},
        **more,
    }


def execute(database: str, statement: str) -> list[tuple[Any, ...]]:
    """Run SQL and return its rows, if it has any."""
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def ids(database: str) -> list[int]:
    """Return all ids of table t, doubles included."""
    return [number for (number,) in execute(database, "SELECT id FROM t ORDER BY id")]


def count(database: str) -> int:
    """Count the rows of table t."""
    ((rows,),) = execute(database, "SELECT count(*) FROM t")
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


def holds(daemon: Daemon, name: str) -> list[int]:
    """Return the partitions that a handler writes."""
    return [each["partition"] for each in daemon.status()["handlers"][name]["partitions"]]


@contextmanager
def locked(database: str) -> Iterator[None]:
    """Lock table t against writers; whatever waits for it goes on after."""
    with psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        yield


def blocked(database: str) -> Callable[[], bool]:
    """Tell whether a session waits for the lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return lambda: execute(database, waiting) != []


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
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic()
    run = daemon({"late": handler(name)}, {"daemon": {"drain_timeout": "2s"}})
    with locked(database):
        send(kafka, name, range(100))
        wait_until(blocked(database), TIMEOUT, "a write that waits")
        began = time.monotonic()
        assert NOT_DRAINED == run.stop()
        assert 1.5 < time.monotonic() - began < 10
    assert [] == ids(database)
    run.start()
    wait_until(lambda: count(database) >= 100, TIMEOUT, "the rows")
    assert 0 == run.stop()
    assert list(range(100)) == ids(database)


def test_a_second_signal_ends_it_at_once(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A second SIGTERM while draining exits with 75 at once, whatever drain_timeout says, and loses nothing."""
    execute(database, "CREATE TABLE t (id bigint)")
    name = topic()
    run = daemon({"second": handler(name)}, {"daemon": {"drain_timeout": "1h"}})
    with locked(database):
        send(kafka, name, range(100))
        wait_until(blocked(database), TIMEOUT, "a write that waits")
        run.process._popen.send_signal(signal.SIGTERM)
        wait_until(lambda: '"message":"stopping"' in run.logs(), TIMEOUT, "the drain")
        began = time.monotonic()
        assert NOT_DRAINED == run.stop()
        assert time.monotonic() - began < 3
    run.start()
    wait_until(lambda: count(database) >= 100, TIMEOUT, "the rows")
    assert 0 == run.stop()
    assert list(range(100)) == ids(database)


class Load(threading.Thread):
    """Produces ids in turns to each partition, steadily, until told to end."""

    RATE = 2_000  # messages a second

    def __init__(self, kafka: KafkaServer, topic: str, partitions: int) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._producer = Producer({"bootstrap.servers": kafka.bootstrap})
        self._topic = topic
        self._partitions = partitions
        self._end = threading.Event()

    def run(self) -> None:
        """Produce 50 times a second."""
        while not self._end.wait(0.02):
            for _ in range(self.RATE // 50):
                self._producer.produce(self._topic, b'{"id": %d}' % self.sent, partition=self.sent % self._partitions)
                self.sent += 1
            self._producer.poll(0)

    def end(self) -> int:
        """Stop, and return how many messages the broker has."""
        self._end.set()
        self.join()
        assert self._producer.flush(TIMEOUT) == 0
        return self.sent


def test_members_come_and_go_under_load(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon
) -> None:
    """A second member takes half, and gives it back at its stop: no row is lost or doubled, and what stays goes on."""
    execute(database, "CREATE TABLE t (id bigint, at timestamptz DEFAULT clock_timestamp())")
    partitions = 4
    name = topic(partitions=partitions)
    made = {"shared": handler(name, batch={"max_age": "100ms"}, columns={"id": "id"})}
    load = Load(kafka, name, partitions)
    first = daemon(made)
    load.start()
    wait_until(lambda: count(database) > 0, TIMEOUT, "the first rows")
    second = daemon(made)
    wait_until(lambda: len(holds(second, "shared")) == 2, TIMEOUT, "the second's half")
    kept = set(holds(first, "shared"))
    written = count(database)
    wait_until(lambda: count(database) > written + Load.RATE, TIMEOUT, "a second of both")
    assert sorted(kept | set(holds(second, "shared"))) == list(range(partitions))
    assert 0 == second.stop()
    wait_until(lambda: len(holds(first, "shared")) == partitions, TIMEOUT, "the other half")
    sent = load.end()
    wait_until(lambda: count(database) >= sent, TIMEOUT, "all rows")
    assert 0 == first.stop()
    assert list(range(sent)) == ids(database)
    pauses = execute(
        database,
        f"SELECT p, max(extract(epoch FROM pause))::float8 FROM (SELECT id % {partitions} AS p, at - lag(at) OVER "
        f"(PARTITION BY id % {partitions} ORDER BY at) AS pause FROM t) AS pauses GROUP BY p",
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
    idle = memory(run)
    with locked(database):
        send(kafka, name, range(messages), partitions=partitions, filling=b"x" * 10_000)
        wait_until(blocked(database), TIMEOUT, "a write that waits")
        highest = idle
        enough = time.monotonic() + 5  # long past PAUSE_AFTER; what leaks would go on growing

        def watched() -> bool:
            nonlocal highest
            highest = max(highest, memory(run))
            return time.monotonic() > enough

        wait_until(watched, TIMEOUT, "memory to grow")
        assert 200 == run.get("/healthz")[0]
    wait_until(lambda: count(database) >= messages, TIMEOUT, "all rows")
    assert list(range(messages)) == ids(database)
    assert highest < idle + (32 + 64) * MIB, f"{highest / MIB:.0f} MiB, idle {idle / MIB:.0f} MiB"


def memory(daemon: Daemon) -> int:
    """Return the resident memory of the daemon's process, in bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
