"""What happened lately: the last errors, each sentence once, and the writes of the last seconds.

Pure: the time is passed in, Unix time for what is shown as a moment, monotonic for rates.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from consumerd.types import TopicPartition

ERRORS = 10
"""Errors that are kept: what led to a halt, and not a log."""
RATE_WINDOW = 10.0
"""Seconds over which rates and means are told."""


@dataclass(slots=True)
class _Met:
    first: float
    last: float
    count: int = 1


class Errors:
    """The last errors, by their sentence: one that is met at each try is one error."""

    def __init__(self) -> None:
        self._met: dict[str, _Met] = {}

    def add(self, sentence: str, now: float) -> None:
        """Note an error; the oldest of too many is forgotten."""
        met = self._met.pop(sentence, None)
        if met is None:
            met = _Met(now, now)
        else:
            met.last, met.count = now, met.count + 1
        self._met[sentence] = met
        if len(self._met) > ERRORS:
            del self._met[next(iter(self._met))]

    @property
    def last(self) -> str | None:
        """The sentence that was met last."""
        return next(reversed(self._met), None)

    def told(self) -> list[dict[str, Any]]:
        """Return them as /status shows them, the last one first."""
        return [
            {"message": sentence, "first": met.first, "last": met.last, "count": met.count}
            for sentence, met in reversed(self._met.items())
        ]


class _Write(NamedTuple):
    at: float
    partition: TopicPartition
    rows: int
    messages: int
    seconds: float


class Writes:
    """The batches that were written in the last seconds."""

    def __init__(self) -> None:
        self._writes: deque[_Write] = deque()

    def add(self, now: float, partition: TopicPartition, *, rows: int, messages: int, seconds: float) -> None:
        """Note a written batch."""
        self._writes.append(_Write(now, partition, rows, messages, seconds))
        self._forget(now)

    def rates(self, now: float) -> dict[TopicPartition, float]:
        """Return rows/s of each partition that any were written of."""
        self._forget(now)
        rows: Counter[TopicPartition] = Counter()
        for write in self._writes:
            rows[write.partition] += write.rows
        return {partition: count / RATE_WINDOW for partition, count in rows.items()}

    def means(self, now: float) -> tuple[float, float] | None:
        """Return messages of a batch and seconds of its write; None when none was written."""
        self._forget(now)
        if not self._writes:
            return None
        batches = len(self._writes)
        return (
            sum(write.messages for write in self._writes) / batches,
            sum(write.seconds for write in self._writes) / batches,
        )

    def _forget(self, now: float) -> None:
        while self._writes and self._writes[0].at < now - RATE_WINDOW:
            self._writes.popleft()
