"""The pure core, step by step, over the messages in a file: what `tests.bench.guard` counts.

Run as a script, with the tree to count first in PYTHONPATH; of the project it needs nothing but `consumerd`.
`os.getloadavg` is called between the steps and by nothing else: callgrind writes its counts whenever it is.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from confluent_kafka import Message

from consumerd.accumulator import Accumulator, Bounds
from consumerd.catalog import Column, Table
from consumerd.config import HandlerConfig
from consumerd.encode import Encoder
from consumerd.kafka import ConsumerThread
from consumerd.packed import Packed
from consumerd.sinks.append import Append
from consumerd.sinks.copy import CopyData
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.accumulator import Batch
    from consumerd.encode import Rows
    from consumerd.kafka import Chunk

STEPS = ("deliver", "gather", "decode", "pack", "free")
TOPIC, PARTITIONS = "bench", 6
CONSUME, RUN = 1_000, 500
"""Messages of one `consume()`, and those of one partition in it that follow each other."""
BOUNDS = Bounds(max_messages=20_000, max_bytes=8 << 20, max_age=0.0)
Told = list["Chunk"]


class Alone(ConsumerThread):
    """The part of a consumer's thread that groups messages, without consumer, thread and loop."""

    def __init__(self, topic: str, partitions: set[TopicPartition]) -> None:
        self._only = topic
        self._live = partitions
        self._told = 0
        self._listener = cast("Any", self)
        self.chunks: Told = []

    def pack(self, _: TopicPartition, messages: list[Message]) -> Packed:
        """Leave it for later: it is a step of its own."""
        return Packed(messages=len(messages))

    def _tell(self, _: Callable[..., object], *what: Any) -> None:  # noqa: ANN401 - chunks, and their size
        self.chunks += what[0]


class Core:
    """One handler's path, of which each step takes what the one before it made."""

    def __init__(
        self, columns: list[tuple[str, int, str, bool]], topic: str = TOPIC, partitions: int = PARTITIONS
    ) -> None:
        found = tuple(
            Column(name=name, oid=oid, typmod=-1, type_name=kind, not_null=needed, automatic=False)
            for name, oid, kind, needed in columns
        )
        table = self._table = Table(name=topic, identifier=topic, columns=found, unique=(), fingerprint="")
        handler = HandlerConfig.model_validate(
            {"name": topic, "path": Path(topic), "topics": [topic], "table": {"name": topic, "write": "append"}}
        )
        self._encoder = Encoder(table, handler)
        self._sink = Append(table, self._encoder.columns)
        self._partitions = {TopicPartition(topic, number) for number in range(partitions)}

    def sink_of(self, table: str) -> Append:
        """Return what writes the rows into a table."""
        return Append(replace(self._table, name=table, identifier=table), self._encoder.columns)

    def deliver(self, messages: list[Message]) -> Told:
        """Group what was consumed."""
        thread = Alone(self._table.name, self._partitions)
        for at in range(0, len(messages), CONSUME):
            thread._deliver(cast("Any", None), messages[at : at + CONSUME])
        return thread.chunks

    def gather(self, chunks: Told) -> list[Batch]:
        """Make batches of chunks, and forget them as if they were written."""
        accumulator = Accumulator(BOUNDS)
        for partition in self._partitions:
            accumulator.open(partition)
        for chunk in chunks:
            accumulator.add(chunk.partition, chunk.messages, chunk.size, 0.0, chunk.packed)
        batches: list[Batch] = []
        while taken := accumulator.take(1.0):
            batches += taken
            for batch in taken:
                accumulator.done(batch)
        return batches

    def decode(self, chunks: Told) -> list[Rows]:
        """Make rows of chunks."""
        return [self._encoder.encode(chunk.messages, {}) for chunk in chunks]

    def pack(self, encoded: list[Rows]) -> list[CopyData]:
        """Pack the rows of each chunk."""
        return [self._sink.pack(rows.rows, CopyData(packed=bytearray())) for rows in encoded]


def message(number: int, value: bytes) -> Message:
    """Make a message as a consumer gives it."""
    return Message(topic=TOPIC, partition=number // RUN % PARTITIONS, offset=number, value=value, leader_epoch=0)


def main() -> None:
    """Go the path twice: once for the interpreter to get used to it, and once to be counted."""
    columns, *values = Path(sys.argv[1]).read_bytes().splitlines()
    path = Core(json.loads(columns))
    gc.disable()
    for _ in range(2):
        messages = [message(number, value) for number, value in enumerate(values)]
        os.getloadavg()
        chunks = path.deliver(messages)
        os.getloadavg()
        batches = path.gather(chunks)
        os.getloadavg()
        encoded = path.decode(chunks)
        os.getloadavg()
        packed = path.pack(encoded)
        os.getloadavg()
        assert sum(data.rows for data in packed) == len(values)
        del messages, chunks, batches, encoded, packed
        os.getloadavg()


if __name__ == "__main__":
    main()
