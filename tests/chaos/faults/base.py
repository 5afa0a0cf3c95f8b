"""What a fault is: it begins, lasts, and ends, and leaves everything as it was.

A fault holds the locks of what it takes away, so that nobody else starts it meanwhile; all others overlap. One that
works through Postgres or Kafka waits until they are there.
"""

import random
from typing import ClassVar

from tests.chaos.stage import Stage
from tests.chaos.variant import Variant


class Fault:
    """One fault of a schedule; `lasts` is its shortest and longest time in seconds."""

    kind: ClassVar[str]
    weight: ClassVar[int]
    lasts: ClassVar[tuple[float, float]] = (0.0, 0.0)
    holds: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, dice: random.Random, variant: Variant) -> None:
        self.seconds = dice.uniform(*self.lasts)
        self.slot = dice.randrange(variant.daemons)
        self.dice = random.Random(dice.random())

    @classmethod
    def fits(cls, variant: Variant) -> bool:  # noqa: ARG003
        """Whether it can happen in this setting."""
        return True

    def locks(self) -> frozenset[str]:
        """Return what it needs for itself."""
        return self.holds

    def begin(self, stage: Stage) -> None:
        """Do it."""

    def end(self, stage: Stage) -> None:
        """Undo it."""

    def __str__(self) -> str:
        """As a schedule tells it."""
        return f"{self.kind} for {self.seconds:.1f} s"
