"""The producer: a process of its own, so that it neither slows the checker nor is slowed by it.

It writes each partition's records in sequence, idempotently, in waves (quiet, steady, flood) around a mean rate. After
a fatal error of the client the log itself says how far it came. What it has done stands in shared memory.
"""

import itertools
import multiprocessing
import os
import random
import time
from bisect import bisect
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from tests.chaos.records import Records

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized, SynchronizedArray

MAX_PARTITIONS = 64
WAVE = 3.0
"""Seconds of one wave."""
WAVES = (0.1, 0.5, 1.0, 1.0, 3.0)
"""Heights of waves, relative to each other."""
RUN = 60
"""Most records in a row for one partition."""
QUESTION_TIMEOUT = 5.0
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to produce."""

    bootstrap: str
    topic: str
    seed: str
    records: int
    seconds: float


@dataclass(frozen=True)
class Shared:
    """What the checker and the producer tell each other."""

    partitions: "Synchronized[int]"
    acknowledged: "SynchronizedArray[int]" = field(default_factory=lambda: _spawn.Array("q", MAX_PARTITIONS))
    stop: Event = field(default_factory=_spawn.Event)


class ProducerProcess:
    """The running producer."""

    def __init__(self, order: Order, partitions: int) -> None:
        self._shared = Shared(_spawn.Value("i", partitions))
        self._process = _spawn.Process(target=_main, args=(order, self._shared, os.getpid()), daemon=True)
        self._process.start()

    @property
    def partitions(self) -> int:
        """How many partitions it writes to."""
        return self._shared.partitions.value

    def grow(self, partitions: int) -> None:
        """Have it write to more partitions."""
        self._shared.partitions.value = partitions

    def acknowledged(self) -> list[int]:
        """Return how many records of each partition the broker has acknowledged."""
        return [int(count) for count in self._shared.acknowledged[: self.partitions]]

    @property
    def running(self) -> bool:
        """Whether it has more to send."""
        return self._process.is_alive()

    def finish(self, timeout: float) -> None:
        """Wait until everything is sent and acknowledged."""
        self._process.join(timeout)
        if self._process.exitcode != 0:
            raise TimeoutError(f"the producer ended with {self._process.exitcode} (None: not within {timeout:g} s)")

    def close(self) -> None:
        """End it, done or not."""
        self._shared.stop.set()
        self._process.kill()
        self._process.join()


class Sender:
    """Writes records; `next` is the next sequence of each partition."""

    def __init__(self, order: Order, shared: Shared) -> None:
        self._order = order
        self._shared = shared
        self._records = Records(order.seed)
        self._next = [0] * MAX_PARTITIONS
        self._acknowledged = [0] * MAX_PARTITIONS
        self._failed = False
        self._producer = self._new()

    def send(self, part: int) -> bool:
        """Send the next record of a partition; False when there is no room or no such partition yet."""
        seq = self._next[part]
        key, value = self._records.key(part, seq), self._records.value(part, seq)
        try:
            self._producer.produce(self._order.topic, value, key, partition=part, on_delivery=self._delivered)
        except BufferError:
            self.wait(0.1)
            return False
        except KafkaException:
            self.wait(0.5)  # a new partition that it has not heard of, or a client that gave up
            return False
        self._next[part] += 1
        return True

    def wait(self, seconds: float) -> None:
        """Serve the client, tell how far it is, and begin again with a new one if it gave up."""
        self._producer.poll(seconds)
        self._shared.acknowledged[:] = self._acknowledged
        if self._failed:
            self._begin_again()

    def flush(self) -> bool:
        """Whether everything is acknowledged."""
        self._producer.flush(1.0)
        self.wait(0)
        return self._acknowledged == self._next

    def sent(self) -> int:
        """Return how many records were sent."""
        return sum(self._next)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._acknowledged[message.partition() or 0] += 1
        else:
            self._failed = True

    def _on_error(self, error: KafkaError) -> None:
        self._failed = self._failed or error.fatal()

    def _begin_again(self) -> None:
        self._producer.purge()
        self._producer.flush(1.0)
        consumer = Consumer({"bootstrap.servers": self._order.bootstrap, "group.id": "chaos", "log_level": 0})
        try:
            for part in range(self._shared.partitions.value):
                partition = TopicPartition(self._order.topic, part)
                end = int(consumer.get_watermark_offsets(partition, timeout=QUESTION_TIMEOUT)[1])
                self._next[part] = self._acknowledged[part] = end
        except KafkaException:
            return  # the broker is down: asked again
        finally:
            consumer.close()
        self._producer, self._failed = self._new(), False

    def _new(self) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self._order.bootstrap,
                "enable.idempotence": True,
                "message.timeout.ms": 0,
                "linger.ms": 20,
                "compression.type": "lz4",
                "topic.metadata.refresh.interval.ms": 1000,
                "queue.buffering.max.messages": 50_000,
                "log_level": 0,
                "error_cb": self._on_error,
            }
        )


def _main(order: Order, shared: Shared, parent: int) -> None:
    dice = random.Random(order.seed)
    sender = Sender(order, shared)
    pace = Pace(order, dice)
    started = time.monotonic()
    run, part = 0, 0
    while not shared.stop.is_set() and os.getppid() == parent and sender.sent() < order.records:
        if sender.sent() >= pace.due(time.monotonic() - started):
            sender.wait(0.01)
            continue
        for _ in range(200):
            if run == 0:
                run, part = dice.randrange(1, RUN), dice.randrange(shared.partitions.value)
            run -= 1
            if not sender.send(part):
                break
        sender.wait(0)
    while not shared.stop.is_set() and os.getppid() == parent and not sender.flush():
        pass


class Pace:
    """How many records are due after so many seconds."""

    def __init__(self, order: Order, dice: random.Random) -> None:
        heights = [dice.choice(WAVES) for _ in range(max(1, round(order.seconds / WAVE)))]
        scale = order.records / sum(heights)
        self._times = [wave * order.seconds / len(heights) for wave in range(len(heights) + 1)]
        self._due = [0.0, *(scale * height for height in itertools.accumulate(heights))]

    def due(self, seconds: float) -> float:
        """Return the count, linear within a wave."""
        wave = min(bisect(self._times, seconds), len(self._times) - 1)
        before, after = self._times[wave - 1], self._times[wave]
        share = min(1.0, (seconds - before) / (after - before))
        return self._due[wave - 1] + share * (self._due[wave] - self._due[wave - 1])
