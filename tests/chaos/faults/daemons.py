# ruff: noqa: ARG002, D102 - the methods of a fault are described at Fault, and not each needs all it gets
"""Faults of daemons, and what their operator does."""

import random

from tests.chaos.faults.base import Fault
from tests.chaos.fleet import SLOTS
from tests.chaos.stage import LOCKS, Stage
from tests.chaos.variant import Variant
from tests.chaos.world import SESSION_TIMEOUT_MS

REWIND = 3000
"""Most offsets by which a partition is set back."""


class _OfDaemon(Fault):
    def locks(self) -> frozenset[str]:
        return frozenset({f"daemon {self.slot}"})

    def __str__(self) -> str:
        return f"{self.kind} of {self.slot} for {self.seconds:.1f} s"


class Kill(_OfDaemon):
    """SIGKILL, and started again."""

    kind, weight, lasts = "daemon killed", 8, (0.0, 2.0)

    def begin(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].kill()

    def end(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].start()


class Pause(_OfDaemon):
    """SIGSTOP until its session has timed out: then it is a zombie, and hears of it only after its next write."""

    kind, weight, lasts = "daemon stopped past its session", 4, (SESSION_TIMEOUT_MS / 1000 + 1, 10.0)

    def begin(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].pause()

    def end(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].go_on()


class Hang(Pause):
    """SIGSTOP for less than that."""

    kind, weight, lasts = "daemon stopped for a moment", 2, (0.2, 3.0)


class Terminate(_OfDaemon):
    """SIGTERM, and started again after a while: it leaves its groups and joins them."""

    kind, weight, lasts = "daemon restarted", 5, (0.0, 5.0)

    def begin(self, stage: Stage) -> None:
        status = stage.fleet.slots[self.slot].stop()
        stage.fleet.note_exit(self.slot, status)

    def end(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].start()


class Join(_OfDaemon):
    """One more daemon for a while."""

    kind, weight, lasts = "daemon joins and leaves", 4, (4.0, 15.0)

    def __init__(self, dice: random.Random, variant: Variant) -> None:
        super().__init__(dice, variant)
        self.slot = dice.randrange(variant.daemons, SLOTS)

    def begin(self, stage: Stage) -> None:
        stage.fleet.slots[self.slot].start()

    def end(self, stage: Stage) -> None:
        status = stage.fleet.slots[self.slot].stop()
        stage.fleet.note_exit(self.slot, status)


class Rewind(Fault):
    """An operator's reset: all daemons stopped, offsets set back with Kafka's own tool, started again."""

    kind, weight, lasts = "offsets set back", 1, (0.0, 1.0)
    holds = frozenset(LOCKS)

    @classmethod
    def fits(cls, variant: Variant) -> bool:
        return variant.mode == "postgres"

    def begin(self, stage: Stage) -> None:
        self._stopped = [slot for slot in stage.fleet.slots if slot.wanted]
        for slot in self._stopped:
            slot.stop()
        stage.end_backends()
        for handler in stage.variant.handlers:
            if handler == "upsert" or not stage.variant.primary_key:
                stage.rewind(handler, {part: self.dice.randint(0, REWIND) for part in range(stage.producer.partitions)})

    def end(self, stage: Stage) -> None:
        for slot in self._stopped:
            slot.start()
