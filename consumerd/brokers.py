"""What is told to and asked of the brokers: the clients' properties, offsets, and the gaps in them.

The functions that take a Consumer are called on the thread that owns it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import confluent_kafka as ck
from confluent_kafka import KafkaException

from consumerd.errors import ConfigError, Halt, Outage
from consumerd.types import TopicPartition
from consumerd.ways_on import Gap

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from consumerd.config import KafkaConfig

CALL_TIMEOUT = 5.0
"""Seconds for one call that asks a broker."""
MAX_FETCH = 4 * 1024 * 1024
FETCHES = 16
"""Fetches that librdkafka's queue has room for, as they are on the wire: compressed 100:1 one is six times the queue,
and librdkafka takes up to twice that to decompress zstd."""
FETCHED_PARTITIONS = 4
"""Partitions whose messages one fetch can bring. Whenever its queue was full librdkafka begins again with the first
partition, not with the next in turn, and a broker fills the fetch in that order: where one partition could fill it, all
were read one after the other, and most connections had nothing to write (seen: two thirds of their time). One batch
of a librdkafka producer is up to 1 MB; one that does not fit into its share comes from the first partition alone."""
MESSAGE_RESERVE = 4 * 1024
"""Bytes to reserve for each message in librdkafka's queue, which counts values alone: 350 for its own structures, the
rest for keys and headers."""
POLL_INTERVAL_MS = 60_000
"""Milliseconds that a group waits in a rebalance for a member that does not answer, unless its session is longer: this
is what librdkafka sends as its rebalance timeout. The default of five minutes is for consumers that work between two
polls; the thread here polls every few seconds, whatever the database does and however many partitions there are. After
a broker's crash a group waited in vain for all of it (seen, once in some hundred crashes)."""
MAX_QUEUE_MESSAGES = 20_000
"""Messages to fetch ahead: 25 ms at the highest rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What brokers say of a partition: its log's bounds (None: it has no leader), and the group's committed offset."""

    bounds: tuple[int, int] | None
    committed: int | None
    metadata: str | None


def client_config(kafka: KafkaConfig) -> dict[str, Any]:
    """Return librdkafka's properties for any client of ours, secrets read afresh; raises Outage without them."""
    try:
        properties = {
            name: value if isinstance(value, str) else value.read() for name, value in kafka.properties.items()
        }
    except ConfigError as error:
        raise Outage("kafka", str(error)) from error
    return {
        "bootstrap.servers": kafka.bootstrap_servers,
        "log_level": 2,
        # A broker that is back is noticed at once; librdkafka's own pause grows to ten seconds.
        "reconnect.backoff.max.ms": 1000,
        # A deaf connection is given up after this long; with the default of a minute recovery took 49 s.
        "socket.timeout.ms": 10_000,
        "api.version.request.timeout.ms": 3000,
        # How long a topic that is not known is taken for a new one that brokers do not know yet.
        "topic.metadata.propagation.max.ms": 3000,
        **properties,
    }


def fetch_bytes(memory: int) -> int:
    """Return the bytes of one fetch from a broker; `memory` as for `consumer_config`."""
    return max(1024 * FETCHED_PARTITIONS, min(MAX_FETCH, memory // FETCHES))


def consumer_config(kafka: KafkaConfig, group_id: str, memory: int) -> dict[str, Any]:
    """Return the Consumer's properties; `memory` is the bytes that librdkafka's queue may hold.

    The limits are of the one queue into which all partitions are forwarded, not of each partition's
    (rd_kafka_toppar_fetch_decide asks rd_kafka_q_size, which follows the forwarding). They are compared before a fetch,
    so the queue holds as much, and one fetch from each broker, decompressed.
    """
    config: dict[str, Any] = {
        "partition.assignment.strategy": "cooperative-sticky",
        # Once a queue is full librdkafka stops fetching that partition for this long; its default is a second.
        "fetch.queue.backoff.ms": 5,
        **client_config(kafka),
        "group.id": group_id,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # The start is decided by us; anything else would skip data without a word.
        "auto.offset.reset": "error",
        "check.crcs": True,
        "queued.min.messages": max(1, min(MAX_QUEUE_MESSAGES, memory // MESSAGE_RESERVE)),
        "queued.max.messages.kbytes": max(1, memory // 1024),
        "fetch.message.max.bytes": fetch_bytes(memory) // FETCHED_PARTITIONS,
        "fetch.max.bytes": fetch_bytes(memory),
        # A producer's limit, by default 1 MB; librdkafka wants a fetch to be no less.
        "message.max.bytes": fetch_bytes(memory),
    }
    if config.get("group.protocol") == "consumer":
        del config["partition.assignment.strategy"]
    session = str(config.get("session.timeout.ms", ""))
    config.setdefault("max.poll.interval.ms", max(POLL_INTERVAL_MS, int(session) if session.isdecimal() else 0))
    if kafka.group_instance_id:
        config["group.instance.id"] = kafka.group_instance_id
    return config


def find(consumer: ck.Consumer, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Found]:
    """Return the bounds and the committed offsets of partitions; raises Outage."""
    leaders = {topic: _leaders(consumer, topic) for topic in {partition.topic for partition in partitions}}
    found = {}
    for entry in consumer.committed(positions(partitions), timeout=CALL_TIMEOUT):
        partition = TopicPartition(entry.topic, entry.partition)
        if entry.error:
            raise Outage("kafka", f"Kafka: committed offset of {partition}: {entry.error}")
        bounds = None
        if partition.partition in leaders[partition.topic]:
            bounds = consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
            if bounds is None:
                raise Outage("kafka", f"Kafka: no answer for the offsets of {partition}")
        offset = entry.offset if entry.offset >= 0 else None
        found[partition] = Found(bounds=bounds, committed=offset, metadata=entry.metadata)
    return found


def _leaders(consumer: ck.Consumer, topic: str) -> set[int]:
    """Return the partitions of a topic that have a leader: what has none answers nothing, and takes its time."""
    partitions = consumer.list_topics(topic, timeout=CALL_TIMEOUT).topics[topic].partitions
    return {number for number, partition in partitions.items() if partition.leader >= 0}


def offset_at(consumer: ck.Consumer, partition: TopicPartition, timestamp_ms: int) -> int:
    """Return the first offset at or after a time; the log's end if there is none."""
    (answer,) = consumer.offsets_for_times([ck.TopicPartition(*partition, timestamp_ms)], timeout=CALL_TIMEOUT)
    if answer.error:
        raise Outage("kafka", f"Kafka: offset of {partition} by time: {answer.error}")
    if answer.offset >= 0:
        return int(answer.offset)
    bounds = consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
    return int(bounds[1])


def gap_of(consumer: ck.Consumer, partition: TopicPartition, offset: int | None, group: str, bootstrap: str) -> Halt:
    """Name what is missing of a partition whose position is outside its log."""
    try:
        low, high = consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
    except (KafkaException, TypeError):
        return Halt("gap", f"{partition}: the position is outside the log, and the log's bounds are not known")
    position = offset if offset is not None and offset >= 0 else None
    return gap(partition, position, low=low, high=high, group=group, bootstrap=bootstrap)


def gap(partition: TopicPartition, position: int | None, *, low: int, high: int, group: str, bootstrap: str) -> Halt:
    """Return the halt of a partition whose position is not in its log, offsets [low, high)."""
    reset = (
        f"kafka-consumer-groups --bootstrap-server {bootstrap} --group {shlex.quote(group)} "
        f"--reset-offsets --topic {partition} "
        f"--execute --to-offset"
    )
    if position is not None and position < low:
        what = f"offsets {position}..{low - 1} are gone from the log (retention was faster than this handler)"
        return Halt(
            "gap",
            f"{partition}: {what}; nothing was skipped; Kafka's own tool goes on after it as well: {reset} {low}",
            Gap(partition=partition, position=position, target=low),
        )
    what = f"the position {'' if position is None else f'{position} '}is not in the log, which holds {low}..{high}"
    ways = () if position is None else (Gap(partition=partition, position=position, target=high),)
    return Halt(
        "gap",
        f"{partition}: {what}: it was cut, or is another one; nothing was skipped. What will be appended begins at "
        f"{high}, an offset below that would write again what was written before; Kafka's own tool sets it as well: "
        f"{reset} {high}",
        *ways,
    )


def refused(error: KafkaException) -> Halt:
    """Return the halt for properties that no client can be made of."""
    cause = error.args[0] if error.args else error
    said = cause.str() if isinstance(cause, ck.KafkaError) else str(cause)
    return Halt("kafka", f"librdkafka refuses [kafka.properties], or -X: {said}")


def positions(partitions: Iterable[TopicPartition]) -> list[ck.TopicPartition]:
    """Return partitions as librdkafka has them."""
    return [ck.TopicPartition(*partition) for partition in partitions]
