"""The dead-letter topic of a handler, read without a group, and each letter as the message that the handler had.

Read from its start to where it ended when it was first asked for; what comes later is for the next run. Blocking, to be
called in a thread.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, NamedTuple

import confluent_kafka as ck
from confluent_kafka import KafkaError, KafkaException

from consumerd.brokers import CALL_TIMEOUT, client_config, positions
from consumerd.dead_letter import CONNECT_PREFIX, OUR_PREFIX
from consumerd.errors import Halt, Outage
from consumerd.letters import Place
from consumerd.topics import meaning
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from consumerd.config import KafkaConfig
    from consumerd.letters import Status

GROUP = "consumerd.dlq"
"""librdkafka wants a name; no group of it ever exists."""
AT_ONCE = 500
"""Messages that are taken at once: with librdkafka's queue, what is held besides what the caller keeps."""
QUEUE_KBYTES = 16 * 1024
"""KiB that librdkafka may fetch ahead."""
LOOK = 0.2
"""Seconds of one look for messages."""
STANDSTILL = 10.0
"""Seconds without a message, or a partition's end, after which brokers count as out of reach."""


class Why(NamedTuple):
    """Why a message became a letter, by its headers."""

    reason: str
    error: str
    message: str
    sqlstate: str | None
    column: str | None


class Letter:
    """A letter; as a `Message` it is what the handler had: our headers are off, and it stands where it came from."""

    __slots__ = ("_offset", "attempt", "epoch", "failed_at", "place", "raw", "tried", "was", "why")

    def __init__(self, raw: ck.Message, ours: dict[str, str]) -> None:
        """Read our headers; raises KeyError or ValueError for what is no letter."""
        self.raw = raw
        topic_id, partition = ours.get(f"{OUR_PREFIX}topic_id", ""), int(ours[f"{CONNECT_PREFIX}partition"])
        self.place = Place(ours[f"{CONNECT_PREFIX}topic"], topic_id, partition)
        self._offset = int(ours[f"{CONNECT_PREFIX}offset"])
        self.failed_at = dt.datetime.fromisoformat(ours[f"{OUR_PREFIX}failed_at"]).astimezone(dt.UTC)
        self.epoch = int(ours.get(f"{OUR_PREFIX}epoch", 0))
        """Under which it was written; 0: not known."""
        self.attempt = int(ours[f"{OUR_PREFIX}attempt"])
        self.tried = self.attempt
        """Times that its message was tried by now."""
        self.was: Status = "open"
        """The status of its row."""
        self.why = Why(
            ours[f"{OUR_PREFIX}reason"],
            ours[f"{CONNECT_PREFIX}exception.class.name"],
            ours[f"{CONNECT_PREFIX}exception.message"],
            ours.get(f"{OUR_PREFIX}sqlstate"),
            ours.get(f"{OUR_PREFIX}column"),
        )

    def __len__(self) -> int:
        return len(self.raw.value() or b"")

    def topic(self) -> str:
        """Return the source topic."""
        return self.place.topic

    def partition(self) -> int:
        """Return the source partition."""
        return self.place.partition

    def offset(self) -> int:
        """Return the source offset."""
        return self._offset

    def key(self) -> bytes | None:
        """Return the key."""
        return self.raw.key()

    def value(self) -> bytes | None:
        """Return the value."""
        return self.raw.value()

    def leader_epoch(self) -> int | None:
        """Return nothing: no header tells."""
        return None

    def timestamp(self) -> tuple[int, int]:
        """Return the message's own; the letter's may be the broker's."""
        own = dict(self.raw.headers() or []).get(f"{OUR_PREFIX}timestamp")
        return (ck.TIMESTAMP_CREATE_TIME, int(own)) if own else (ck.TIMESTAMP_NOT_AVAILABLE, 0)

    def headers(self) -> list[tuple[str, bytes | None]]:
        """Return the message's own."""
        given: Any = self.raw.headers() or []
        return [(name, value) for name, value in given if not name.startswith((CONNECT_PREFIX, OUR_PREFIX))]


def letter_of(message: ck.Message, group: str) -> Letter | None:
    """Return a letter of a group; None for anything else that a topic may hold."""
    given: Any = message.headers() or []
    try:
        ours = {n: v.decode() for n, v in given if v is not None and n.startswith((CONNECT_PREFIX, OUR_PREFIX))}
        return Letter(message, ours) if ours.get(f"{OUR_PREFIX}group") == group else None
    except (KeyError, ValueError, OverflowError):
        return None


class LetterTopic:
    """All that a topic holds, chunk by chunk, as often as it is rewound."""

    def __init__(self, kafka: KafkaConfig, topic: str) -> None:
        """Find where the topic starts and ends; raises Outage, Halt."""
        settings: dict[str, Any] = {
            **client_config(kafka),
            "group.id": GROUP,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "check.crcs": True,
            "queued.max.messages.kbytes": QUEUE_KBYTES,
        }
        self._bootstrap, self._topic = kafka.bootstrap_servers, topic
        self._consumer = ck.Consumer(settings)
        self._left: dict[int, int] = {}
        """The ends of the partitions that are not read to them."""
        self.read = 0
        """Offsets that were read since it was rewound."""
        try:
            self._bounds = self._find()
        except KafkaException as exception:
            self._consumer.close()
            raise meaning(exception.args[0], self._bootstrap) from exception
        except (Halt, Outage):
            self._consumer.close()
            raise
        self.size = sum(high - low for low, high in self._bounds.values())

    def close(self) -> None:
        """Let go of the consumer."""
        self._consumer.close()

    def rewind(self) -> None:
        """Begin at the start."""
        ranges = {number: bounds for number, bounds in self._bounds.items() if bounds[0] < bounds[1]}
        offsets = positions(TopicPartition(self._topic, number) for number in ranges)
        for offset, (low, _) in zip(offsets, ranges.values(), strict=True):
            offset.offset = low
        self._left = {number: high for number, (_, high) in ranges.items()}
        self.read = 0
        self._consumer.assign(offsets)

    def more(self) -> list[ck.Message]:
        """Return the next messages, none at the end; raises Outage, after which it may be called again, and Halt."""
        found: list[ck.Message] = []
        for _ in range(int(STANDSTILL / LOOK)):
            if not self._left:
                return found
            for message in self._consumer.consume(AT_ONCE, LOOK):
                found += self._taken(message)
            if found:
                return found
        raise Outage("kafka", f"Kafka at {self._bootstrap} does not deliver {self._topic}")

    def _taken(self, message: ck.Message) -> list[ck.Message]:
        """Return what is to be read of a message, or of an event in its place."""
        error, number, at = message.error(), message.partition() or 0, message.offset() or 0
        end = self._left.get(number)
        if end is None:
            return []
        if error is not None and error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - its only name
            raise Halt("dead_letter", f"{self._topic} lost letters while it was read (its retention): run this again")
        if error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001
            raise meaning(error, self._bootstrap)
        if error is not None or at >= end - 1:
            del self._left[number]
        self.read += error is None
        return [message] if error is None and at < end else []

    def _find(self) -> dict[int, tuple[int, int]]:
        # Of all topics: to ask for one may make it.
        there = self._consumer.list_topics(timeout=CALL_TIMEOUT).topics.get(self._topic)
        if there is None or there.error is not None:
            raise Halt(
                "dead_letter",
                f"dead-letter topic {self._topic} does not exist: no letter was written to it, or `dead_letter.topic` "
                f"names another",
            )
        bounds = {}
        for number in there.partitions:
            partition = TopicPartition(self._topic, number)
            found = self._consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
            if found is None:
                raise Outage("kafka", f"Kafka: no answer for the offsets of {partition}")
            bounds[number] = found
        return bounds
