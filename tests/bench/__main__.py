"""`make bench`: rows/s of the daemon from a real broker, next to one raw binary COPY of the same rows in the same run.

Ratios count, not figures: the machine is shared. The raw COPY is Postgres's own ceiling for one connection: rows
encoded beforehand, one transaction.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psycopg
from confluent_kafka import Producer

from consumerd.catalog import Column
from consumerd.formats.json import Field, decoder
from consumerd.sinks.copy import Packer
from tests.servers.daemon import Daemon, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer
from tests.servers.process import free_port

TOPIC = "bench"
PARTITIONS = 6
COLUMNS = (
    ("id", 20, "bigint", True),
    ("ts", 1184, "timestamptz", True),
    ("n", 23, "integer", False),
    ("name", 25, "text", False),
    ("d", 701, "double precision", False),
    ("o", 3802, "jsonb", False),
)
TABLE = "CREATE TABLE {name} ({columns}, PRIMARY KEY (id))"
LIMIT = 300
"""Seconds for one run."""
LOOK = 0.02
"""Seconds between two looks at how far the daemon is."""


def value(number: int) -> bytes:
    """Return a message of about 125 bytes."""
    record = {
        "id": number,
        "ts": f"2026-11-23T10:15:00.{number % 1_000_000:06}Z",
        "n": number % 1000,
        "name": f"customer {number}",
        "d": number * 1.5,
        "o": {"a": number, "b": "x", "c": [1, 2]},
    }
    return msgspec.json.encode(record)


def fill(kafka: KafkaServer, count: int) -> int:
    """Send the messages; return the bytes of their values."""
    kafka.make_topic(TOPIC, PARTITIONS)
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "linger.ms": 50, "compression.type": "lz4"})
    size = 0
    for number in range(count):
        message = value(number)
        size += len(message)
        while True:
            try:
                producer.produce(TOPIC, message, partition=number % PARTITIONS)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()
    return size


def make_table(dsn: str, name: str) -> None:
    """Make an empty table."""
    columns = ", ".join(f"{column} {kind}{' NOT NULL' if needed else ''}" for column, _, kind, needed in COLUMNS)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f"DROP TABLE IF EXISTS {name}")
        conn.execute(TABLE.format(name=name, columns=columns))
        conn.execute("DROP SCHEMA IF EXISTS consumerd CASCADE")  # a new group into an old target is refused
        conn.execute("CHECKPOINT")


def packed(count: int) -> list[bytes]:
    """Return the rows of all messages as COPY data, in pieces."""
    columns = [
        Column(name=name, oid=oid, typmod=-1, type_name=kind, not_null=needed, automatic=False)
        for name, oid, kind, needed in COLUMNS
    ]
    decode = decoder(tuple(Field(column=column, path=(column.name,)) for column in columns))
    data = Packer(column.oid for column in columns).pack(decode(value(number)) for number in range(count))
    return [bytes(data[at : at + (1 << 17)]) for at in range(0, len(data), 1 << 17)]


def raw_copy(dsn: str, pieces: list[bytes], count: int) -> float:
    """Return rows/s of one binary COPY in one transaction."""
    make_table(dsn, "raw")
    with psycopg.connect(dsn) as conn:
        started = time.perf_counter()
        with conn.cursor().copy("COPY raw FROM STDIN (FORMAT binary)") as copy:
            for piece in pieces:
                copy.write(piece)
        conn.commit()
        return count / (time.perf_counter() - started)


def carry(dsn: str, kafka: KafkaServer, count: int, folder: Path, write: str) -> tuple[float, float]:
    """Return the daemon's rows/s from its first row to its last, and its peak RSS in MiB."""
    table = f"{write}_table"
    make_table(dsn, table)
    group = f"{write}-{time.time_ns()}"
    handler = {
        "topics": [TOPIC],
        "group_id": group,
        "table": {"name": table, "write": write, **({"key": ["id"]} if write == "upsert" else {})},
        "dead_letter": {"create": True},
    }
    config = {
        "kafka": {"bootstrap_servers": kafka.bootstrap},
        "postgres": {"dsn": dsn},
        "daemon": {"listen": f"127.0.0.1:{free_port()}"},
    }
    run = Daemon(write_config(folder / group, config, {write: handler}))
    with psycopg.connect(dsn, autocommit=True) as conn:
        run.start()
        try:
            first = wait_for(lambda: reached(conn, group, 1))
            ended = wait_for(lambda: reached(conn, group, count))
            peak = peak_rss(run.process.pid)
        finally:
            run.stop()
        assert conn.execute(f"SELECT count(*) FROM {table}").fetchone() == (count,)
    return count / (ended - first), peak


def reached(conn: psycopg.Connection, group: str, count: int) -> bool:
    """Whether a group's checkpoints have passed so many messages."""
    if conn.execute("SELECT to_regclass('consumerd.checkpoint')").fetchone() == (None,):
        return False
    row = conn.execute("SELECT sum(next_offset) FROM consumerd.checkpoint WHERE group_id = %s", [group]).fetchone()
    return bool(row and row[0] and row[0] >= count)


def wait_for(condition: Callable[[], bool]) -> float:
    """Wait until a condition holds, and return when that was; a halted daemon does not hold it up for ever."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the daemon was not done within {LIMIT} s")
        time.sleep(LOOK)
    return time.perf_counter()


def peak_rss(pid: int) -> float:
    """Return a process's peak resident memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Run the measurements in turn, so that what the machine does meets all of them alike, and print the table."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    arguments.add_argument("-n", "--messages", type=int, default=1_000_000)
    arguments.add_argument("-r", "--runs", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="consumerd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        for part in ("kafka", "postgres"):
            (folder / part).mkdir()
        kafka, postgres = KafkaServer(folder / "kafka"), PostgresServer(folder / "postgres")
        try:
            kafka.start()
            postgres.start()
            size = fill(kafka, options.messages)
            print(f"{options.messages} messages of {size / options.messages:.0f} bytes in {PARTITIONS} partitions")
            pieces = packed(options.messages)
            raw, append, upsert = [], [], []
            for _ in range(options.runs):
                raw.append(raw_copy(postgres.dsn, pieces, options.messages))
                append.append(carry(postgres.dsn, kafka, options.messages, folder, "append"))
                upsert.append(carry(postgres.dsn, kafka, options.messages, folder, "upsert"))
        finally:
            kafka.close()
            postgres.close()
    ceiling = statistics.median(raw)
    print(f"{'medians of ' + str(options.runs):32} {'rows/s':>10} {'of raw':>7} {'peak RSS MiB':>13}")
    print(f"{'raw binary COPY, one transaction':32} {ceiling:10,.0f} {1:7.2f}")
    for label, runs in (("consumerd, append", append), ("consumerd, upsert, new keys", upsert)):
        rate = statistics.median(rate for rate, _ in runs)
        print(f"{label:32} {rate:10,.0f} {rate / ceiling:7.2f} {max(peak for _, peak in runs):13.0f}")


if __name__ == "__main__":
    main()
