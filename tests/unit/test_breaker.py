"""The breaker halts a handler whose share of poison is over the limit, and no other."""

import pytest

from consumerd.accumulator import Batch
from consumerd.breaker import Breaker
from consumerd.config import PoisonConfig
from consumerd.errors import Halt, Refusal
from consumerd.types import Message, Tally, TopicPartition
from tests.unit.test_accumulator import Fake

CONFIG = PoisonConfig(max_ratio=0.1, window=60.0, min_messages=100)


def refusals(count: int, text: str = "wrong type") -> dict[int, Refusal]:
    """Refuse the first messages of a batch."""
    refusal = Refusal(reason="type", stage="decode", error="Error", message=text)
    return dict.fromkeys(range(count), refusal)


def batch(messages: int, refused: int, text: str = "wrong type") -> Batch:
    """Make a batch; the breaker looks at no message."""
    fakes: list[Message] = [Fake(at) for at in range(messages)]
    return Batch(
        partition=TopicPartition("orders", 0),
        first_offset=0,
        next_offset=messages,
        messages=fakes,
        size=messages,
        reason="age",
        gathered_since=0.0,
        refused=refusals(refused, text),
    )


def test_at_the_limit() -> None:
    """A share of poison exactly at the limit goes on."""
    Breaker(CONFIG).judge(batch(100, 10), 0.0)


def test_over_the_limit() -> None:
    """A share of poison over the limit halts and says how many, of how many, what most of them are, and the way on."""
    with pytest.raises(Halt) as caught:
        Breaker(CONFIG).judge(batch(100, 11), 0.0)
    assert caught.value.reason == "breaker"
    for words in ("11 of the last 100 messages", "10.0%", "mostly: wrong type", "`max_ratio` under [poison]"):
        assert words in str(caught.value)


def test_what_is_skipped_does_not_count() -> None:
    """The share is of the messages that the handler takes."""
    it = batch(1000, 11)
    it.skipped["where"] = 900
    with pytest.raises(Halt, match="11 of the last 100 messages"):
        Breaker(CONFIG).judge(it, 0.0)


def test_batches_of_which_nothing_is_taken() -> None:
    """What is skipped as a whole is not kept, however long nothing else comes: it would be a leak."""
    breaker = Breaker(CONFIG)
    breaker.judge(batch(1, 0), 0.0)
    for second in range(1, 1000):
        it = batch(3, 0)
        it.skipped["where"] = 3
        breaker.judge(it, 100.0 * second)
    assert len(breaker._seen) == 1


def test_too_few_messages() -> None:
    """Below min_messages nothing is judged, were all of it poison."""
    Breaker(CONFIG).judge(batch(99, 99), 0.0)


def test_adds_up() -> None:
    """Small batches are judged together (rule 23: the first min_messages are)."""
    breaker = Breaker(CONFIG)
    for _ in range(9):
        breaker.judge(batch(10, 1), 0.0)
    with pytest.raises(Halt, match="11 of the last 100"):
        breaker.judge(batch(10, 2), 0.0)


def test_good_messages_count() -> None:
    """Batches without poison are part of the share."""
    breaker = Breaker(CONFIG)
    breaker.judge(batch(900, 0), 0.0)
    breaker.judge(batch(100, 100), 0.0)
    with pytest.raises(Halt, match="101 of the last 1001"):
        breaker.judge(batch(1, 1), 0.0)


def test_window_passes() -> None:
    """What is older than the window is forgotten, poison and messages alike."""
    breaker = Breaker(CONFIG)
    breaker.judge(batch(1000, 100), 0.0)
    breaker.judge(batch(100, 10), 61.0)
    with pytest.raises(Halt, match="21 of the last 200"):
        breaker.judge(batch(100, 11), 61.5)


def test_window_keeps_its_edge() -> None:
    """What is as old as the window still counts."""
    breaker = Breaker(CONFIG)
    breaker.judge(batch(1000, 0), 0.0)
    breaker.judge(batch(100, 100), 60.0)


def test_window_stretches() -> None:
    """A window with fewer than min_messages stretches back until it holds them (rule 23)."""
    breaker = Breaker(CONFIG)
    breaker.judge(batch(90, 9), 0.0)
    with pytest.raises(Halt, match="11 of the last 100"):
        breaker.judge(batch(10, 2), 3600.0)


def test_judged_once() -> None:
    """A batch that is tried again is counted once; of what isolation adds only the new."""
    breaker = Breaker(CONFIG)
    it = batch(100, 5)
    for _ in range(5):
        breaker.judge(it, 0.0)
    it.refused = refusals(10)
    breaker.judge(it, 0.0)
    it.refused = refusals(11)
    with pytest.raises(Halt, match="11 of the last 100"):
        breaker.judge(it, 0.0)


def test_names_the_most_frequent() -> None:
    """The halt names what most of the batch's poison is."""
    it = batch(100, 20, "wrong type")
    it.refused = (
        refusals(5, "missing") | {5 + at: each for at, each in refusals(10).items()} | {15: refusals(1, "last")[0]}
    )
    with pytest.raises(Halt, match="mostly: wrong type"):
        Breaker(CONFIG).judge(it, 0.0)


def test_a_batch_that_is_split() -> None:
    """What was cut off a batch is judged with its own batch, not with the one that it was cut off."""
    breaker = Breaker(CONFIG)
    whole = batch(1000, 0)
    breaker.judge(whole, 0.0)
    assert breaker.lacks(whole) == 100
    rest = whole.cut(100)
    breaker.take_back(whole)
    breaker.judge(whole, 0.0)
    whole.refused = refusals(11)
    with pytest.raises(Halt, match="11 of the last 100"):
        breaker.judge(whole, 0.0)
    breaker.judge(rest, 0.0)  # among 1,000 they are few


def test_a_batch_that_outlives_the_window() -> None:
    """A batch that is tried for longer than the window, and cut then, is counted as what it is, and no more."""
    breaker = Breaker(CONFIG)
    stuck = batch(200, 2)
    breaker.judge(stuck, 0.0)
    for second in range(1, 200):
        breaker.judge(batch(100, 0), float(second))
    stuck.cut(1)
    breaker.take_back(stuck)
    breaker.judge(stuck, 200.0)
    for second in range(201, 400):
        breaker.judge(batch(100, 9), float(second))
    with pytest.raises(Halt, match="640 of the last 6100"):
        breaker.judge(batch(100, 100), 400.0)


# What is kept beside the checkpoints.

P, Q = TopicPartition("orders", 0), TopicPartition("orders", 1)


def of(partition: TopicPartition, messages: int, refused: int) -> Batch:
    """Make a batch of a partition."""
    it = batch(messages, refused)
    it.partition = partition
    return it


def test_a_restart_does_not_forget() -> None:
    """What was counted of a partition is counted on by whoever has it next."""
    before = Breaker(CONFIG)
    before.judge(batch(90, 9), 100.0)
    assert before.tally(P) == (90, 9, 0.0)
    after = Breaker(CONFIG)
    after.recall(P, before.tally(P), 0.0)
    with pytest.raises(Halt, match="11 of the last 100"):
        after.judge(batch(10, 2), 0.0)


def test_tallies_are_the_partitions_own() -> None:
    """Each partition's count is of its own batches, as they are now, and of those within the window."""
    breaker = Breaker(CONFIG)
    breaker.judge(of(P, 100, 1), 0.0)
    tried = of(Q, 50, 0)
    breaker.judge(tried, 0.0)
    tried.refused = refusals(3)
    breaker.judge(tried, 0.0)
    assert (breaker.tally(P)[:2], breaker.tally(Q)[:2]) == ((100, 1), (50, 3))
    breaker.judge(of(Q, 200, 0), 61.0)
    assert (breaker.tally(P)[:2], breaker.tally(Q)[:2]) == ((0, 0), (200, 0))


def test_a_partition_that_goes_takes_its_count_along() -> None:
    """What another member counts now is not counted here, and what comes back is counted once."""
    breaker = Breaker(CONFIG)
    breaker.judge(of(P, 90, 9), 0.0)
    breaker.judge(of(Q, 90, 0), 0.0)
    gone = breaker.tally(P)
    breaker.forget([P])
    assert (breaker.tally(P)[:2], breaker.lacks(batch(0, 0))) == ((0, 0), 10)
    for _ in range(2):
        breaker.recall(P, gone, 1.0)
    assert (breaker.tally(P)[:2], breaker.lacks(batch(0, 0))) == ((90, 9), 0)
    with pytest.raises(Halt, match="20 of the last 191"):
        breaker.judge(of(Q, 11, 11), 1.0)


def test_what_is_recalled_ages() -> None:
    """What was counted long ago is within the window only as long as there is not enough after it."""
    breaker = Breaker(CONFIG)
    breaker.judge(of(Q, 60, 0), 100.0)
    breaker.recall(P, Tally(1000, 100, 3600.0), 100.0)
    breaker.judge(of(Q, 30, 0), 101.0)
    assert breaker.tally(P)[:2] == (1000, 100)
    breaker.judge(of(Q, 10, 0), 102.0)
    assert (breaker.tally(P)[:2], breaker.tally(Q)[:2]) == ((0, 0), (100, 0))


def test_good_messages_go_on_after_a_restart() -> None:
    """A handler that was mended starts: a batch without poison halts nothing, and the next that has some does."""
    breaker = Breaker(CONFIG)
    breaker.recall(P, Tally(999, 999, 30.0), 100.0)
    breaker.judge(batch(1, 0), 100.0)
    with pytest.raises(Halt, match="1000 of the last 1001"):
        breaker.judge(batch(1, 1), 100.0)
