"""`python -m tests.bench.memory`: the daemon's resident memory above an idle daemon's, next to what is promised.

A backlog far larger than the bound lies in the topic when the daemon starts. First the table is locked, so the buffers
fill; then Postgres is stopped; then it is back and the daemon writes. The peak is the kernel's (VmHWM), over all three.
The slow database takes a while for each statement instead. Nothing of the backlog fits into the bound, so most of a
run ends before its topic does; each handler reads the whole topic in a group of its own.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
from confluent_kafka import KafkaError, Message, Producer

from consumerd.brokers import fetch_bytes
from consumerd.budget import LIBRDKAFKA_SHARE
from tests.servers.daemon import Daemon, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import free_port, wait_until

MIB = 1 << 20
LOCKED, STOPPED, DRAINING, SLOW = 8.0, 8.0, 8.0, 20.0
"""Seconds of each phase: far longer than the buffers take to fill."""
FIRST_BYTES = 60.0
"""Seconds until the first messages are there."""
IDLE = 3.0
"""Seconds that an idle daemon is given to come to rest."""
TOLERANCE = 1.2
FETCH_TIMEOUT = 120.0
SLOW_TRIGGER = """
CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END'"""
OWN = 2_000
"""Bytes of a value that are random, at most: gzip finds no repetition farther away than 32 kB."""
LARGEST = 250 * MIB
"""The largest message of any case; the broker takes it as its compressed batch."""


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """What lies in a topic."""

    size: int
    """Bytes of a value."""
    count: int
    partitions: int = 64
    key: int = 0
    headers: int = 0
    compression: str = "none"
    """Anything but none sends values of which a small part is repeated: about 100:1, and 1000:1 for the largest."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    name: str
    backlog: Backlog
    bound: int = 256
    """MiB."""
    handlers: int = 1
    slow: bool = False


MB1 = Backlog(size=1_000_000, count=5_000)
KB100 = Backlog(size=100_000, count=15_000)
KB1 = Backlog(size=1_000, count=1_000_000)
B100 = Backlog(size=100, count=2_000_000)
MB1_600 = Backlog(size=1_000_000, count=3_000, partitions=600)
MB1_1 = Backlog(size=1_000_000, count=2_000, partitions=1)
KB100_ZSTD = Backlog(size=100_000, count=50_000, compression="zstd")
KB1_GZIP = Backlog(size=1_000, count=2_000_000, compression="gzip")
KEYS = Backlog(size=100, count=800_000, key=1_000)
HEADERS = Backlog(size=100, count=300_000, key=1_000, headers=5)
BOMB = Backlog(size=50_000_000, count=40, partitions=4, compression="gzip")

CASES = (
    *(Case(name=f"1 MB, stopped, {bound} MiB", backlog=MB1, bound=bound) for bound in (64, 256, 512)),
    Case(name="1 MB, slow", backlog=MB1, slow=True),
    Case(name="1 MB, four handlers", backlog=MB1, bound=512, handlers=4),
    Case(name="1 MB, 600 partitions", backlog=MB1_600),
    Case(name="1 MB, 1 partition", backlog=MB1_1),
    Case(name="100 kB", backlog=KB100),
    Case(name="1 kB", backlog=KB1),
    Case(name="100 B, 64 MiB", backlog=B100, bound=64),
    Case(name="100 B", backlog=B100),
    Case(name="100 B, 512 MiB", backlog=B100, bound=512),
    Case(name="100 B, slow", backlog=B100, slow=True),
    Case(name="100 kB zstd, 64 MiB", backlog=KB100_ZSTD, bound=64),
    Case(name="100 kB zstd", backlog=KB100_ZSTD),
    Case(name="100 kB zstd, slow", backlog=KB100_ZSTD, slow=True),
    Case(name="1 kB gzip", backlog=KB1_GZIP),
    Case(name="keys of 1 kB", backlog=KEYS),
    Case(name="keys and headers", backlog=HEADERS),
    Case(name="keys and headers, 64 MiB", backlog=HEADERS, bound=64),
    *(Case(name=f"50 MB gzip, {bound} MiB", backlog=BOMB, bound=bound) for bound in (256, 512)),
)


def fill(kafka: KafkaServer, topic: str, backlog: Backlog) -> None:
    """Make a topic and send its backlog."""
    kafka.make_topic(topic, backlog.partitions)
    producer = Producer(
        {
            "bootstrap.servers": kafka.bootstrap,
            "linger.ms": 50,
            "compression.type": backlog.compression,
            "message.max.bytes": LARGEST,
            "queue.buffering.max.kbytes": 512 * 1024,
            "batch.size": MIB,
            "log_level": 2,
        }
    )
    chance = random.Random(1)
    noise = chance.randbytes(backlog.size).hex()
    key = b"k" * backlog.key or None
    headers: list[tuple[str, str | bytes | None]] = [(f"header-{n}", b"h" * 1_000) for n in range(backlog.headers)]
    refused: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            refused.append(error)

    for number in range(backlog.count):
        prefix = f'{{"n": {number}, "body": "'
        if backlog.compression == "none":
            at = number % 1_000
            filling = noise[at : at + backlog.size - len(prefix) - 2]
        else:
            own = chance.randbytes(max(1, min(OWN, backlog.size // 150))).hex()
            filling = own * (backlog.size // len(own) + 1)
        value = f'{prefix}{filling[: backlog.size - len(prefix) - 2]}"}}'
        while True:
            try:
                producer.produce(
                    topic, value, key, partition=number % backlog.partitions, headers=headers, on_delivery=delivered
                )
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    assert producer.flush(FETCH_TIMEOUT) == 0
    assert not refused, refused[0]


def compressed_share(kafka: KafkaServer, topic: str, backlog: Backlog) -> float:
    """Return the bytes of the values over the bytes of the topic's log: how much larger a fetch gets."""
    log = sum(path.stat().st_size for path in (kafka.folder / "data").glob(f"{topic}-*/*.log"))
    return max(1.0, backlog.size * backlog.count / log)


@contextmanager
def running(folder: Path, kafka: KafkaServer, postgres: PostgresServer, case: Case, topic: str) -> Iterator[Daemon]:
    """Run a daemon with the case's bound and handlers."""
    handlers = {
        name: {
            "topics": [topic],
            "group_id": f"{name}-{time.time_ns()}",
            "table": {"name": name, "write": "append"},
            "dead_letter": {"create": True, "topic": f"{topic}.dlq"},
            "retry": {"max": "1s"},
        }
        for name in names(case)
    }
    config = {
        "kafka": {"bootstrap_servers": kafka.bootstrap},
        "postgres": {"dsn": postgres.dsn},
        "daemon": {"listen": f"127.0.0.1:{free_port()}", "max_buffered": f"{case.bound}MiB"},
    }
    daemon = Daemon(write_config(folder / str(time.time_ns()), config, handlers))
    daemon.start()
    try:
        daemon.wait_ready(60)
        yield daemon
    finally:
        daemon.close()


def names(case: Case) -> list[str]:
    """Return the names of a case's handlers, which are their tables' too."""
    return [f"h{number}" for number in range(case.handlers)]


def make_tables(conn: psycopg.Connection, case: Case) -> None:
    """Make the tables and forget all checkpoints; locked until the connection ends, or slow."""
    conn.execute("DROP SCHEMA IF EXISTS consumerd CASCADE")
    conn.execute(SLOW_TRIGGER)
    for name in names(case):
        conn.execute(f"DROP TABLE IF EXISTS {name}")
        conn.execute(f"CREATE TABLE {name} (n bigint, body text)")
        if case.slow:
            conn.execute(f"CREATE TRIGGER slow AFTER INSERT ON {name} EXECUTE FUNCTION slow()")
    conn.commit()
    if not case.slow:
        conn.execute(f"LOCK TABLE {', '.join(names(case))}")


def idle(folder: Path, kafka: KafkaServer, postgres: PostgresServer, case: Case, topic: str) -> float:
    """Return the resident memory of a daemon that has joined, in MiB, on a topic that is empty."""
    with closing(psycopg.connect(postgres.dsn)) as conn:
        make_tables(conn, case)
    with running(folder, kafka, postgres, case, topic) as daemon:
        time.sleep(IDLE)
        return daemon.memory()


def peak(folder: Path, kafka: KafkaServer, postgres: PostgresServer, case: Case, topic: str) -> float:
    """Return the peak resident memory of a daemon on the backlog, in MiB."""
    with closing(psycopg.connect(postgres.dsn)) as conn:
        make_tables(conn, case)
        with running(folder, kafka, postgres, case, topic) as daemon:
            wait_until(lambda: consumed(daemon, case.handlers), FIRST_BYTES, "the first messages")
            if case.slow:
                time.sleep(SLOW)
            else:
                time.sleep(LOCKED)
                postgres.stop()
                time.sleep(STOPPED)
                postgres.start()
                time.sleep(DRAINING)
            assert all(handler["halt"] is None for handler in daemon.status()["handlers"].values())
            return daemon.memory("VmHWM")


def consumed(daemon: Daemon, handlers: int) -> bool:
    """Whether each handler has received something."""
    found = daemon.status()["handlers"].values()
    return len(found) == handlers and all(handler["consumed"] for handler in found)


def main() -> None:
    """Measure the cases whose names hold one of the given words, and print the table."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=__doc__)
    arguments.add_argument("words", nargs="*")
    options = arguments.parse_args()
    cases = [case for case in CASES if not options.words or any(word in case.name for word in options.words)]
    print(
        f"{'case':26} {'bound':>6} {'fetch':>6} {'idle':>6} {'peak':>6} {'over':>6} {'allowed':>8}  (MiB)", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="consumerd-memory-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        for part in ("kafka", "postgres"):
            (folder / part).mkdir()
        limits = {"message.max.bytes": str(LARGEST), "socket.request.max.bytes": str(2 * LARGEST)}
        kafka, postgres = KafkaServer(folder / "kafka", limits), PostgresServer(folder / "postgres")
        topics: dict[Backlog, str] = {}

        def topic_of(backlog: Backlog) -> str:
            if backlog not in topics:
                topics[backlog] = f"backlog-{len(topics)}"
                fill(kafka, topics[backlog], backlog)
            return topics[backlog]

        try:
            kafka.start()
            postgres.start()
            for case in cases:
                topic, empty = topic_of(case.backlog), topic_of(replace(case.backlog, count=0))
                at_rest = idle(folder, kafka, postgres, case, empty)
                highest = peak(folder, kafka, postgres, case, topic)
                share = compressed_share(kafka, topic, case.backlog)
                wire = fetch_bytes(int(case.bound * MIB / case.handlers * LIBRDKAFKA_SHARE))
                fetch = case.handlers * max(wire * share, case.backlog.size) / MIB
                allowed = TOLERANCE * (case.bound + fetch)
                over = highest - at_rest
                print(
                    f"{case.name:26} {case.bound:6} {fetch:6.0f} {at_rest:6.0f} {highest:6.0f} {over:6.0f} "
                    f"{allowed:8.0f}  {'holds' if over <= allowed else 'BROKEN'}",
                    flush=True,
                )
        finally:
            kafka.close()
            postgres.close()


if __name__ == "__main__":
    main()
