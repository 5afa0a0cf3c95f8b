"""Where the daemon's time goes: each step of the path alone, over messages of a real topic, in one thread.

`fetch` includes librdkafka's own threads. What the daemon uses beyond the sum is what lies between the steps: the event
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
QUEUE = 64 << 20


class Watch:
    """Nanoseconds of a core for each row, step by step."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.taken: dict[str, float] = {}

    def time(self, step: str, function: Callable[..., T], *arguments: object) -> T:
        """Run a step; the time of all of this process's threads counts."""
        before = time.process_time()
        result = function(*arguments)
        self.taken[step] = (time.process_time() - before) / self._rows * 1e9
        return result


def steps(stage: Stage, topic: str, partitions: int, shape: Shape, count: int = MESSAGES) -> dict[str, float]:
    """Return what each step costs for a row of a topic that has at least so many messages."""
    watch, path = Watch(count), Core(list(shape.columns), topic, partitions)
    gc.disable()
    messages = watch.time("fetch", fetch, stage.kafka.bootstrap, topic, partitions, count)
    chunks = watch.time("group", path.deliver, messages)
    batches = watch.time("gather", path.gather, chunks)
    encoded = watch.time("decode", path.decode, batches)
    packed = watch.time("encode", path.pack, encoded)
    messages, chunks = [], []
    watch.time("free", free, batches, encoded)
    stage.make_table("stepped", shape)
    watch.time("write", lambda: asyncio.run(write(stage.postgres.dsn, path.sink_of("stepped"), packed)))
    gc.enable()
    return watch.taken


def fetch(bootstrap: str, topic: str, partitions: int, count: int) -> list[Message]:
    """Consume messages as the daemon's thread does."""
    kafka = KafkaConfig.model_validate({"bootstrap_servers": bootstrap})
    consumer = Consumer(consumer_config(kafka, "steps", QUEUE))
    consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    messages: list[Message] = []
    while len(messages) < count:
        messages += consumer.consume(min(1000, count - len(messages)), 0.005)
    consumer.close()
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
