"""One segment: made, run under its schedule, let catch up, stopped, compared."""

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import check, schedule, variant
from tests.chaos.producer import Order
from tests.chaos.recovery import Recovery
from tests.chaos.stage import Stage
from tests.chaos.variant import MAX_BUFFERED_MIB, Mode, Protocol
from tests.chaos.world import World

PRODUCE_TIMEOUT = 300.0
STANDSTILL = 60.0
"""Seconds without any checkpoint moving after which nothing more is waited for."""
MEMORY_LIMIT_MIB = 100 + 3 * MAX_BUFFERED_MIB
"""For a daemon: what it is made of (75 MiB without a message), `max_buffered`, one decompressed fetch for each handler
(lz4 makes a quarter of these records), and what the allocator keeps. Seen: 236 MiB; without the bound a gigabyte."""
LOOK = 1.0
"""Seconds between two looks at daemons and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every segment of a run has in common."""

    seed: int
    seconds: float
    records: int
    faults: int
    mode: Mode
    kinds: tuple[str, ...] | None = None
    protocol: Protocol | None = None
    daemons: int | None = None
    package: Path | None = None


def run(world: World, plan: Plan, number: int, folder: Path) -> dict[str, Any]:
    """Run one segment and return its result, whatever happens."""
    seed = f"{plan.seed}/{number}"
    dice = random.Random(seed)
    setting = variant.draw(
        dice, mode=plan.mode, small_disk=world.disk is not None, protocol=plan.protocol, daemons=plan.daemons
    )
    planned = schedule.draw(dice, setting, faults=plan.faults, seconds=plan.seconds, kinds=plan.kinds)
    print(f"segment {number}, seed {seed}: {setting.told()}", flush=True)
    for entry in planned:
        print(f"  {entry.at:6.1f} s  {entry.fault}", flush=True)
    order = Order(
        bootstrap=world.kafka.bootstrap,
        topic=f"chaos-{plan.seed}-{number}",
        seed=seed,
        records=plan.records,
        seconds=plan.seconds,
    )
    started = time.monotonic()
    result: dict[str, Any] = {
        "segment": number,
        "seed": seed,
        "variant": setting.told(),
        "schedule": [f"{entry.at:.1f} {entry.fault}" for entry in planned],
        "records": 0,
        "counts": dict.fromkeys(check.COUNTS, 0),
        "faults": {},
        "recovery": [],
        "problems": [],
    }
    try:
        _run(world, plan, setting=setting, planned=planned, order=order, folder=folder, result=result)
    except Exception:  # noqa: BLE001 - a segment that breaks is one that failed; the next is run
        result["problems"].append(traceback.format_exc())
    result["seconds"] = round(time.monotonic() - started, 1)
    result["passed"] = not result["problems"] and not any(result["counts"].values())
    return result


def _run(
    world: World,
    plan: Plan,
    *,
    setting: variant.Variant,
    planned: Collection[schedule.Planned],
    order: Order,
    folder: Path,
    result: dict[str, Any],
) -> None:
    stage = Stage(world, folder, variant=setting, order=order, package=plan.package)
    try:
        recovery = Recovery(stage)
        looking = _Looking(stage)
        execution = schedule.Execution(stage, planned)
        try:
            stage.fleet.start()
            execution.run(time.monotonic())
            stage.producer.finish(PRODUCE_TIMEOUT)
            ends = stage.ends()
            result["records"] = sum(ends.values())
            _catch_up(stage, ends)
        finally:
            recovery.stop()
            looking.stop()
            stage.fleet.stop()
            result["problems"] += [*stage.fleet.problems, *execution.problems]
            result["faults"] = dict(Counter(fault.kind for fault in execution.done))
            result["recovery"] = [(kind, round(seconds, 2)) for kind, seconds in recovery.seconds(execution.done)]
            result["peak_rss_mib"] = peak = max(slot.peak_rss for slot in stage.fleet.slots) >> 20
            if peak > MEMORY_LIMIT_MIB:
                result["problems"].append(f"a daemon grew to {peak} MiB; {MEMORY_LIMIT_MIB} MiB are its limit")
        verdict = check.check(stage, stage.ends(), len(execution.done))
        result["repeats"] = verdict.repeats
        result["counts"] = dict(verdict.counts)
        result["examples"] = dict(verdict.examples)
    finally:
        stage.close()


class _Looking:
    """A thread that looks at the daemons as long as the segment lasts."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="looking", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            self._stage.fleet.look()


def _catch_up(stage: Stage, ends: dict[int, int]) -> None:
    """Wait until both handlers' checkpoints stand at the logs' ends, as long as any of them moves.

    A broker that lets nobody at all into a group after its crashes (seen) is restarted, once, and that is told.
    """
    before: list[dict[int, int]] = []
    moved = time.monotonic()
    restarted = False
    while True:
        now = [stage.checkpoints(handler) for handler in stage.variant.handlers]
        if all(checkpoints == ends for checkpoints in now):
            return
        if now != before:
            before, moved = now, time.monotonic()
        elif time.monotonic() - moved > STANDSTILL and not restarted and not stage.lets_in():
            print("  the broker lets nobody into a new group: it is restarted", flush=True)
            stage.world.kafka.stop()
            stage.world.kafka.start()
            moved, restarted = time.monotonic(), True
        elif time.monotonic() - moved > STANDSTILL:
            stage.fleet.problems.append(f"checkpoints stand still at {now}, the logs end at {ends}")
            return
        time.sleep(LOOK)
