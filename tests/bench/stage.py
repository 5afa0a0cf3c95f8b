"""Where measurements take place: one broker, one Postgres (its own settings, fsync on), topics that are filled once."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
from confluent_kafka import Producer

from consumerd.catalog import Column
from consumerd.formats.json import decoder
from consumerd.formats.values import Field
from consumerd.sinks.copy import SIGNATURE, TRAILER, CopyData, Packer
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PIECE = 1 << 17
"""Bytes that a raw COPY is handed at a time."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a message holds, and the table for it. Columns: name, type's oid, type, NOT NULL."""

    columns: tuple[tuple[str, int, str, bool], ...] = (
        ("id", 20, "bigint", True),
        ("ts", 1184, "timestamptz", True),
        ("n", 23, "integer", False),
        ("name", 25, "text", False),
        ("d", 701, "double precision", False),
        ("o", 3802, "jsonb", False),
    )
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Values that are the same in each message, for columns beside the six."""
    keys: int | None = None
    """Different keys; None: each message has its own."""
    primary_key: bool = True

    def value(self, number: int) -> bytes:
        """Return a message; of the six columns alone it has about 125 bytes."""
        key = number if self.keys is None else number % self.keys
        record = {
            "id": key,
            "ts": f"2026-11-23T10:15:00.{number % 1_000_000:06}Z",
            "n": number % 1000,
            "name": f"customer {number}",
            "d": number * 1.5,
            "o": {"a": number, "b": "x", "c": [1, 2]},
            **self.extra,
        }
        return msgspec.json.encode({name: record[name] for name, *_ in self.columns})

    def table(self, name: str) -> str:
        """Return the statement that makes the table."""
        columns = ", ".join(
            f"{column} {kind}{' NOT NULL' if needed else ''}" for column, _, kind, needed in self.columns
        )
        return f"CREATE TABLE {name} ({columns}{', PRIMARY KEY (id)' if self.primary_key else ''})"

    def packed(self, first: int, count: int, *, step: int = 1, ordinal: bool = False) -> bytes:
        """Return the rows of each step-th message as COPY data, with a column that numbers them if asked for."""
        columns = [
            Column(name=name, oid=oid, typmod=-1, type_name=kind, not_null=needed, automatic=False)
            for name, oid, kind, needed in self.columns
        ]
        decode = decoder(tuple(Field(column=column, path=(column.name,)) for column in columns))
        rows = iter(decode(self.value(number) for number in range(first, first + count * step, step)))
        data = CopyData()
        if ordinal:
            number = Column(name="at", oid=23, typmod=-1, type_name="integer", not_null=True, automatic=False)
            Packer([*columns, number]).add(data, ((*row, at) for at, row in enumerate(rows)))
        else:
            Packer(columns).add(data, rows)
        return bytes(SIGNATURE + data.packed + TRAILER)


SIX = Shape()


@dataclass(frozen=True)
class Stage:
    """A broker and a database, and a folder for what runs on them."""

    kafka: KafkaServer
    postgres: PostgresServer
    folder: Path

    def fill(self, topic: str, count: int, partitions: int, shape: Shape = SIX) -> int:
        """Make a topic and send its messages, round robin; return the bytes of their values."""
        self.kafka.make_topic(topic, partitions)
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap, "linger.ms": 50, "compression.type": "lz4"})
        size = 0
        for number in range(count):
            message = shape.value(number)
            size += len(message)
            while True:
                try:
                    producer.produce(topic, message, partition=number % partitions)
                    break
                except BufferError:
                    producer.poll(0.1)
        producer.flush()
        return size

    def make_table(self, name: str, shape: Shape = SIX) -> None:
        """Make an empty table."""
        with psycopg.connect(self.postgres.dsn, autocommit=True) as conn:
            conn.execute(f"DROP TABLE IF EXISTS {name}")
            conn.execute(shape.table(name))
        self.settle()

    def settle(self) -> None:
        """Forget all groups; what was written before is on the disk, so that no checkpoint begins soon."""
        with psycopg.connect(self.postgres.dsn, autocommit=True) as conn:
            conn.execute("DROP SCHEMA IF EXISTS consumerd CASCADE")  # a new group into an old target is refused
            conn.execute("CHECKPOINT")

    def rows(self, table: str) -> int:
        """Count a table's rows."""
        with psycopg.connect(self.postgres.dsn) as conn:
            ((count,),) = conn.execute(f"SELECT count(*) FROM {table}").fetchall()
            return int(count)


@contextmanager
def stage(settings: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """Start a broker and a Postgres for a while; `settings` are the latter's."""
    with tempfile.TemporaryDirectory(prefix="consumerd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        for part in ("kafka", "postgres"):
            (folder / part).mkdir()
        kafka, postgres = KafkaServer(folder / "kafka"), PostgresServer(folder / "postgres", settings)
        try:
            kafka.start()
            postgres.start()
            yield Stage(kafka, postgres, folder)
        finally:
            kafka.close()
            postgres.close()
