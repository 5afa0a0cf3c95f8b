"""The schedule of a segment: which fault comes when, drawn from its seed."""

import random
import time
import traceback
from collections.abc import Collection, Iterable
from concurrent.futures import wait
from dataclasses import dataclass

from tests.chaos.faults import KINDS, Fault
from tests.chaos.stage import Stage
from tests.chaos.variant import Variant

QUIET = 5.0
"""Seconds at the start without faults: the daemons join."""
OVER_TIMEOUT = 300.0
"""Seconds after the last fault's start in which all are over; they wait for each other's locks."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A fault and the second of the segment at which it is due."""

    at: float
    fault: Fault


@dataclass(frozen=True, kw_only=True)
class Done:
    """A fault that is over; times are monotonic."""

    kind: str
    began: float
    ended: float


def draw(
    dice: random.Random, variant: Variant, *, faults: int, seconds: float, kinds: Collection[str] | None
) -> list[Planned]:
    """Draw the faults: a bag of all kinds by weight, shuffled, as often as needed; times are uniform."""
    fitting = [kind for name, kind in KINDS.items() if kind.fits(variant) and (kinds is None or name in kinds)]
    bag = [kind for kind in fitting for _ in range(kind.weight)]
    chosen: list[type[Fault]] = []
    while len(chosen) < faults:
        dice.shuffle(bag)
        chosen += bag
    times = sorted(dice.uniform(QUIET, max(QUIET, seconds)) for _ in range(faults))
    return [Planned(at=at, fault=kind(dice, variant)) for at, kind in zip(times, chosen, strict=False)]


class Execution:
    """The faults of one segment, side by side."""

    def __init__(self, stage: Stage, plan: Iterable[Planned]) -> None:
        self._stage = stage
        self._plan = list(plan)
        self.done: list[Done] = []
        self.problems: list[str] = []

    def run(self, started: float) -> None:
        """Start each fault when it is due, and return when all are over."""
        running = {}
        for planned in self._plan:
            time.sleep(max(0.0, started + planned.at - time.monotonic()))
            running[self._stage.world.threads.submit(self._perform, planned.fault)] = planned.fault
        for late in wait(running, OVER_TIMEOUT).not_done:
            self.problems.append(f"the fault {running[late]} is not over")

    def _perform(self, fault: Fault) -> None:
        try:
            with self._stage.holding(fault.locks()):
                began = time.monotonic()
                try:
                    fault.begin(self._stage)
                    time.sleep(fault.seconds)
                finally:
                    fault.end(self._stage)
                self.done.append(Done(kind=fault.kind, began=began, ended=time.monotonic()))
        except Exception:  # noqa: BLE001 - the root of a thread: the segment fails with it
            self.problems.append(f"the fault {fault.kind} failed: {traceback.format_exc()}")
