"""Which letters there are and how each stands: their headers in the topic, and their rows in the database.

Letters that were written twice for one message are one, told by the newest. Of each a few words are kept, and no value.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import re
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from consumerd import postgres
from consumerd.checkpoint import schema_is_there
from consumerd.commands.dlq.topic import LetterTopic, letter_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from consumerd.commands.dlq.topic import Letter, Why
    from consumerd.config import Config, HandlerConfig
    from consumerd.letters import Claim, Letters, Place, State, Status

log = logging.getLogger(__name__)

LOG_INTERVAL = 10.0
"""Seconds between two lines in the log."""
SOURCE = re.compile(r"([A-Za-z0-9._-]+?)(?::(\d+)(?:@(\d+)(?:(?:-|\.\.)(\d+))?)?)?")


class Source(NamedTuple):
    """Messages of a topic: all, those of a partition, or a range of its offsets, both ends included."""

    topic: str
    partition: int | None = None
    first: int | None = None
    last: int | None = None

    def holds(self, place: Place, offset: int) -> bool:
        """Whether it is one of them."""
        return (
            place.topic == self.topic
            and self.partition in {None, place.partition}
            and (self.first is None or self.first <= offset <= (self.first if self.last is None else self.last))
        )


def source(text: str) -> Source:
    """Read `t`, `t:0`, `t:0@100` or `t:0@100-200`; raises ValueError."""
    match = SOURCE.fullmatch(text)
    topic, *numbers = match.groups() if match else ("",)
    found = Source(topic, *(None if number is None else int(number) for number in numbers))
    if not topic or (found.last is not None and found.last < (found.first or 0)):
        raise ValueError(f"{text}: write TOPIC, TOPIC:PARTITION, TOPIC:PARTITION@OFFSET or TOPIC:PARTITION@FROM-TO")
    return found


def moment(text: str) -> dt.datetime:
    """Read a time; without a zone it is this machine's own. Raises ValueError."""
    try:
        return dt.datetime.fromisoformat(text).astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text}: write a time such as 2026-01-31T00:00:00Z") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which letters; what is empty excludes none."""

    reasons: frozenset[str] = frozenset()
    errors: frozenset[str] = frozenset()
    """Classes, with or without the module that they are in."""
    start: dt.datetime | None = None
    end: dt.datetime | None = None
    sources: tuple[Source, ...] = ()
    statuses: frozenset[str] = frozenset()

    def takes(self, letter: Standing) -> bool:
        """Whether a letter is one of them."""
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (not self.errors or bool(self.errors & {letter.error, letter.error.rpartition(".")[2]}))
            and (self.start is None or letter.failed_at >= self.start)
            and (self.end is None or letter.failed_at < self.end)
            and (not self.sources or any(each.holds(letter.place, letter.offset) for each in self.sources))
            and (not self.statuses or letter.status in self.statuses)
        )


class Noted(NamedTuple):
    """What is kept of a letter: the newest that was written for its message."""

    epoch: int
    failed_at: dt.datetime
    attempt: int
    why: Why


class Standing(NamedTuple):
    """A letter, and how it stands."""

    place: Place
    offset: int
    noted: Noted
    state: State | None
    settled: bool
    """The handler has it behind it."""
    anew: bool
    """It was written after its row: its message has failed once more."""

    @property
    def failed_at(self) -> dt.datetime:
        """When the letter was written."""
        return self.noted.failed_at

    @property
    def status(self) -> Status:
        """What has become of it."""
        return "open" if self.state is None or self.anew else self.state.status

    @property
    def reason(self) -> str:
        """Why it is one: the newest reason."""
        return (self.state.reason if self.state and self.status == "failed" else None) or self.noted.why.reason

    @property
    def error(self) -> str:
        """The class of what was raised last."""
        return (self.state.error if self.state and self.status == "failed" else None) or self.noted.why.error

    @property
    def attempts(self) -> int:
        """Times that its message was tried."""
        return self.noted.attempt if self.state is None else self.state.attempts

    def __str__(self) -> str:
        """`orders:0@17`."""
        return f"{self.place.topic}:{self.place.partition}@{self.offset}"


@dataclass(slots=True)
class Survey:
    """The letters of one handler."""

    noted: dict[Place, dict[int, Noted]] = field(default_factory=dict)
    others: int = 0
    """Messages of the topic that are no letters of this handler."""
    states: dict[Place, dict[int, State]] = field(default_factory=dict)
    checkpoints: dict[tuple[str, int], tuple[str | None, int]] | None = None
    """Topic id and offset of the handler's checkpoints; None where it keeps none in Postgres."""
    claims: dict[tuple[str, int], list[Claim]] = field(default_factory=dict)
    outlived: int = 0
    """Letters whose messages the handler has read again since, as `standings` came by."""

    def note(self, letter: Letter) -> None:
        """Take a letter in."""
        there = self.noted.setdefault(letter.place, {})
        known = there.get(letter.offset())
        if known is None or known[:2] < (letter.epoch, letter.failed_at):
            there[letter.offset()] = Noted(letter.epoch, letter.failed_at, letter.attempt, letter.why)

    def standings(self, which: Filter) -> Iterator[Standing]:
        """Return the letters that a filter takes, by their sources."""
        self.outlived = 0
        for place in sorted(self.noted):
            states = self.states.get(place, {})
            for offset, noted in sorted(self.noted[place].items()):
                state = states.get(offset)
                anew = state is not None and self._is_newer(noted, state)
                standing = Standing(place, offset, noted, state, self._settled(place, offset), anew)
                if standing.settled and self._is_outlived(place, offset, noted):
                    self.outlived += 1
                elif which.takes(standing):
                    yield standing

    def _is_newer(self, noted: Noted, state: State) -> bool:
        if self.checkpoints is None:  # and so no epochs
            return state.failed_at < noted.failed_at
        return state.epoch < noted.epoch

    def _is_outlived(self, place: Place, offset: int, noted: Noted) -> bool:
        return any(
            claim.epoch > noted.epoch
            and claim.next_offset <= offset
            and (not place.topic_id or claim.topic_id in {None, place.topic_id})
            for claim in self.claims.get((place.topic, place.partition), ())
        )

    def _settled(self, place: Place, offset: int) -> bool:
        if self.checkpoints is None:
            return True
        topic_id, behind = self.checkpoints.get((place.topic, place.partition), (None, 0))
        return offset < behind or (place.topic_id != "" and topic_id not in {None, place.topic_id})


class Progress:
    """A line on a terminal that says how far it is; lines in the log elsewhere, while it takes long."""

    def __init__(self, what: str) -> None:
        self._what, self._shows = what, sys.stderr.isatty()
        self._next = time.monotonic() + LOG_INTERVAL

    def show(self, done: int, of: int) -> None:
        """Replace the line."""
        if self._shows:
            sys.stderr.write(f"\r\033[K{self._what}: {done:,} of {of:,}")
            sys.stderr.flush()
        elif time.monotonic() > self._next:
            self._next = time.monotonic() + LOG_INTERVAL
            log.info(self._what, extra={"done": done, "of": of})

    def end(self) -> None:
        """Take the line away."""
        if self._shows:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


async def survey(config: Config, handler: HandlerConfig, letters: Letters) -> tuple[Survey, LetterTopic]:
    """Read the rows, then all headers; returns the topic too, to read it again. Raises Outage, Halt.

    The checkpoints come first: of a message that is behind them then, no letter comes later than what is read.
    """
    found = Survey()
    conn = await postgres.connect(config.postgres, f"consumerd/dlq-{handler.name}")
    try:
        found.states = await letters.read(conn)
        if handler.checkpoint == "postgres":
            there = await schema_is_there(conn, config.postgres.schema_name)
            found.checkpoints = await letters.checkpoints(conn) if there else {}
            found.claims = await letters.claims(conn) if there else {}
    finally:
        await conn.close()
    topic = await asyncio.to_thread(LetterTopic, config.kafka, handler.dead_letter.topic)
    try:
        await asyncio.to_thread(_read, topic, handler.group_id, found)
    except BaseException:
        topic.close()
        raise
    return found, topic


def _read(topic: LetterTopic, group: str, found: Survey) -> None:
    progress = Progress("letters read")
    whys: dict[Why, Why] = {}
    topic.rewind()
    while messages := topic.more():
        for message in messages:
            letter = letter_of(message, group)
            if letter is None:
                found.others += 1
                continue
            letter.why = whys.setdefault(letter.why, letter.why)  # many letters, few reasons
            found.note(letter)
        progress.show(topic.read, topic.size)
    progress.end()


def chosen(
    topic: LetterTopic, group: str, wanted: dict[tuple[Place, int], Standing]
) -> Callable[[], list[tuple[Letter, Standing]]]:
    """Return what reads the next of some letters, whole, and takes them out of `wanted`. An empty list is the end."""
    topic.rewind()

    def more() -> list[tuple[Letter, Standing]]:
        while wanted and (messages := topic.more()):
            found = []
            for message in messages:
                letter = letter_of(message, group)
                standing = None if letter is None else wanted.get((letter.place, letter.offset()))
                # Of those that were written for one message it is the newest that is noted.
                if (
                    letter is not None
                    and standing is not None
                    and standing.noted[:2] == (letter.epoch, letter.failed_at)
                ):
                    del wanted[letter.place, letter.offset()]
                    found.append((letter, standing))
            if found:
                return found
        return []

    return more
