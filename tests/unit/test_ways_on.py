"""What an operator accepts of a halt is what the halt showed, and nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest

from consumerd.errors import ConsumerdError, Halt
from consumerd.types import TopicPartition
from consumerd.ways_on import Accepted, Forget, Gap, OtherTopic, Skip, Wanted, accept, merged, told, wanted

A, B = TopicPartition("orders", 0), TopicPartition("orders", 1)
GAP = Gap(partition=A, position=10, target=25)
OTHER = OtherTopic(topic="orders", old="old", new="new")
SKIP = Skip(partition=A, first=7, end=8)
SKIPS = Skip(partition=B, first=100, end=200)
FORGET = Forget(partitions=frozenset([A, B]))
HALT = Halt("gap", "why", GAP, OTHER, SKIP, SKIPS, FORGET)


def accepted(**want: Any) -> Accepted:  # noqa: ANN401 - what an operator types
    """Accept what is typed of a halt that has every way."""
    return accept("h", HALT, wanted(**want))


def test_each_way_is_accepted_as_it_was_shown() -> None:
    """A gap, a topic, a message and the breaker's count are accepted with all that the halt knows of them."""
    assert accepted(gaps=["orders:0"]).gaps == {A: GAP}
    assert accepted(topics=["orders"]).topics == {"orders": OTHER}
    assert accepted(skips=["orders:0@7", "orders:1@150"]).skips == {A: {7}, B: {150}}
    assert accepted(breaker=True).forget == {A, B}


@pytest.mark.parametrize(
    "want",
    [
        {"gaps": ["orders:1"]},
        {"topics": ["others"]},
        {"skips": ["orders:0@8"]},
        {"skips": ["orders:0@6"]},
        {"skips": ["orders:1@200"]},
        {"skips": ["others:0@7"]},
    ],
)
def test_what_a_halt_does_not_show_is_refused(want: dict[str, Any]) -> None:
    """Another partition, topic or message is refused with the option and the halt's own sentence."""
    ((option, (text,)),) = want.items()
    with pytest.raises(ConsumerdError, match=f"{text} is no way on from the halt of h, and nothing was changed: why"):
        accepted(**{option: [text]})


def test_the_breaker_is_forgotten_after_its_own_halt_alone() -> None:
    """--breaker after another halt is refused."""
    with pytest.raises(ConsumerdError, match="--breaker is no way on from the halt of h"):
        accept("h", Halt("gap", "why", GAP), Wanted(breaker=True))


@pytest.mark.parametrize(
    ("position", "low", "high", "goes_on"),
    [(10, 25, 40, True), (10, 25, 25, True), (10, 26, 40, False), (11, 25, 40, False), (9, 25, 40, False)],
)
def test_a_gap_that_is_another_by_now_is_not_accepted(position: int, low: int, high: int, *, goes_on: bool) -> None:
    """It has grown, or the checkpoint is elsewhere: that is not what was shown."""
    assert (accepted(gaps=["orders:0"]).gap(A, position, low, high) == GAP) == goes_on
    assert accepted(gaps=["orders:0"]).gap(B, position, low, high) is None


@pytest.mark.parametrize(("old", "new", "is_it"), [("old", "new", True), ("old", "third", False), (None, "new", False)])
def test_a_third_topic_is_not_the_accepted_one(old: str | None, new: str, *, is_it: bool) -> None:
    """Both ids are those that were shown, or it is asked again."""
    assert accepted(topics=["orders"]).is_new_topic("orders", old, new) == is_it
    assert not accepted(topics=["orders"]).is_new_topic("others", old, new)


def test_a_topic_of_which_nothing_is_remembered_is_known_by_the_new_one() -> None:
    """Where no offset tells of the old topic the new one's id is compared."""
    it = accepted(topics=["orders"])
    assert it.is_new_topic("orders", None, "new", forgotten=True)
    assert not it.is_new_topic("orders", None, "third", forgotten=True)


def test_a_message_is_passed_over_until_the_checkpoint_has_passed_it() -> None:
    """It is among what is dropped whenever it comes, and is counted once, when the checkpoint moves across it."""
    it = accepted(skips=["orders:1@150", "orders:1@160"])
    messages: list[Any] = [SimpleNamespace(offset=lambda at=at: at) for at in (149, 150, 151)]
    for _ in range(2):
        assert it.skipped(B, messages) == {150}
    assert it.skipped(A, messages) == set()
    assert it.passed(B, 100, 150) == []
    assert it.passed(B, 150, 160) == [150]
    assert it.passed(B, 150, 160) == []
    assert it.left() == {B: {160}}


def test_what_is_left_of_a_topic_does_not_hold_for_another() -> None:
    """An offset of the old topic means another message of the new one."""
    assert accepted(skips=["orders:1@150"], topics=["orders"]).left() == {}


def test_a_halt_ends_with_what_to_type() -> None:
    """Each way is a whole command that finds the daemon's file; a restart and a reload come last."""
    said = str(told(Halt("gap", "why;", GAP, Gap(partition=B, position=1, target=2), SKIP, SKIPS), "h", " -c f"))
    assert said == (
        "why; to go on after it: consumerd resume h -c f --accept-gap orders:0 --accept-gap orders:1; "
        "to pass over this one message: consumerd resume h -c f --skip orders:0@7; "
        "to pass over one message of these: consumerd resume h -c f --skip orders:1@OFFSET; "
        "once its cause is mended: consumerd restart h -c f; once its file is: consumerd reload -c f"
    )


def test_halts_of_many_partitions_are_one() -> None:
    """All ways are named, and the first few sentences."""
    halts = [Halt("gap", f"gap {n}.", Gap(partition=TopicPartition("o", n), position=1, target=2)) for n in range(7)]
    both = merged(halts)
    assert str(both) == "gap 0; gap 1; gap 2; gap 3; gap 4; and 2 more, in the log"
    assert both.ways == tuple(way for halt in halts for way in halt.ways)
    assert merged(halts[:1]) is halts[0]


@pytest.mark.parametrize(
    ("want", "said"),
    [
        ({"gaps": ["orders"]}, "--accept-gap orders: write TOPIC:PARTITION"),
        ({"gaps": ["orders:x"]}, "--accept-gap orders:x: write TOPIC:PARTITION"),
        ({"skips": ["orders:0"]}, "--skip orders:0: write TOPIC:PARTITION@OFFSET"),
        ({"skips": ["orders:0@-1"]}, "--skip orders:0@-1: write TOPIC:PARTITION@OFFSET"),
        ({"skips": ["orders@1"]}, "--skip orders: write TOPIC:PARTITION"),
    ],
)
def test_what_is_typed_wrong_is_told(want: dict[str, Any], said: str) -> None:
    """A mistake in an option is one sentence with the form that it has."""
    with pytest.raises(ConsumerdError, match=said):
        wanted(**want)
