"""A range as it is typed, and as it is in the logs; what a replay tells of its progress."""

import datetime as dt
import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumerd.brokers import Found
from consumerd.checkpoint import Lease
from consumerd.commands.ranges import Asked, chosen, parse, within
from consumerd.commands.replay_text import CLEAR_LINE, Teller, duration
from consumerd.config import HandlerConfig, TableConfig
from consumerd.decide import Stored
from consumerd.errors import Halt, UsageError
from consumerd.replay import Counts, Plan, RangeAssignment, Replay
from consumerd.replay_checkpoint import Range
from consumerd.topics import Topic
from consumerd.types import TopicPartition

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
A0, A1, B0 = TopicPartition("a", 0), TopicPartition("a", 1), TopicPartition("b", 0)
THERE = [A0, A1, B0]


def asked(
    start: tuple[str, ...] = (), end: tuple[str, ...] = (), last: str | None = None, topics: tuple[str, ...] = ()
) -> Asked:
    """Read a range."""
    return parse(start, end, last, topics, now=NOW)


def test_times_offsets_and_durations_are_read() -> None:
    """A time is of all partitions, an offset of its own; --last is counted from now."""
    assert dt.datetime(2026, 1, 31, tzinfo=dt.UTC) == asked(("2026-01-31T00:00:00Z",)).start
    assert {A0: 100, B0: 7} == asked(end=("a:0@100", "b:0@7")).end
    assert NOW - dt.timedelta(hours=2) == asked(last="2h").start
    assert (None, None) == (asked().start, asked().end)


def test_the_same_range_has_the_same_text() -> None:
    """A replay is found again by what was typed; --last is told as such, for its time moves on."""
    assert "--last 2h --to a:0@5 --topic a:0 --topic b" == asked((), ("a:0@5",), "2h", ("b", "a:0")).text
    assert asked(topics=("a", "b")).text == asked(topics=("b", "a")).text


@pytest.mark.parametrize(
    ("start", "end", "last", "topics", "words"),
    [
        (("yesterday",), (), None, (), "a time with its zone"),
        (("2026-01-31T00:00:00",), (), None, (), "a time with its zone"),
        (("a:0@5", "2026-01-31T00:00:00Z"), (), None, (), "or offsets, TOPIC:PARTITION@OFFSET"),
        (("a:0@5", "a:0@6"), (), None, (), "--from names a:0 twice"),
        (("a:0@5",), (), "2h", (), "leave one out"),
        ((), (), "2 hours", (), "--last 2 hours: must be a whole number and a unit"),
        ((), (), None, ("a:x",), "write TOPIC or TOPIC:0,1"),
        ((), (), None, ("a", "a:0"), "each topic once"),
        (("2026-01-31T00:00:00Z",), ("2026-01-30T00:00:00Z",), None, (), "ends before it begins"),
    ],
)
def test_what_is_no_range_is_told(
    start: tuple[str, ...], end: tuple[str, ...], last: str | None, topics: tuple[str, ...], words: str
) -> None:
    """Each mistake is a sentence with what to write instead."""
    with pytest.raises(UsageError, match=words):
        asked(start, end, last, topics)


def test_an_offset_takes_its_partition_and_a_topic_all_or_some_of_its_own() -> None:
    """A partition that is named by an offset is taken, and then no other; --topic narrows."""
    assert THERE == chosen(asked(last="2h"), THERE)
    assert [A1] == chosen(asked(("a:1@5",)), THERE)
    assert [A0, B0] == chosen(asked(("a:0@5",), ("b:0@9",)), THERE)
    assert [A1, B0] == chosen(asked(topics=("a:1", "b")), THERE)


@pytest.mark.parametrize(
    ("start", "topics", "words"),
    [
        (("a:2@5",), (), "a:2 is not among what this handler reads: a, b"),
        ((), ("c",), "c is not among what this handler reads"),
        ((), ("a:7",), "a:7 is not among"),
        (("a:0@5",), ("b",), "a:0 is named by its offset, and --topic leaves it out"),
    ],
)
def test_a_partition_that_is_not_there_is_told(start: tuple[str, ...], topics: tuple[str, ...], words: str) -> None:
    """What the handler does not read cannot be replayed, and nothing that is named is left out without a word."""
    with pytest.raises(UsageError, match=words):
        chosen(asked(start, topics=topics), THERE)


def found(low: int, high: int) -> dict[TopicPartition, Found]:
    """Return the bounds of a log."""
    return {A0: Found(bounds=(low, high), committed=None, metadata=None)}


@pytest.mark.parametrize(
    ("wanted", "low", "by_time", "left", "gap"),
    [
        (Range(10, 20), 0, False, Range(10, 20), None),
        (Range(10, 20), 15, False, Range(15, 20), "a:0: offsets 10..14 are gone from the log"),
        (Range(10, 20), 30, False, None, "a:0: offsets 10..19 are gone from the log"),
        (Range(15, 20), 15, True, Range(15, 20), "a:0: offsets 0..14 are gone from the log, and may be of that time"),
        (Range(16, 20), 15, True, Range(16, 20), None),
        (Range(0, 20), 0, True, Range(0, 20), None),
        (Range(20, 20), 0, False, None, None),
    ],
)
def test_what_is_gone_is_named(wanted: Range, low: int, by_time: bool, left: Range | None, gap: str | None) -> None:
    """P7: of a range what the log does not hold any more is named exactly; of a time it may have been more."""
    resolved = within({A0: wanted}, found(low, 100), by_time=by_time)
    assert ({} if left is None else {A0: left}) == resolved.ranges
    assert ([] if gap is None else [gap]) == resolved.gaps


@pytest.mark.parametrize(
    ("wanted", "words"),
    [(Range(0, 101), "a:0 ends at 100: there is no offset 100 in it yet"), (Range(30, 20), "ends at 20, before it")],
)
def test_what_never_was_is_told(wanted: Range, words: str) -> None:
    """A range beyond its log, or one that ends before it begins, is a mistake."""
    with pytest.raises(UsageError, match=words):
        within({A0: wanted}, found(0, 100), by_time=False)


class Terminal(io.StringIO):
    """Standard error on a terminal."""

    def isatty(self) -> bool:
        """Be one."""
        return True


def test_a_terminal_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that stays, in front of which a line of the log clears it."""
    terminal, clock = Terminal(), iter([0.0, 0.0, 10.0])
    logs = logging.StreamHandler(terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logs])
    monkeypatch.setattr("consumerd.commands.replay_text.time.monotonic", lambda: next(clock))
    tell = Teller()
    replay: Any = SimpleNamespace(passed=0, plan=SimpleNamespace(offsets=2_000), counts=Counts())
    tell(cast("Replay", replay))
    replay.passed = 500
    tell(cast("Replay", replay))
    assert terminal.getvalue().endswith(f"{CLEAR_LINE}500 of 2,000 offsets (25.0%), 50/s, 30 s left")
    logging.getLogger().warning("waiting")
    assert terminal.getvalue().endswith(f"{CLEAR_LINE}waiting\n")


def test_durations_are_told_in_words() -> None:
    """Seconds, minutes, hours."""
    assert ["59 s", "2 min 5 s", "3 h 20 min"] == [duration(seconds) for seconds in (59, 125, 12_000)]


class Claimed:
    """Checkpoints of which a claim finds these."""

    mode = "postgres"

    def __init__(self, stored: dict[TopicPartition, Stored]) -> None:
        self._stored = stored

    async def claim(self, *_: object) -> dict[TopicPartition, Stored]:
        """Find them."""
        return self._stored


class Thread:
    """Knows where the logs begin and end."""

    async def found(self, partitions: list[TopicPartition]) -> dict[TopicPartition, Found]:
        """Find committed offsets too, of the handler."""
        return {partition: Found(bounds=(0, 9), committed=7, metadata=None) for partition in partitions}


async def claim(stored: dict[TopicPartition, Stored]) -> dict[TopicPartition, Lease]:
    """Claim a partition whose topic is `new`."""
    assignment = RangeAssignment(
        cast("Any", SimpleNamespace(bootstrap_servers="broker:9092")),
        cast("Any", SimpleNamespace(name="orders", group_id="orders")),
        topics={"a": Topic(name="a", partitions=2, topic_id="new")},
        store="",
        checkpoints=cast("Any", Claimed(stored)),
        thread=cast("Any", Thread()),
        on_commit=lambda: None,
    )
    assignment.assign([A0])
    return await assignment.claim([A0], cast("Any", None))


async def test_a_replay_goes_on_at_its_own_checkpoint() -> None:
    """Whatever the handler has committed."""
    leases = await claim({A0: Stored(epoch=3, next_offset=4, max_offset=4, topic_id="new", target="t")})
    assert (3, 4) == (leases[A0].epoch, leases[A0].next_offset)


async def test_a_replay_of_another_topic_halts() -> None:
    """P7: one that was made again between the look and the claim, too."""
    with pytest.raises(Halt, match="was deleted, and perhaps made again"):
        await claim({A0: Stored(epoch=3, next_offset=4, max_offset=4, topic_id="old", target="t")})


async def test_a_replay_without_its_checkpoint_halts() -> None:
    """A replay that was forgotten claims nothing, and does not wait for ever."""
    with pytest.raises(Halt, match="the checkpoint of this replay for a:0 is gone"):
        await claim({})


async def test_a_replay_that_finds_itself_at_its_end_is_over() -> None:
    """Another run has written the last of it since it was planned, or its own write had landed unanswered."""
    handler: Any = HandlerConfig.model_validate(
        {"name": "h", "path": Path("h.toml"), "topics": ("a",), "table": TableConfig(name="t", write="skip-existing")}
    )
    config: Any = SimpleNamespace(path=Path("consumerd.toml"), kafka=None, handlers=(handler,))
    replay = Replay(config, Plan(handler=handler, ranges={A0: Range(2, 4), A1: Range(0, 9)}, group="g"), 1 << 24)
    replay.assignment = cast("Any", SimpleNamespace(leases={}))
    replay.started(A0, 4)
    assert not replay.ended.is_set()
    replay.started(A1, 9)
    assert replay.ended.is_set()
