"""The breaker: halts a handler whose share of poison is over the limit. Pure.

A topic that changed its format is not ten thousand poison messages, it is one mistake of ours. Decides for each batch
before its first letter, so a batch that trips it is left as it was. The window stretches back until it holds
`min_messages`.

A restart does not forget: what was counted of a partition (`tally`) is written beside its checkpoint, in the
transaction that moves it, and whoever claims the partition next counts it as its own (`recall`), in whatever process.
So a handler that halted here and is started again stands where it stood, and a restart lets no more poison through.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from consumerd.accumulator import Judged
from consumerd.errors import Halt
from consumerd.types import NO_TALLY, Tally
from consumerd.ways_on import Forget

if TYPE_CHECKING:
    from collections.abc import Iterable

    from consumerd.accumulator import Batch
    from consumerd.config import PoisonConfig
    from consumerd.types import TopicPartition


class Breaker:
    """Counts messages and refusals over a window."""

    def __init__(self, config: PoisonConfig) -> None:
        self._config = config
        self._seen: deque[Judged] = deque()
        """The oldest first."""
        self._messages = 0
        self._refused = 0
        self._tallies: dict[TopicPartition, Tally] = {}

    def lacks(self, batch: Batch) -> int:
        """Return how many messages of a batch it takes, beside the others seen, to judge."""
        others = self._messages - (batch.judged.messages if batch.judged else 0)
        return max(0, self._config.min_messages - others)

    def take_back(self, batch: Batch) -> None:
        """Count a batch as not seen yet: a part of it was cut off, and is judged as a batch of its own."""
        if batch.judged is not None:
            self._take_off(batch.judged)
            batch.judged = None

    def judge(self, batch: Batch, now: float) -> None:
        """Count a batch as it is now, once however often it is judged; raises Halt over the limit.

        One without poison goes on, whatever was counted before: it sends no letter, and whoever has mended the handler
        could not start it otherwise.
        """
        messages, refused = len(batch.messages) - batch.skipped.total(), len(batch.refused)
        if batch.judged is not None:
            if (batch.judged.messages, batch.judged.refused) == (messages, refused):
                return
            self._take_off(batch.judged)
        batch.judged = Judged(partition=batch.partition, at=now, messages=messages, refused=refused)
        if messages:  # else nothing would ever push it out of a window that stretches
            self._seen.append(batch.judged)
        self._add(batch.partition, messages, refused)
        while self._seen and self._seen[0].at < now - self._config.window:
            if self._messages - self._seen[0].messages < self._config.min_messages:
                break
            self._take_off(self._seen.popleft())
        share = self._config.max_ratio * self._messages
        if refused and self._messages >= self._config.min_messages and self._refused > share:
            raise Halt(
                "breaker",
                f"{self._refused} of the last {self._messages} messages were poison, over the limit of "
                f"{self._config.max_ratio:.1%} ({self._of(batch)}); mend the handler or the producer, then restart, "
                f"which forgets none of them; or, to let them pass as poison, write a higher `max_ratio` under "
                f"[poison] in the handler's file, up to 1.0",
                Forget(partitions=frozenset(self._tallies)),
            )

    def tally(self, partition: TopicPartition) -> Tally:
        """Return what was counted of a partition and is within the window still."""
        return self._tallies.get(partition, NO_TALLY)

    def recall(self, partition: TopicPartition, tally: Tally, now: float) -> None:
        """Count what was counted of a partition before it was claimed, here or elsewhere, and nothing besides of it."""
        self.forget([partition])
        if tally.messages:
            at = now - tally.age
            judged = Judged(partition=partition, at=at, messages=tally.messages, refused=tally.refused)
            self._seen = deque(sorted([*self._seen, judged], key=lambda each: each.at))
            self._add(partition, tally.messages, tally.refused)

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Count no more what was counted of partitions that are another's now."""
        gone = set(partitions) & self._tallies.keys()
        if gone:
            for judged in self._seen:
                if judged.partition in gone:
                    self._take_off(judged)

    def _add(self, partition: TopicPartition, messages: int, refused: int) -> None:
        self._messages += messages
        self._refused += refused
        before = self.tally(partition)
        self._tallies[partition] = Tally(before.messages + messages, before.refused + refused)

    def _take_off(self, judged: Judged) -> None:
        self._add(judged.partition, -judged.messages, -judged.refused)
        judged.messages = judged.refused = 0

    @staticmethod
    def _of(batch: Batch) -> str:
        """Say what is wrong with most of a batch."""
        messages = [refusal.message for refusal in batch.refused.values()]
        return f"mostly: {max(set(messages), key=messages.count)}"
