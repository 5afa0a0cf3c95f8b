"""Where the daemon's time goes: each step of the path, over messages of a real topic, in one thread.

What the daemon uses beyond the sum is what lies between the steps: the event
loop, who waits for whom, and memory that has left the cache since another thread touched it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import Consumer, TopicPartition
from psycopg import AsyncConnection

from consumerd.brokers import consumer_config
from consumerd.config import KafkaConfig
from consumerd.packed import Packed
from consumerd.sinks.copy import CopyData
from tests.bench.guard_steps import Core

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.accumulator import Batch
    from consumerd.kafka import Chunk
    from consumerd.sinks.append import Append
    from tests.bench.stage import Shape, Stage

T = TypeVar("T")
MESSAGES = 200_000
PIECE = 20_000
"""Messages that are written together, as in the daemon; the first such go the way for practice."""
CONSUME = 1000
"""Messages that are packed while they are in the core's cache."""
QUEUE = 64 << 20


class Watch:
    """Nanoseconds of a core for each row, step by step."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    def time(self, step: str, function: Callable[..., T], *arguments: object) -> T:
        """Run a step; the time of this thread counts."""
        before = time.thread_time()
        result = function(*arguments)
        self.taken[step] = self.taken.get(step, 0.0) + time.thread_time() - before
        return result


def steps(stage: Stage, topic: str, partitions: int, shape: Shape, count: int = MESSAGES) -> dict[str, float]:
    """Return what each step costs for a row of a topic that has at least so many messages, and a piece more."""
    path = Core(list(shape.columns), topic, partitions)
    stage.make_table("stepped", shape)
    kafka = KafkaConfig.model_validate({"bootstrap_servers": stage.kafka.bootstrap})
    consumer = Consumer(consumer_config(kafka, "steps", QUEUE))
    consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    gc.disable()
    go(Watch(), path, consumer, stage.postgres.dsn)
    watch, before = Watch(), time.process_time() - time.thread_time()
    for _ in range(count // PIECE):
        go(watch, path, consumer, stage.postgres.dsn)
    watch.taken["librdkafka's threads"] = time.process_time() - time.thread_time() - before
    gc.enable()
    consumer.close()
    return {step: taken / (count // PIECE * PIECE) * 1e9 for step, taken in watch.taken.items()}


def go(watch: Watch, path: Core, consumer: Consumer, dsn: str) -> None:
    """Have one piece go all the way."""
    chunks: list[Chunk] = []
    while sum(len(chunk.messages) for chunk in chunks) < PIECE:
        messages = watch.time("fetch", consumer.consume, CONSUME, 0.005)
        told = watch.time("group", path.deliver, messages)
        encoded = watch.time("decode", path.decode, told)
        packed = watch.time("encode", path.pack, encoded)
        chunks += (replace(chunk, packed=packed_as(data)) for chunk, data in zip(told, packed, strict=True))
        watch.time("free", free, encoded)
    batches = watch.time("gather", path.gather, chunks)
    written: list[CopyData] = watch.time("gather", list, map(together, batches))
    messages, told, chunks = [], [], []
    watch.time("free", free, batches)
    watch.time("write", lambda: asyncio.run(write(dsn, path.sink_of("stepped"), written)))


def packed_as(data: CopyData) -> Packed:
    """Return rows as they come along with their chunk."""
    return Packed(messages=data.rows, rows=data.rows, data=bytes(data.packed))


def together(batch: Batch) -> CopyData:
    """Return a batch's rows as the data of one COPY."""
    data = CopyData()
    for piece in batch.packed:
        data.packed += piece.data
        data.rows += piece.rows
    return data


def free(*lists: list[Any]) -> None:
    """Forget messages and rows."""
    for one in lists:
        one.clear()


async def write(dsn: str, sink: Append, packed: list[CopyData]) -> None:
    """Write each batch in a transaction of its own."""
    conn: AsyncConnection[Any] = await AsyncConnection.connect(dsn)
    async with conn:
        for data in packed:
            await sink.write(conn, data)
            await conn.commit()
