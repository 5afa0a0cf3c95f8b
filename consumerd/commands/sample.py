"""Some messages of a handler's topics, the first or the last: no group is joined, nothing is committed.

Blocking, to be run in a thread. A partition's end is where the broker says that it is (`enable.partition.eof`): offsets
may have holes, and what an open transaction holds back is not there yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import confluent_kafka as ck
from confluent_kafka import KafkaError, KafkaException

from consumerd.brokers import CALL_TIMEOUT, client_config, positions, refused
from consumerd.errors import Outage
from consumerd.topics import meaning
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from consumerd.config import KafkaConfig

GROUP = "consumerd.sample"
"""librdkafka wants a name; no group of it ever exists."""
STANDSTILL = 10.0
"""Seconds without a message, or a partition's end, after which brokers count as out of reach."""
WIDER = 10
"""Times as many offsets are read when those at an end hold too few messages: a compacted log has holes."""
QUEUE_KBYTES = 16 * 1024
"""KiB that librdkafka may fetch ahead."""


def sample(kafka: KafkaConfig, partitions: Sequence[TopicPartition], count: int, *, first: bool) -> list[ck.Message]:
    """Return the first or the last messages of partitions, by their timestamps, in the order of their offsets.

    Raises Outage, Halt.
    """
    settings: dict[str, Any] = {
        **client_config(kafka),
        "group.id": GROUP,
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "error",
        "queued.max.messages.kbytes": QUEUE_KBYTES,
    }
    try:
        consumer = ck.Consumer(settings)
    except KafkaException as exception:
        raise refused(exception) from exception
    try:
        return _chosen(consumer, partitions, count, first=first)
    except KafkaException as exception:
        raise meaning(exception.args[0], kafka.bootstrap_servers) from exception
    finally:
        consumer.close()


def _chosen(
    consumer: ck.Consumer, partitions: Sequence[TopicPartition], count: int, *, first: bool
) -> list[ck.Message]:
    bounds: dict[TopicPartition, tuple[int, int]] = {}
    for partition in partitions:
        found = consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
        if found is None:
            raise Outage("kafka", f"Kafka: no answer for the offsets of {partition}")
        bounds[partition] = found
    span, messages = count, list[ck.Message]()
    while len(messages) < count:
        ranges = {
            partition: (low, min(high, low + span)) if first else (max(low, high - span), high)
            for partition, (low, high) in bounds.items()
        }
        messages = _read(consumer, {partition: (a, b) for partition, (a, b) in ranges.items() if a < b})
        if ranges == bounds:
            break
        span *= WIDER
    messages.sort(key=lambda message: (message.timestamp()[1], *_place(message)))
    return sorted(messages[:count] if first else messages[-count:], key=_place)


def _read(consumer: ck.Consumer, ranges: Mapping[TopicPartition, tuple[int, int]]) -> list[ck.Message]:
    """Read offsets [a, b) of partitions."""
    left = {partition: end for partition, (_, end) in ranges.items()}
    offsets = positions(ranges)
    for offset, (begin, _) in zip(offsets, ranges.values(), strict=True):
        offset.offset = begin
    consumer.assign(offsets)
    messages: list[ck.Message] = []
    while left:
        message = consumer.poll(STANDSTILL)
        if message is None:
            raise Outage("kafka", f"Kafka does not deliver {next(iter(left))}")
        error = message.error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - the only name it has
            raise KafkaException(error)
        topic, number, at = _place(message)
        partition = TopicPartition(topic, number)
        behind = left.get(partition, -1)
        if error is None and at < behind:
            messages.append(message)
        if error is not None or at >= behind - 1:
            left.pop(partition, None)
    return messages


def _place(message: ck.Message) -> tuple[str, int, int]:
    return message.topic() or "", message.partition() or 0, message.offset() or 0
