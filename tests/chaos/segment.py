"""One segment: made, run under its schedule, let catch up, stopped, compared."""

import random
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
from tests.chaos.variant import HANDLERS, Mode, Protocol
from tests.chaos.world import World

PRODUCE_TIMEOUT = 300.0
STANDSTILL = 60.0
"""Seconds without any checkpoint moving after which nothing more is waited for."""
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
    package: Path | None = None


def run(world: World, plan: Plan, number: int, folder: Path) -> dict[str, Any]:
    """Run one segment and return its result, whatever happens."""
    seed = f"{plan.seed}/{number}"
    dice = random.Random(seed)
    setting = variant.draw(dice, mode=plan.mode, small_disk=world.disk is not None, protocol=plan.protocol)
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
            stage.fleet.stop()
            result["problems"] += [*stage.fleet.problems, *execution.problems]
            result["faults"] = dict(Counter(fault.kind for fault in execution.done))
            result["recovery"] = [(kind, round(seconds, 2)) for kind, seconds in recovery.seconds(execution.done)]
            result["peak_rss"] = max(slot.peak_rss for slot in stage.fleet.slots)
        verdict = check.check(stage, stage.ends())
        result["counts"] = dict(verdict.counts)
        result["examples"] = dict(verdict.examples)
    finally:
        stage.close()


def _catch_up(stage: Stage, ends: dict[int, int]) -> None:
    """Wait until both handlers' checkpoints stand at the logs' ends, as long as any of them moves."""
    before: list[dict[int, int]] = []
    moved = time.monotonic()
    while True:
        stage.fleet.look()
        now = [stage.checkpoints(handler) for handler in HANDLERS]
        if all(checkpoints == ends for checkpoints in now):
            return
        if now != before:
            before, moved = now, time.monotonic()
        elif time.monotonic() - moved > STANDSTILL:
            stage.fleet.problems.append(f"checkpoints stand still at {now}, the logs end at {ends}")
            return
        time.sleep(LOOK)
