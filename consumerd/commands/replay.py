"""`consumerd replay`: a range of a handler's messages once more, by the handler's own path, into its table or another.

`replay_plan.py` settles what it is to do. A dry run goes through the first messages of the range with every write
rolled back. `--execute` makes a record and checkpoints of its own (`replays.py`), runs, and goes on with them when the
same command is typed again, after a stop as after a crash.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from consumerd import postgres
from consumerd.commands.replay_plan import prepare, refuse_repeats
from consumerd.commands.replays import Begun, Replays
from consumerd.daemon import GC_ALLOCATIONS
from consumerd.errors import ConsumerdError, UsageError
from consumerd.replay import Counts, Plan, Replay
from consumerd.replay_checkpoint import Range

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import AsyncConnection

    from consumerd.commands.replay_plan import Prepared, Wish
    from consumerd.commands.replays import Record
    from consumerd.config import Config, HandlerConfig

log = logging.getLogger(__name__)

SEEN_INTERVAL = 10.0
"""Seconds between two notes in the record that a run goes on."""
LEAVE_AT_ONCE = 1
"""The exit code after a second signal."""
SHOW_INTERVAL = 0.5
"""Seconds between two looks at the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended, and what it made of the messages."""

    counts: Counts
    passed: int
    """Offsets that it went through, of `offsets`."""
    offsets: int
    halt: str | None = None
    stopped: bool = False
    """By a signal."""
    drained: bool = True

    @property
    def ended(self) -> bool:
        """Whether it came to the end."""
        return self.halt is None and not self.stopped


async def plan(config: Config, handler: HandlerConfig, wish: Wish) -> Prepared:
    """Settle what is to be replayed, and change nothing; raises UsageError, Halt, Outage."""
    conn = await _connect(config, handler)
    try:
        return await prepare(config, handler, wish, conn)
    finally:
        await conn.close()


async def records(config: Config, handler: HandlerConfig) -> list[Record]:
    """Return the replays of a handler."""
    conn = await _connect(config, handler)
    try:
        return await Replays(conn, config.postgres.schema_name, handler.group_id).listed()
    finally:
        await conn.close()


async def forget(config: Config, handler: HandlerConfig, number: int) -> None:
    """Forget a replay of a handler; raises UsageError when there is none."""
    conn = await _connect(config, handler)
    try:
        replays = Replays(conn, config.postgres.schema_name, handler.group_id)
        if not (await replays.are_kept() and await replays.forget(number)):
            raise UsageError(f"--forget {number}: handler {handler.name} has no such replay; --list shows them")
    finally:
        await conn.close()


async def try_out(config: Config, prepared: Prepared, count: int, show: Callable[[Replay], None]) -> Result:
    """Go through the first messages of a range, an equal share of each partition, with every write rolled back."""
    share = max(1, count // max(1, len(prepared.ranges)))
    some = {p: Range(of.start, min(of.end, of.start + share)) for p, of in prepared.ranges.items()}
    return await _run(config, Plan(handler=prepared.handler, ranges=some), show)


async def execute(
    config: Config, handler: HandlerConfig, wish: Wish, prepared: Prepared, show: Callable[[Replay], None]
) -> tuple[int, Result, Record | None]:
    """Replay; return the replay's number, how this run ended, and the record of one that is over."""
    conn = await _connect(config, handler)
    try:
        replays = Replays(conn, config.postgres.schema_name, handler.group_id)
        await replays.make()
        if prepared.goes_on is not None:
            number = prepared.goes_on.id
        else:
            look = partial(refuse_repeats, replays, prepared)  # another may have begun since it was prepared
            number = await replays.begin(_begun(handler, wish, prepared), look)
        for partition, of in prepared.ranges.items() if prepared.goes_on else ():
            await replays.leave_out(number, partition, of.start)
        run = await replays.run(number)
    finally:
        await conn.close()
    plan = Plan(handler=prepared.handler, ranges=prepared.ranges, group=replays.own(number), rate=wish.rate)
    seen = asyncio.create_task(_note_that_it_runs(config, handler, number, run), name="replay: seen")
    try:
        result = await _run(config, plan, show)
    finally:
        seen.cancel()
    conn = await _connect(config, handler)
    try:
        replays = Replays(conn, config.postgres.schema_name, handler.group_id)
        if result.ended:
            return number, result, await replays.finish(number)
        await replays.fail(number, run, result.halt or "stopped by a signal")
    finally:
        await conn.close()
    return number, result, None


async def _connect(config: Config, handler: HandlerConfig) -> AsyncConnection[Any]:
    return await postgres.connect(config.postgres, f"consumerd/replay-{handler.name}")


def _begun(handler: HandlerConfig, wish: Wish, prepared: Prepared) -> Begun:
    return Begun(
        handler=handler.name,
        range=wish.text,
        target=prepared.handler.table.name,
        ranges=prepared.ranges,
        topics=prepared.found,
        targets=prepared.targets,
        epochs=prepared.epochs,
    )


async def _note_that_it_runs(config: Config, handler: HandlerConfig, number: int, run: int) -> None:
    """Note now and then that the run goes on, so that one that was killed can be told from it."""
    while True:
        await asyncio.sleep(SEEN_INTERVAL)
        with suppress(ConsumerdError):  # the run meets the same, and tells
            conn = await _connect(config, handler)
            try:
                await Replays(conn, config.postgres.schema_name, handler.group_id).seen(number, run)
            finally:
                await conn.close()


async def _run(config: Config, plan: Plan, show: Callable[[Replay], None]) -> Result:
    """Run to the end, a halt, or a signal."""
    if not plan.offsets:
        return Result(counts=Counts(), passed=0, offsets=0)
    stop = _stop_on_signals()
    replay = Replay(config, plan, config.daemon.max_buffered // len(config.handlers))
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    life = asyncio.create_task(replay.run(), name=f"{plan.handler.name}: replay")
    showing = asyncio.create_task(_show_forever(replay, show), name="replay: progress")
    ends = [asyncio.create_task(event.wait()) for event in (replay.ended, stop)]
    try:
        await asyncio.wait([life, *ends], return_when=asyncio.FIRST_COMPLETED)
        drained = await replay.drain(time.monotonic() + config.daemon.drain_timeout)
        life.cancel()
        with suppress(asyncio.CancelledError):
            await life
    finally:
        for task in (showing, *ends):
            task.cancel()
    show(replay)
    halted = replay.progress.halted
    return Result(
        counts=replay.counts,
        passed=replay.passed,
        offsets=plan.offsets,
        halt=str(halted) if halted and not replay.ended.is_set() else None,
        stopped=not replay.ended.is_set() and halted is None,
        drained=drained,
    )


async def _show_forever(replay: Replay, show: Callable[[Replay], None]) -> None:
    while True:
        show(replay)
        await asyncio.sleep(SHOW_INTERVAL)


def _stop_on_signals() -> asyncio.Event:
    """Return what the first SIGTERM or SIGINT sets; a second one ends the process."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            logging.shutdown()
            os._exit(LEAVE_AT_ONCE)
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop
