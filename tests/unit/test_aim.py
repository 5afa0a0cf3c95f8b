"""What `consumerd offsets reset` is told: ways, scopes, times, durations, files, and its mistakes."""

from pathlib import Path
from typing import Any

import pytest

from consumerd.commands.aim import Aim, aim, scope
from consumerd.types import TopicPartition

WAYS = ("to-datetime", "by-duration", "to-earliest", "to-latest", "to-current", "to-offset", "shift-by", "from-file")
NOW = 1_800_000_000.0
ANY = Aim(way="to-latest")


def told(**given: object) -> Aim:
    """Return the aim of the options given."""
    return aim(dict.fromkeys(WAYS) | {name.replace("_", "-"): value for name, value in given.items()}, NOW)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1970-01-02T00:00:00.250", 86_400_250),
        ("1970-01-02T00:00:00.250Z", 86_400_250),
        ("1970-01-02T01:00:00+01:00", 86_400_000),
    ],
)
def test_a_time_is_in_utc_unless_it_has_a_zone(text: str, milliseconds: int) -> None:
    """As kafka-consumer-groups reads it."""
    assert Aim(way="to-datetime", number=milliseconds) == told(to_datetime=text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("P1D", 86_400), ("P1DT2H3M4S", 93_784), ("PT0.5S", 0.5), ("PT36H", 129_600), ("90m", 5400), ("500ms", 0.5)],
)
def test_a_duration_is_a_time_before_now(text: str, seconds: float) -> None:
    """As kafka-consumer-groups reads it (ISO 8601), or as TOML writes it."""
    assert Aim(way="to-datetime", number=int((NOW - seconds) * 1000)) == told(by_duration=text)


def test_numbers() -> None:
    """Zero is an offset, and a shift may be negative."""
    assert Aim(way="to-offset", number=0) == told(to_offset=0)
    assert Aim(way="shift-by", number=-100) == told(shift_by=-100)
    assert Aim(way="to-current", number=0) == told(to_current=True)


def test_a_file(tmp_path: Path) -> None:
    """Lines of topic, partition and offset; a long topic in quotes and an empty line as Kafka's tool prints them."""
    path = tmp_path / "plan.csv"
    path.write_text('orders,0,12\n"shop.of.a.very.long.name.eu",3,7\n\n', encoding="utf-8")
    offsets = {TopicPartition("orders", 0): 12, TopicPartition("shop.of.a.very.long.name.eu", 3): 7}
    read = told(from_file=path)
    assert Aim(way="from-file", offsets=offsets) == read
    assert {"orders": {0}, "shop.of.a.very.long.name.eu": {3}} == scope((), all_topics=False, aim=read)


def test_scopes() -> None:
    """A topic, some of its partitions, several of them, or all topics."""
    assert {} == scope((), all_topics=True, aim=ANY)
    assert {"a": {0, 2}, "b": None} == scope(("a:0", "b", "a:2"), all_topics=False, aim=ANY)
    assert {"a": None} == scope(("a:0", "a"), all_topics=False, aim=ANY)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one of --to-datetime, --by-duration"),
        ({"to_latest": True, "to_offset": 0}, "not --to-latest and --to-offset"),
        ({"to_datetime": "yesterday"}, "--to-datetime yesterday: write a time such as"),
        ({"by_duration": "1 day"}, "--by-duration 1 day: write PnDTnHnMnS"),
        ({"by_duration": "-PT1H"}, "--by-duration -PT1H: write PnDTnHnMnS"),
        ({"from_file": Path("/absent.csv")}, "--from-file /absent.csv: No such file"),
    ],
)
def test_mistakes(given: dict[str, Any], words: str) -> None:
    """Each is one sentence with the way on."""
    with pytest.raises(ValueError, match=r"write|No such") as error:
        told(**given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no line"),
        ("orders,0\n", "line 1"),
        ("orders,0,1\norders,-1,2\n", "line 2"),
        ("a,0,earliest", "line 1"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    """The line that is wrong is named."""
    path = tmp_path / "plan.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="write topic,partition,offset") as error:
        told(from_file=path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("topics", "all_topics", "words"),
    [
        ((), False, "either --topic TOPIC"),
        (("a",), True, "either --topic TOPIC"),
        (("a:x",), False, "--topic a:x: write TOPIC"),
        ((":0",), False, "--topic :0: write TOPIC"),
    ],
)
def test_scopes_that_are_none(topics: tuple[str, ...], all_topics: bool, words: str) -> None:
    """A scope is written once, and readably."""
    with pytest.raises(ValueError, match="TOPIC") as error:
        scope(topics, all_topics=all_topics, aim=ANY)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="leave --topic and --all-topics out"):
        scope((), all_topics=True, aim=Aim(way="from-file", offsets={TopicPartition("a", 0): 1}))
