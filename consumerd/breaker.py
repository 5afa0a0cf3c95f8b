"""The breaker: halts a handler whose share of poison is over the limit. Pure.

A topic that changed its format is not ten thousand poison messages, it is one mistake of ours. Decides for each batch
before its first letter, so a batch that trips it is left as it was. The window stretches back until it holds
`min_messages`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from consumerd.errors import Halt

if TYPE_CHECKING:
    from consumerd.accumulator import Batch
    from consumerd.config import PoisonConfig


class Breaker:
    """Counts messages and refusals over a window."""

    def __init__(self, config: PoisonConfig) -> None:
        self._config = config
        self._seen: deque[tuple[float, int, int]] = deque()
        self._messages = 0
        self._refused = 0

    def lacks(self, batch: Batch) -> int:
        """Return how many messages of a batch that was judged it takes, beside the others seen, to judge."""
        return max(0, self._config.min_messages - self._messages + len(batch.messages))

    def take_back(self, rest: Batch, now: float) -> None:
        """Count what was cut off a batch that was judged as not seen yet: it is judged as a batch of its own."""
        if rest.judged is not None:
            self._count(now, -len(rest.messages), -rest.judged)
            rest.judged = None

    def judge(self, batch: Batch, now: float) -> None:
        """Count a batch, or what was refused of it since it was judged last; raises Halt over the limit."""
        messages = 0 if batch.judged is not None else len(batch.messages)
        refused = len(batch.refused) - (batch.judged or 0)
        batch.judged = len(batch.refused)
        if not messages and not refused:
            return
        self._count(now, messages, refused)
        while self._seen and self._seen[0][0] < now - self._config.window:
            _, messages, refused = self._seen[0]
            if self._messages - messages < self._config.min_messages:
                break
            self._seen.popleft()
            self._messages -= messages
            self._refused -= refused
        if self._messages >= self._config.min_messages and self._refused > self._config.max_ratio * self._messages:
            raise Halt(
                "breaker",
                f"{self._refused} of the last {self._messages} messages were poison, over the limit of "
                f"{self._config.max_ratio:.1%} ({self._of(batch)}); mend the handler or the producer, or raise "
                f"`max_ratio` under [poison] in the handler's file, then restart",
            )

    def _count(self, now: float, messages: int, refused: int) -> None:
        self._seen.append((now, messages, refused))
        self._messages += messages
        self._refused += refused

    @staticmethod
    def _of(batch: Batch) -> str:
        """Say what is wrong with most of a batch."""
        if not batch.refused:
            return "in earlier batches"
        messages = [refusal.message for refusal in batch.refused.values()]
        return f"mostly: {max(set(messages), key=messages.count)}"
