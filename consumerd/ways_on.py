"""The ways on after a halt: what a halt shows that an operator may accept, and what was accepted.

A halt carries its ways with all that its sentence shows: the offsets that are gone, the two ids of a topic, the one
message. `consumerd resume` accepts exactly that, as a compare-and-set: a fresh member goes the way only where it finds
again what was shown, and halts anew where it does not (a gap has grown since, say). Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from consumerd.errors import ConsumerdError, Halt
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from consumerd.types import Message

SHOWN = 5
"""Sentences of a halt of many partitions; the log has a line for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The log holds nothing at `position`, where the partition would go on; it can go on at `target`."""

    partition: TopicPartition
    position: int
    target: int

    def option(self) -> str:
        """Return what to type."""
        return f"--accept-gap {self.partition}"

    def what(self) -> str:
        """Say what for."""
        return "to go on after it"

    def skipped(self) -> str:
        """Name what is not read by that."""
        span = f"offsets {self.position}..{self.target - 1} are skipped" if self.target > self.position else ""
        return f"{self.partition} goes on at {self.target}{f': {span}' if span else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTopic:
    """A topic of the same name was made in place of the one that the checkpoints are of."""

    topic: str
    old: str
    new: str

    def option(self) -> str:
        """Return what to type."""
        return f"--accept-new-topic {self.topic}"

    def what(self) -> str:
        """Say what for."""
        return "to read the new topic from its start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """One message of those from `first` to `end`, the last not included, keeps the others from being written."""

    partition: TopicPartition
    first: int
    end: int

    def option(self) -> str:
        """Return what to type."""
        return f"--skip {self.partition}@{self.first if self.end == self.first + 1 else 'OFFSET'}"

    def what(self) -> str:
        """Say what for."""
        return "to pass over this one message" if self.end == self.first + 1 else "to pass over one message of these"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """The breaker has counted too much poison of these partitions."""

    partitions: frozenset[TopicPartition]

    def option(self) -> str:
        """Return what to type."""
        return "--breaker"

    def what(self) -> str:
        """Say what for."""
        return "to forget what was counted, and judge anew from here"


Way = Gap | OtherTopic | Skip | Forget


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an operator asks for."""

    gaps: tuple[TopicPartition, ...] = ()
    topics: tuple[str, ...] = ()
    skips: tuple[tuple[TopicPartition, int], ...] = ()
    breaker: bool = False

    def __bool__(self) -> bool:
        """Whether it is anything at all."""
        return bool(self.gaps or self.topics or self.skips or self.breaker)


@dataclass(slots=True, kw_only=True)
class Accepted:
    """What a fresh member may do where it finds what was shown."""

    gaps: dict[TopicPartition, Gap] = field(default_factory=dict)
    topics: dict[str, OtherTopic] = field(default_factory=dict)
    skips: dict[TopicPartition, set[int]] = field(default_factory=dict)
    """Messages to pass over, until the checkpoint has passed them."""
    forget: set[TopicPartition] = field(default_factory=set)
    """Partitions of which the breaker's count is forgotten when they are claimed."""

    def gap(self, partition: TopicPartition, position: int, low: int, high: int) -> Gap | None:
        """Return the gap of a partition that was accepted, if it is the same still."""
        gap = self.gaps.get(partition)
        return gap if gap is not None and gap.position == position and low <= gap.target <= high else None

    def is_new_topic(self, topic: str, old: str | None, new: str | None, *, forgotten: bool = False) -> bool:
        """Whether a topic was accepted in place of another, which may be forgotten altogether."""
        way = self.topics.get(topic)
        return way is not None and way.new == new and (forgotten or way.old == old)

    def skipped(self, partition: TopicPartition, messages: Sequence[Message]) -> set[int]:
        """Return the offsets among some messages of a partition that are to be passed over."""
        offsets = self.skips.get(partition, ())
        first, last = messages[0].offset(), messages[-1].offset()
        return {offset for offset in offsets if first <= offset <= last}

    def passed(self, partition: TopicPartition, start: int, end: int) -> list[int]:
        """Return, and forget, what was passed over when a checkpoint moved from one offset to another."""
        offsets = self.skips.get(partition, set())
        passed = sorted(offset for offset in offsets if start <= offset < end)
        offsets.difference_update(passed)
        return passed

    def left(self) -> dict[TopicPartition, set[int]]:
        """Return what was not passed yet, and stands for the next member; none of a topic that is another now."""
        return {
            partition: set(offsets)
            for partition, offsets in self.skips.items()
            if offsets and partition.topic not in self.topics
        }


def wanted(
    gaps: Iterable[str] = (), topics: Iterable[str] = (), skips: Iterable[str] = (), *, breaker: bool = False
) -> Wanted:
    """Read what was typed; raises ConsumerdError."""
    return Wanted(
        gaps=tuple(_partition(text, "--accept-gap") for text in gaps),
        topics=tuple(topics),
        skips=tuple(_message(text) for text in skips),
        breaker=breaker,
    )


def accept(handler: str, halt: Halt, want: Wanted) -> Accepted:
    """Return what is accepted of the ways that a halt shows; raises ConsumerdError for any other."""
    accepted = Accepted()
    gaps = {way.partition: way for way in halt.ways if isinstance(way, Gap)}
    topics = {way.topic: way for way in halt.ways if isinstance(way, OtherTopic)}
    for partition in want.gaps:
        accepted.gaps[partition] = _shown(gaps.get(partition), f"--accept-gap {partition}", handler, halt)
    for topic in want.topics:
        accepted.topics[topic] = _shown(topics.get(topic), f"--accept-new-topic {topic}", handler, halt)
    for partition, offset in want.skips:
        ways = (
            way
            for way in halt.ways
            if isinstance(way, Skip) and way.partition == partition and way.first <= offset < way.end
        )
        _shown(next(ways, None), f"--skip {partition}@{offset}", handler, halt)
        accepted.skips.setdefault(partition, set()).add(offset)
    if want.breaker:
        counts = (way for way in halt.ways if isinstance(way, Forget))
        accepted.forget = set(_shown(next(counts, None), "--breaker", handler, halt).partitions)
    return accepted


def told(halt: Halt, handler: str, options: str) -> Halt:
    """Return a halt whose message ends with what to type; `options` leads to the daemon's file."""
    text = str(halt).rstrip(".;")
    for what in dict.fromkeys(way.what() for way in halt.ways):
        ways = " ".join(way.option() for way in halt.ways if way.what() == what)
        text += f"; {what}: consumerd resume {handler}{options} {ways}"
    text += (
        f"; once its cause is mended: consumerd restart {handler}{options}; once its file is: consumerd reload{options}"
    )
    return Halt(halt.reason, text, *halt.ways)


def merged(halts: Sequence[Halt]) -> Halt:
    """Return the halts of several partitions as one, with all their ways."""
    first, *others = halts
    if not others:
        return first
    sentences = [str(halt).rstrip(".;") for halt in halts[:SHOWN]]
    if len(halts) > SHOWN:
        sentences.append(f"and {len(halts) - SHOWN} more, in the log")
    return Halt(first.reason, "; ".join(sentences), *(way for halt in halts for way in halt.ways))


_Shown = TypeVar("_Shown", Gap, OtherTopic, Skip, Forget)


def _shown(way: _Shown | None, option: str, handler: str, halt: Halt) -> _Shown:
    if way is None:
        raise ConsumerdError(f"{option} is no way on from the halt of {handler}, and nothing was changed: {halt}")
    return way


def _partition(text: str, option: str) -> TopicPartition:
    match = re.fullmatch(r"([^:@]+):([0-9]{1,9})", text)
    if match is None:
        raise ConsumerdError(f"{option} {text}: write TOPIC:PARTITION, orders:0 for example")
    return TopicPartition(match[1], int(match[2]))


def _message(text: str) -> tuple[TopicPartition, int]:
    place, _, offset = text.partition("@")
    if not re.fullmatch("[0-9]{1,18}", offset):
        raise ConsumerdError(f"--skip {text}: write TOPIC:PARTITION@OFFSET, orders:0@123 for example")
    return _partition(place, "--skip"), int(offset)
