"""Letters: what could not become a row, byte for byte as it came, with headers that say where from and why.

A letter is acknowledged by all in-sync replicas before the offset of its message moves. The producer never gives a
message up (`message.timeout.ms` 0). A crash, a rebalance or a halt before the checkpoint has moved may repeat a letter:
its source topic, partition and offset identify it. The timestamp is the message's own, and stands in a header too.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from typing import TYPE_CHECKING

import confluent_kafka as ck
from confluent_kafka import KafkaError, KafkaException

from consumerd.brokers import client_config
from consumerd.errors import Halt, Outage
from consumerd.ways_on import Skip

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from consumerd.accumulator import Batch
    from consumerd.config import HandlerConfig, KafkaConfig
    from consumerd.errors import Refusal
    from consumerd.topics import Topic
    from consumerd.types import Message

log = logging.getLogger(__name__)

CONNECT_PREFIX = "__connect.errors."
OUR_PREFIX = "consumerd."

MAX_MESSAGE_BYTES = 1_000_000_000
"""librdkafka's own limit, out of the way: the topic's `max.message.bytes` decides."""
ACKNOWLEDGE_WAIT = 0.2
"""Seconds of one look for acknowledgements."""
VISIBLE_AFTER = 5.0
"""Seconds without an acknowledgement after which that is an outage for all to see."""

STAGES = {"decode": "VALUE_CONVERTER", "transform": "TRANSFORMATION", "write": "TASK_PUT"}
"""Kafka Connect's names."""
ATTEMPT_DIGITS = 9
"""Digits of an attempt that we may have written; a longer one is somebody else's."""

Headers = list[tuple[str, bytes | None]]


class DeadLetters:
    """The dead-letter topic of one handler. The producer is made for the first letter."""

    def __init__(self, kafka: KafkaConfig, handler: HandlerConfig) -> None:
        self._kafka = kafka
        self._handler = handler
        self._producer: ck.Producer | None = None
        self._topic = handler.dead_letter.topic
        self._fatal: str | None = None
        self._closed = False
        self.largest: int | None = None
        """Bytes that the topic must take, for who makes it again."""
        self.sources: Mapping[str, Topic] = {}
        """The topics that messages come from: an offset means another message once its topic was made again."""
        self._sending = asyncio.Lock()

    async def send(self, batch: Batch, epoch: int) -> None:
        """Send the letters of a batch that are not acknowledged yet, and wait for them; `epoch` is its lease's.

        Raises Outage when they take long (the next call goes on waiting for them), Halt when the topic refuses them.
        """
        due = [position for position in batch.refused if position not in batch.lettered]
        if not due:
            return
        async with self._sending:
            try:
                await asyncio.to_thread(self._send, batch, due, epoch)
            except KafkaException as error:
                raise self._meaning(error.args[0], batch) from error
        if self._closed:
            raise Outage("dead_letter", "the producer was closed")
        if not batch.lettered.issuperset(due):
            raise Halt("bug", f"letters of {batch.partition} were neither acknowledged nor refused")

    def close(self) -> None:
        """Let go of the producer; what it has not delivered is sent again by whoever reads the messages again."""
        self._closed = True
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(1.0)

    def _send(self, batch: Batch, due: list[int], epoch: int) -> None:
        """Produce and wait, on a thread; a fatal error ends this producer, and the letters go with the next one."""
        if self._fatal is not None and self._producer is not None:
            self._producer.purge()
            self._producer.flush(ACKNOWLEDGE_WAIT)  # runs the callbacks: nobody waits for this producer any more
            self._producer, self._fatal = None, None
        producer = self._producer = self._producer or self._new_producer()
        deadline = time.monotonic() + VISIBLE_AFTER
        for position in due:
            if position not in batch.on_their_way:
                self._produce(producer, batch, position, epoch, deadline)
        while batch.on_their_way:
            before = len(batch.on_their_way)
            producer.poll(ACKNOWLEDGE_WAIT)
            if batch.letter_error is not None:
                error, batch.letter_error = batch.letter_error, None
                raise KafkaException(error)
            if self._fatal is not None:
                raise Outage("dead_letter", f"the producer for {self._topic} gave up: {self._fatal}")
            if len(batch.on_their_way) < before:
                deadline = time.monotonic() + VISIBLE_AFTER
            self._not_past(deadline)

    def _produce(self, producer: ck.Producer, batch: Batch, position: int, epoch: int, deadline: float) -> None:
        message, refusal = batch.messages[position], batch.refused[position]
        kind, timestamp = message.timestamp()

        def delivered(error: KafkaError | None, _: ck.Message) -> None:
            batch.on_their_way.discard(position)
            if error is None:
                batch.lettered.add(position)
            elif error.code() not in {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}:  # noqa: SLF001
                batch.letter_error = error

        while True:
            try:
                producer.produce(
                    self._topic,
                    value=message.value(),
                    key=message.key(),
                    headers=self._headers(batch, message, refusal, epoch),  # type: ignore[arg-type]
                    timestamp=timestamp if kind != ck.TIMESTAMP_NOT_AVAILABLE else 0,
                    on_delivery=delivered,
                )
            except BufferError:
                producer.poll(ACKNOWLEDGE_WAIT)
                self._not_past(deadline)
            else:
                # Callbacks run in poll() alone, on this thread: this comes before any of them.
                batch.on_their_way.add(position)
                return

    def _headers(self, batch: Batch, message: Message, refusal: Refusal, epoch: int) -> Headers:
        source = self.sources.get(batch.partition.topic)
        topic_id = None if source is None else source.topic_id
        return headers(self._handler, batch, message, refusal, topic_id=topic_id, epoch=epoch)

    def _not_past(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise Outage("dead_letter", f"dead-letter topic {self._topic} does not acknowledge")

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001
            self._fatal = error.str()

    def _meaning(self, error: KafkaError, batch: Batch) -> Exception:
        topic = self._topic
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            offset = self._largest_due(batch)
            return Halt(
                "dead_letter",
                f"the letter of {batch.partition} offset {offset} is too large for {topic}; type: kafka-configs "
                f"--bootstrap-server {self._kafka.bootstrap_servers} --alter --topic {topic} --add-config "
                f"max.message.bytes=N",
                Skip(partition=batch.partition, first=offset, end=offset + 1),
            )
        if error.code() in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}:
            return Halt("dead_letter", f"not allowed to write to {topic}: grant this principal WRITE on it")
        if error.code() in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}:  # noqa: SLF001
            size = f" --config max.message.bytes={self.largest}" if self.largest else ""
            return Outage(
                "dead_letter",
                f"dead-letter topic {topic} is gone; make it again: kafka-topics --bootstrap-server "
                f"{self._kafka.bootstrap_servers} --create --topic {topic} --config retention.ms=-1{size}",
            )
        return Outage("dead_letter", f"dead-letter topic {topic}: {error.str()}")

    def _largest_due(self, batch: Batch) -> int:
        """Return the offset of the largest letter that is due: letters that are sent together are refused together."""

        def size(position: int) -> int:
            message = batch.messages[position]
            held = headers(self._handler, batch, message, batch.refused[position])
            return len(message) + len(message.key() or b"") + sum(len(name) + len(value or b"") for name, value in held)

        due = (position for position in batch.refused if position not in batch.lettered)
        return batch.messages[max(due, key=size)].offset()

    def _new_producer(self) -> ck.Producer:
        return ck.Producer(
            {
                **client_config(self._kafka),
                "acks": "all",
                "enable.idempotence": True,
                "message.timeout.ms": 0,
                "message.max.bytes": MAX_MESSAGE_BYTES,
                "linger.ms": 2,
                # Without it poll() itself raises a fatal error, and the letters' callbacks are lost with it.
                "error_cb": self._on_error,
            }
        )


def headers(
    handler: HandlerConfig,
    batch: Batch,
    message: Message,
    refusal: Refusal,
    *,
    topic_id: str | None = None,
    epoch: int = 0,
) -> Headers:
    """Return the headers of a letter: the message's own, and Kafka Connect's names and ours in place of older ones."""
    own = [
        (name, value) for name, value in message.headers() or [] if not name.startswith((CONNECT_PREFIX, OUR_PREFIX))
    ]
    kind, timestamp = message.timestamp()
    ours: Iterable[tuple[str, str | None]] = (
        (f"{CONNECT_PREFIX}topic", batch.partition.topic),
        (f"{CONNECT_PREFIX}partition", str(batch.partition.partition)),
        (f"{CONNECT_PREFIX}offset", str(message.offset())),
        (f"{CONNECT_PREFIX}connector.name", handler.name),
        (f"{CONNECT_PREFIX}stage", STAGES[refusal.stage]),
        (f"{CONNECT_PREFIX}class.name", "consumerd"),
        (f"{CONNECT_PREFIX}exception.class.name", refusal.error),
        (f"{CONNECT_PREFIX}exception.message", refusal.told(words=handler.poison.error_text)),
        (f"{OUR_PREFIX}group", handler.group_id),
        (f"{OUR_PREFIX}topic_id", topic_id),
        (f"{OUR_PREFIX}epoch", str(epoch) if epoch else None),
        (f"{OUR_PREFIX}reason", refusal.reason),
        (f"{OUR_PREFIX}sqlstate", refusal.sqlstate),
        (f"{OUR_PREFIX}column", refusal.column),
        (f"{OUR_PREFIX}timestamp", str(timestamp) if kind != ck.TIMESTAMP_NOT_AVAILABLE else None),
        (f"{OUR_PREFIX}failed_at", dt.datetime.now(dt.UTC).isoformat()),
        (f"{OUR_PREFIX}attempt", str(_attempt(message))),
    )
    return own + [(name, value.encode()) for name, value in ours if value is not None]


def _attempt(message: Message) -> int:
    """Return how many times this message has failed, this one included."""
    earlier = dict(message.headers() or []).get(f"{OUR_PREFIX}attempt")
    return int(earlier) + 1 if earlier and earlier.isdigit() and len(earlier) <= ATTEMPT_DIGITS else 1
