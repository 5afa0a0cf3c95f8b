"""`consumerd dlq redrive`: letters a second time, straight through the handler or back to a topic.

Letters are read again in the topic's order and put together by their source partition, some hundred at a time. Each
such batch is one transaction, whose first statement moves the letters (`consumerd.letters`): of two redrives at once
one finds them taken, and one that is killed has moved those alone whose rows are there. Outages are waited for. A
signal ends it between two batches; what was done stays done, and the same command goes on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from consumerd.accumulator import Batch
from consumerd.commands.dlq.survey import Progress, chosen, survey
from consumerd.errors import ConsumerdError, Halt, Outage
from consumerd.letters import Change, Place
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from psycopg import AsyncConnection

    from consumerd.commands.dlq.survey import Filter, Standing
    from consumerd.commands.dlq.topic import Letter
    from consumerd.config import Config, HandlerConfig, RetryConfig
    from consumerd.letters import Letters
    from consumerd.postgres import Statement

log = logging.getLogger(__name__)

TOGETHER = 1000
"""Letters that are held at once: most may fail again, and each that does costs statements."""
MOST_DOUBLED = 30
"""Times that a wait is doubled, at most: of a longer outage the wait would be no number any more."""


class Taken(ConsumerdError):  # noqa: N818 - as those of `consumerd.errors`
    """Some letters could not be moved; `moved` are the others, by their places and offsets."""

    def __init__(self, moved: set[tuple[Place, int]]) -> None:
        super().__init__("letters were taken by another")
        self.moved = moved


class Stopped(ConsumerdError):  # noqa: N818
    """A signal came."""


@dataclass(slots=True)
class Report:
    """What became of letters."""

    wanted: int = 0
    redriven: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Those of the redriven that the handler makes no row of, by reason."""
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Those that failed again, by reason and class of error."""
    taken: int = 0
    """Those that another run has moved meanwhile, or that the handler reads again."""
    unsettled: int = 0
    """Those that the handler has not behind it, which it reads again."""
    left: int = 0
    """Those that it has not come to."""
    stopped: str | None = None

    @property
    def done(self) -> int:
        """Letters that it has come to."""
        return self.redriven + self.failed.total() + self.taken

    def line(self, *, execute: bool) -> str:
        """Return it as JSON."""
        failed = [{"reason": reason, "error": error, "letters": n} for (reason, error), n in self.failed.items()]
        names = ("redriven", "rows", "skipped", "taken", "unsettled", "left", "stopped")
        told = {name: getattr(self, name) for name in names}
        return msgspec.json.encode({"executed": execute, **told, "failed": failed}).decode()

    def text(self, *, execute: bool, rows: bool) -> str:
        """Return it for people; `rows` where they were made here."""
        skipped = "".join(f", {count} skipped ({reason})" for reason, count in self.skipped.items())
        made = f" ({self.rows} rows{skipped})" if rows else ""
        lines = [f"{self.redriven} letters {'redriven' if execute else 'would be redriven'}{made}."]
        lines += [
            f"{count} {'failed' if execute else 'would fail'} again: {reason}, {error}"
            for (reason, error), count in self.failed.most_common()
        ]
        if self.taken:
            lines.append(f"{self.taken} were taken by another run meanwhile, or the handler reads them again.")
        if self.unsettled:
            lines.append(
                f"{self.unsettled} are not behind the handler's checkpoint: it reads their messages again itself."
            )
        if self.left:
            lines.append(f"{self.left} it has not come to.")
        if self.stopped:
            lines.append(self.stopped)
        return "\n".join(lines)

    def note(self, batch: Batch, rows: int, skipped: Counter[Any]) -> None:
        """Count a batch that was settled, with the rows that it became and what was skipped of it."""
        self.redriven += len(batch.messages) - len(batch.refused)
        self.rows += rows
        self.skipped += skipped
        self.failed.update((refusal.reason, refusal.error) for refusal in batch.refused.values())


class Way(Protocol):
    """How letters are redriven."""

    async def start(self, topics: set[str]) -> None:
        """Look at what must be there, for letters of some topics; raises Outage, Halt."""

    async def settle(self, batch: Batch, report: Report) -> None:
        """Redrive letters of one source partition, all of them; raises Stopped, Halt."""

    async def close(self) -> None:
        """Let go of connections."""


class Waits:
    """Waits in outages, each longer than the one before, until a signal comes."""

    def __init__(self, retry: RetryConfig) -> None:
        self._retry = retry
        self._tries = 0
        self.stop = asyncio.Event()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Have the first SIGINT or SIGTERM set `stop`; a second one ends the process, which loses nothing."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)

        def first() -> None:
            self.stop.set()
            for number in numbers:
                loop.remove_signal_handler(number)

        for number in numbers:
            loop.add_signal_handler(number, first)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def out(self, outage: Outage) -> None:
        """Wait a while; raises Stopped."""
        if not self._tries:
            log.warning("waiting: %s", outage)
        self._tries += 1
        longest = min(self._retry.max, self._retry.initial * 2 ** min(self._tries, MOST_DOUBLED))
        try:
            await asyncio.wait_for(self.stop.wait(), random.uniform(longest / 2, longest))  # noqa: S311 - jitter
        except TimeoutError:
            return
        raise Stopped

    def over(self) -> None:
        """Note that it works again."""
        if self._tries:
            log.info("recovered")
        self._tries = 0


async def redrive(
    config: Config,
    handler: HandlerConfig,
    letters: Letters,
    which: Filter,
    way: Callable[[Waits], Way],
) -> Report:
    """Redrive the letters that a filter takes; raises Outage, Halt before the first of them."""
    found, topic = await survey(config, handler, letters)
    waits, report = Waits(handler.retry), Report()
    try:
        wanted: dict[tuple[Place, int], Standing] = {}
        for letter in found.standings(which):
            if letter.settled:
                wanted[letter.place, letter.offset] = letter
            else:
                report.unsettled += 1
        if not wanted:
            return report
        report.wanted, chosen_way = len(wanted), way(waits)
        with waits.signals():
            try:
                await chosen_way.start({place.topic for place, _ in wanted})
                await _run(chosen(topic, handler.group_id, wanted), handler.batch.max_bytes, chosen_way, waits, report)
            except Stopped:
                report.stopped = "stopped by a signal; the same command goes on"
            except Halt as halt:
                if not report.done:
                    raise
                report.stopped = str(halt)
            finally:
                await chosen_way.close()
        report.left = report.wanted - report.done
    finally:
        topic.close()
    return report


async def _run(
    more: Callable[[], list[tuple[Letter, Standing]]],
    most_bytes: int,
    way: Way,
    waits: Waits,
    report: Report,
) -> None:
    progress = Progress("letters redriven")
    held: dict[Place, list[Letter]] = {}
    try:
        while True:
            try:
                some = await asyncio.to_thread(more)
            except Outage as outage:
                await waits.out(outage)
                continue
            for letter, standing in some:
                letter.tried = standing.attempts
                letter.was = "open" if standing.state is None else standing.state.status
                held.setdefault(letter.place, []).append(letter)
            full = sum(map(len, held.values())) >= TOGETHER
            if full or not some or sum(len(letter) for of in held.values() for letter in of) >= most_bytes:
                for place in sorted(held):
                    if waits.stop.is_set():
                        raise Stopped
                    await way.settle(batch_of(held[place]), report)
                    progress.show(report.done, report.wanted)
                held.clear()
            if not some:
                return
    finally:
        progress.end()


def batch_of(letters: list[Letter]) -> Batch:
    """Return letters of one source partition, in the order of their messages."""
    letters.sort(key=lambda letter: letter.offset())
    return Batch(
        partition=TopicPartition(letters[0].topic(), letters[0].partition()),
        first_offset=letters[0].offset(),
        next_offset=letters[-1].offset() + 1,
        messages=list(letters),
        size=sum(map(len, letters)),
        reason="drain",
        gathered_since=0.0,
    )


def claim(letters: Letters, batch: Batch, target: str) -> Statement:
    """Return what moves the letters of a batch to what is known of them: redriven, or failed again."""
    return letters.move(
        [
            Change(
                place=letter.place,
                offset=letter.offset(),
                status="failed" if position in batch.refused else "redriven",
                was=letter.was,
                tried=letter.tried,
                epoch=letter.epoch,
                failed_at=letter.failed_at,
                refusal=batch.refused.get(position),
            )
            for position, letter in enumerate(_letters(batch))
        ],
        target,
    )


def check_claim(moved: Sequence[tuple[Any, ...]], batch: Batch) -> None:
    """Look at what a claim answered; raises Taken when some letters did not move."""
    if len(moved) < len(batch.messages):
        raise Taken({(Place(topic, topic_id, partition), at) for topic, topic_id, partition, at in moved})


async def after_taken(
    conn: AsyncConnection[Any], letters: Letters, batch: Batch, taken: Taken, report: Report
) -> Batch | None:
    """Return what is left of a batch, if anything; itself when this very run has moved it: its COMMIT had landed.

    Letters that another run has moved meanwhile, or that the handler reads again by now, are counted.
    """
    states = await letters.read(conn)
    missing = [letter for letter in _letters(batch) if (letter.place, letter.offset()) not in taken.moved]
    ours = [
        state
        for letter in missing
        if (state := states.get(letter.place, {}).get(letter.offset())) is not None
        and (state.run, state.attempts) == (letters.run, letter.tried + 1)
    ]
    if len(ours) == len(batch.messages):
        return batch
    report.taken += len(missing)
    rest = [letter for letter in _letters(batch) if (letter.place, letter.offset()) in taken.moved]
    return batch_of(rest) if rest else None


def _letters(batch: Batch) -> list[Letter]:
    return cast("list[Letter]", batch.messages)
