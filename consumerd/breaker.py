"""The breaker: halts a handler whose share of poison is over the limit. Pure.

A topic that changed its format is not ten thousand poison messages, it is one mistake of ours. Decides for each batch
before its first letter, so a batch that trips it is left as it was. The window stretches back until it holds
`min_messages`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from consumerd.accumulator import Judged
from consumerd.errors import Halt

if TYPE_CHECKING:
    from consumerd.accumulator import Batch
    from consumerd.config import PoisonConfig


class Breaker:
    """Counts messages and refusals over a window."""

    def __init__(self, config: PoisonConfig) -> None:
        self._config = config
        self._seen: deque[Judged] = deque()
        self._messages = 0
        self._refused = 0

    def lacks(self, batch: Batch) -> int:
        """Return how many messages of a batch it takes, beside the others seen, to judge."""
        others = self._messages - (batch.judged.messages if batch.judged else 0)
        return max(0, self._config.min_messages - others)

    def take_back(self, batch: Batch) -> None:
        """Count a batch as not seen yet: a part of it was cut off, and is judged as a batch of its own."""
        if batch.judged is not None:
            self._forget(batch.judged)
            batch.judged = None

    def judge(self, batch: Batch, now: float) -> None:
        """Count a batch as it is now, once however often it is judged; raises Halt over the limit."""
        messages, refused = len(batch.messages) - batch.skipped.total(), len(batch.refused)
        if batch.judged is not None:
            if (batch.judged.messages, batch.judged.refused) == (messages, refused):
                return
            self._forget(batch.judged)
        batch.judged = Judged(at=now, messages=messages, refused=refused)
        self._seen.append(batch.judged)
        self._messages += messages
        self._refused += refused
        while self._seen and self._seen[0].at < now - self._config.window:
            if self._messages - self._seen[0].messages < self._config.min_messages:
                break
            self._forget(self._seen.popleft())
        if self._messages >= self._config.min_messages and self._refused > self._config.max_ratio * self._messages:
            raise Halt(
                "breaker",
                f"{self._refused} of the last {self._messages} messages were poison, over the limit of "
                f"{self._config.max_ratio:.1%} ({self._of(batch)}); mend the handler or the producer, or raise "
                f"`max_ratio` under [poison] in the handler's file, then restart",
            )

    def _forget(self, judged: Judged) -> None:
        self._messages -= judged.messages
        self._refused -= judged.refused
        judged.messages = judged.refused = 0

    @staticmethod
    def _of(batch: Batch) -> str:
        """Say what is wrong with most of a batch."""
        if not batch.refused:
            return "in earlier batches"
        messages = [refusal.message for refusal in batch.refused.values()]
        return f"mostly: {max(set(messages), key=messages.count)}"
