"""P8, rule 29: what is fetched, buffered and in flight stays under `max_buffered`, whatever the backlog.

The measure is the kernel's: the daemon's highest resident memory over that of the same daemon on the empty topic, at
most the bound and one decompressed fetch, and a fifth more. The full sizes are in `tests/bench/memory.py`.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import psycopg
import pytest
from confluent_kafka import Producer

from tests.acceptance.events import held, members, state
from tests.acceptance.test_stop import handler, ids
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import wait_until
from tests.servers.sql import execute

MIB = 1 << 20
BOUND = 64
"""MiB: the backlogs are four times as large and more."""
TOLERANCE = 1.2
PARTITIONS = 64
TIMEOUT = 60
POLL_INTERVAL = 6.0
"""Seconds after which a member that does not poll leaves its group (`max.poll.interval.ms`)."""
CONFIG = {
    "daemon": {"max_buffered": f"{BOUND}MiB"},
    "kafka": {"properties": {"max.poll.interval.ms": int(POLL_INTERVAL * 1000)}},
}


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """What is sent: so many messages with `filling` in their values."""

    count: int
    filling: bytes
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    compression: str = "none"
    own: int = 0
    """Bytes of a value that are random, so that it is not compressed to nothing."""


LARGE = Backlog(count=200, filling=b"x" * 1_000_000)
HEAVY = Backlog(
    count=50_000, filling=b"x" * 60, key=b"k" * 1_000, headers=tuple((f"h{n}", bytes(1_000)) for n in "abcde")
)
BOMB = Backlog(count=256, filling=b"x" * 1_000_000, compression="gzip")
"""Fetches of a few kB that become hundreds of times as much."""
COMPRESSED = Backlog(count=3_000, filling=b"x" * 100_000, compression="zstd", own=1_000)


def send(kafka: KafkaServer, topic: str, backlog: Backlog) -> None:
    """Send a backlog, in turns to each partition."""
    settings = {"bootstrap.servers": kafka.bootstrap, "compression.type": backlog.compression, "linger.ms": 50}
    producer = Producer({**settings, "queue.buffering.max.kbytes": 1_000_000, "message.max.bytes": 2_000_000})
    for number in range(backlog.count):
        filling = os.urandom(backlog.own).hex().encode() + backlog.filling[2 * backlog.own :]
        value = b'{"id": %d, "filling": "%s"}' % (number, filling)
        producer.produce(topic, value, backlog.key, partition=number % PARTITIONS, headers=list(backlog.headers))
        producer.poll(0)
    assert producer.flush(TIMEOUT) == 0


@contextmanager
def on_the_backlog(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, backlog: Backlog
) -> Iterator[tuple[Daemon, Callable[[], None]]]:
    """Run a daemon whose table is locked on a backlog, until the buffers are full; give what checks its memory."""
    execute(database, "CREATE TABLE t (id bigint, filling text)")
    name = topic(PARTITIONS)
    run = daemon({"bounded": handler(name)}, CONFIG | {"postgres": {"dsn": database}})
    idle = run.memory()
    assert run.stop() == 0
    send(kafka, name, backlog)
    with closing(psycopg.connect(database)) as lock:
        lock.execute("LOCK TABLE t")
        run.start()
        run.wait_ready()
        wait_until(full(run), TIMEOUT, "the buffers to fill")
        yield run, lambda: check_bounded(run, idle, BOUND + decompressed_fetch(kafka, name, backlog))


def full(run: Daemon) -> Callable[[], bool]:
    """Return whether what was consumed has stopped to grow: for a second, and it is not nothing."""
    seen, since = 0, 0.0

    def at_rest() -> bool:
        nonlocal seen, since
        consumed = int(run.status()["handlers"]["bounded"]["consumed"])
        if consumed != seen:
            seen, since = consumed, time.monotonic()
        return seen > 0 and time.monotonic() - since > 1

    return at_rest


def decompressed_fetch(kafka: KafkaServer, topic: str, backlog: Backlog) -> float:
    """Return the MiB that a fetch from a topic becomes."""
    log = sum(path.stat().st_size for path in (kafka.folder / "data").glob(f"{topic}-*/*.log"))
    wire = BOUND * MIB // 128
    return max(wire * len(backlog.filling) * backlog.count / log, len(backlog.filling)) / MIB


def check_bounded(run: Daemon, idle: float, promised: float) -> None:
    """Compare the peak with what is promised, and what the daemon says of itself."""
    peak = run.memory("VmHWM") - idle
    assert peak <= TOLERANCE * promised, f"{peak:.0f} MiB over {idle:.0f} MiB when idle; {promised:.0f} are promised"
    metrics = run.metrics()
    limit = metrics['consumerd_buffer_limit_bytes{handler="bounded"}']
    assert metrics['consumerd_buffered_bytes{handler="bounded"}'] <= limit <= BOUND * MIB
    assert run.get("/healthz")[0] == 200


def check_written(run: Daemon, database: str, backlog: Backlog) -> None:
    """Wait for everything to be written, and find it there once."""

    def written() -> bool:
        found = run.status()["handlers"]["bounded"]
        assert found["halt"] is None
        return bool(found["lag_messages"] == 0 and found["written"] >= backlog.count)

    wait_until(written, TIMEOUT, "the end of the backlog")
    assert ids(database) == list(range(backlog.count))


def test_large_messages_and_a_stopped_database(
    kafka: KafkaServer,
    breakable_postgres: PostgresServer,
    breakable_database: str,
    topic: MakeTopic,
    daemon: MakeDaemon,
) -> None:
    """P8: 1 MB messages in 64 partitions cost the bound while Postgres is stopped, the member stays; later all lands.

    More than `max.poll.interval.ms` goes by, so the partitions were paused and polled.
    """
    with on_the_backlog(kafka, breakable_database, topic, daemon, LARGE) as (run, check):
        breakable_postgres.stop()
        try:
            wait_until(lambda: state(run, "bounded") == "waiting", TIMEOUT, "the state `waiting`")
            stopped = time.monotonic()
            wait_until(lambda: time.monotonic() > stopped + POLL_INTERVAL + 2, TIMEOUT, "a poll to be missed")
            assert len(held(run, "bounded")) == PARTITIONS
            assert members(kafka, "consumerd.bounded") == 1
            check()
            assert run.metrics()['consumerd_buffered_bytes{handler="bounded"}'] > 0
        finally:
            breakable_postgres.start()
    check_written(run, breakable_database, LARGE)
    assert run.metrics()['consumerd_rebalances_total{handler="bounded"}'] == 1
    check()


@pytest.mark.parametrize("backlog", [COMPRESSED, BOMB, HEAVY], ids=["compressed", "bomb", "keys and headers"])
def test_what_values_do_not_show(
    kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon, backlog: Backlog
) -> None:
    """P8: fetches compressed 100:1, and keys and headers far larger than their values, are within the bound too."""
    with on_the_backlog(kafka, database, topic, daemon, backlog) as (run, check):
        check()
    check_written(run, database, backlog)
    check()
