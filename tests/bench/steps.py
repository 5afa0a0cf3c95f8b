"""Where the daemon's time goes: each step of the path alone, over messages of a real topic, in one thread.

What the daemon uses beyond the sum is what lies between the steps: the event
loop, who waits for whom, and memory that has left the cache since another thread touched it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import Consumer, TopicPartition
from psycopg import AsyncConnection

from consumerd.brokers import consumer_config
from consumerd.config import KafkaConfig
from tests.bench.guard_steps import Core

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import Message

    from consumerd.sinks.append import Append
    from consumerd.sinks.copy import CopyData
    from tests.bench.stage import Shape, Stage

T = TypeVar("T")
MESSAGES = 200_000
PIECE = 20_000
"""Messages that go the way together, as in the daemon; the first such go it for practice."""
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
    messages = watch.time("fetch", fetch, consumer)
    chunks = watch.time("group", path.deliver, messages)
    batches = watch.time("gather", path.gather, chunks)
    encoded = watch.time("decode", path.decode, batches)
    packed = watch.time("encode", path.pack, encoded)
    messages, chunks = [], []
    watch.time("free", free, batches, encoded)
    watch.time("write", lambda: asyncio.run(write(dsn, path.sink_of("stepped"), packed)))


def fetch(consumer: Consumer) -> list[Message]:
    """Consume messages as the daemon's thread does."""
    messages: list[Message] = []
    while len(messages) < PIECE:
        messages += consumer.consume(min(1000, PIECE - len(messages)), 0.005)
    return messages


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
