"""A range as it is typed, in offsets or times, and the offsets that it is in the logs.

A range is half-open, as positions are in Kafka's own tools: `--from t:0@100 --to t:0@200` is 100 to 199. A partition
that is named by an offset is taken, and then no other; a time is of all partitions.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import confluent_kafka as ck
from confluent_kafka import KafkaException

from consumerd import brokers
from consumerd.errors import Outage, UsageError
from consumerd.replay_checkpoint import Range
from consumerd.scalars import seconds_of
from consumerd.topics import meaning
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from consumerd.brokers import Found
    from consumerd.config import HandlerConfig, KafkaConfig

Bound = dt.datetime | dict[TopicPartition, int] | None
"""A time, an offset for each partition that is named, or nothing: the log's own."""

_PLACE = re.compile(r"(?P<topic>[A-Za-z0-9._-]+):(?P<partition>[0-9]{1,9})@(?P<offset>[0-9]{1,18})")
_TOPIC = re.compile(r"(?P<topic>[A-Za-z0-9._-]+)(?::(?P<partitions>[0-9]{1,9}(,[0-9]{1,9})*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A range as it was typed; `text` is how, for whoever types the same again."""

    start: Bound
    end: Bound
    topics: Mapping[str, frozenset[int] | None]
    """What the range is narrowed to, each topic with its partitions, or all of them; nothing: it is not narrowed."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The offsets of a range, and what of it the logs do not hold any more, each in a sentence."""

    ranges: dict[TopicPartition, Range]
    gaps: list[str]


def parse(
    start: Sequence[str], end: Sequence[str], last: str | None, topics: Sequence[str], *, now: dt.datetime
) -> Asked:
    """Read what was typed; raises UsageError with a sentence."""
    if last is not None and start:
        raise UsageError("--last and --from both say where the range begins: leave one out")
    words = [("--last", last)] if last is not None else []
    words += [("--from", text) for text in start] + [("--to", text) for text in end]
    words += [("--topic", text) for text in sorted(topics)]
    asked = Asked(
        start=_bound("--from", start) if last is None else now - dt.timedelta(seconds=_duration(last)),
        end=_bound("--to", end),
        topics=_topics(topics),
        text=" ".join(f"{option} {text}" for option, text in words),
    )
    if isinstance(asked.start, dt.datetime) and isinstance(asked.end, dt.datetime) and asked.end <= asked.start:
        raise UsageError("the range ends before it begins: --to must be later than where it begins")
    return asked


def _duration(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError as error:
        raise UsageError(f"--last {text}: {error}") from error


def _bound(option: str, texts: Sequence[str]) -> Bound:
    if not texts:
        return None
    if "@" not in texts[0] and len(texts) == 1:
        return _time(option, texts[0])
    offsets: dict[TopicPartition, int] = {}
    for text in texts:
        match = _PLACE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{option} {text}: write a time, 2026-01-31T00:00:00Z, once; or offsets, TOPIC:PARTITION@OFFSET, once "
                f"for each partition"
            )
        partition = TopicPartition(match["topic"], int(match["partition"]))
        if partition in offsets:
            raise UsageError(f"{option} names {partition} twice")
        offsets[partition] = int(match["offset"])
    return offsets


def _time(option: str, text: str) -> dt.datetime:
    sentence = (
        f"{option} {text}: write a time with its zone, 2026-01-31T00:00:00Z, or an offset, TOPIC:PARTITION@OFFSET"
    )
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(sentence) from None
    if time.utcoffset() is None:
        raise UsageError(sentence)
    return time


def _topics(texts: Sequence[str]) -> dict[str, frozenset[int] | None]:
    topics: dict[str, frozenset[int] | None] = {}
    for text in texts:
        match = _TOPIC.fullmatch(text)
        if match is None or match["topic"] in topics:
            raise UsageError(f"--topic {text}: write TOPIC or TOPIC:0,1, each topic once")
        numbers = match["partitions"]
        topics[match["topic"]] = frozenset(map(int, numbers.split(","))) if numbers else None
    return topics


def chosen(asked: Asked, there: Sequence[TopicPartition]) -> list[TopicPartition]:
    """Return the partitions that are asked for, of those that there are; raises UsageError for one that is not."""
    named = {p for bound in (asked.start, asked.end) if isinstance(bound, dict) for p in bound}
    given = named | {TopicPartition(t, n) for t, numbers in asked.topics.items() for n in numbers or ()}
    topics = {partition.topic for partition in there}
    unknown = sorted(str(p) for p in given - set(there)) + sorted(asked.topics.keys() - topics)
    if unknown:
        raise UsageError(f"{unknown[0]} is not among what this handler reads: {', '.join(sorted(topics))}")
    taken = [p for p in there if (not named or p in named) and _is_in(p, asked.topics)]
    if outside := sorted(named - set(taken)):
        raise UsageError(f"{outside[0]} is named by its offset, and --topic leaves it out")
    return taken


def _is_in(partition: TopicPartition, topics: Mapping[str, frozenset[int] | None]) -> bool:
    if not topics:
        return True
    numbers = topics.get(partition.topic, frozenset())
    return numbers is None or partition.partition in numbers


def look(
    kafka: KafkaConfig, handler: HandlerConfig, partitions: Sequence[TopicPartition], asked: Asked
) -> tuple[dict[TopicPartition, Found], dict[TopicPartition, Range]]:
    """Ask the brokers for the logs' bounds, and for the offsets of the range's times; raises Outage, Halt.

    Blocking. A consumer that subscribes to nothing is no member of its group.
    """
    consumer = ck.Consumer({**brokers.client_config(kafka), "group.id": handler.group_id, "enable.auto.commit": False})
    try:
        found = brokers.find(consumer, partitions)
        if leaderless := [str(partition) for partition, it in found.items() if it.bounds is None]:
            raise Outage("kafka", f"Kafka: no leader for {', '.join(leaderless)}")
        ranges = {}
        for partition, it in found.items():
            low, high = it.bounds or (0, 0)
            ranges[partition] = Range(
                _offset(consumer, partition, asked.start, low), _offset(consumer, partition, asked.end, high)
            )
    except KafkaException as exception:
        raise meaning(exception.args[0], kafka.bootstrap_servers) from exception
    finally:
        consumer.close()
    return found, ranges


def _offset(consumer: ck.Consumer, partition: TopicPartition, bound: Bound, otherwise: int) -> int:
    if isinstance(bound, dt.datetime):
        return brokers.offset_at(consumer, partition, int(bound.timestamp() * 1000))
    return otherwise if bound is None else bound.get(partition, otherwise)


def within(ranges: Mapping[TopicPartition, Range], found: Mapping[TopicPartition, Found], *, by_time: bool) -> Resolved:
    """Return what of ranges is in the logs, and name what is not any more; raises UsageError for what never was.

    Where a time leads to the log's first offset, what lay before may have been of that time as well.
    """
    resolved = Resolved(ranges={}, gaps=[])
    for partition, (start, end) in sorted(ranges.items()):
        low, high = found[partition].bounds or (0, 0)
        if end > high or start > high:
            raise UsageError(f"{partition} ends at {high}: there is no offset {max(start, end) - 1} in it yet")
        if start > end:
            raise UsageError(f"{partition}: the range ends at {end}, before it begins at {start}")
        if start < low:
            resolved.gaps.append(f"{partition}: offsets {start}..{min(low, end) - 1} are gone from the log")
        elif by_time and start == low and low > 0:
            resolved.gaps.append(f"{partition}: offsets 0..{low - 1} are gone from the log, and may be of that time")
        if end > max(start, low):
            resolved.ranges[partition] = Range(max(start, low), end)
    return resolved
