"""What is gathered is written whole, in order, one batch of a partition at a time, within the bounds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumerd.accumulator import (
    HEADER_OVERHEAD,
    MESSAGE_OVERHEAD,
    SAMPLE,
    Accumulator,
    Batch,
    Bounds,
    size_of,
)
from consumerd.errors import Refusal
from consumerd.packed import PACKED_OVERHEAD, Packed
from consumerd.types import Message, TopicPartition

A, B, C = (TopicPartition("orders", number) for number in range(3))
WIDE = Bounds(max_messages=1000, max_bytes=1_000_000, max_age=1.0)


@dataclass(frozen=True, slots=True)
class Fake:
    """A message of a given size."""

    at: int
    size: int = 1
    key_size: int = 0
    header: bytes | None = None

    def __len__(self) -> int:
        return self.size

    def topic(self) -> str:
        """Give some topic."""
        return "orders"

    def partition(self) -> int:
        """Give some partition."""
        return 0

    def key(self) -> bytes | None:
        """Give as many bytes as the key's size says, or none."""
        return bytes(self.key_size) or None

    def value(self) -> bytes | None:
        """Give as many bytes as the size says."""
        return bytes(self.size)

    def offset(self) -> int:
        """Give the offset."""
        return self.at

    def leader_epoch(self) -> int | None:
        """Give an epoch that the offset tells."""
        return self.at + 100

    def timestamp(self) -> tuple[int, int]:
        """Give some time."""
        return 1, 1000

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        """Give one with a value and one without, or none."""
        return None if self.header is None else [("with", self.header), ("none", None)]


def fakes(first: int, count: int, size: int = 1) -> list[Message]:
    """Make messages with consecutive offsets."""
    return [Fake(at, size) for at in range(first, first + count)]


def gathered(bounds: Bounds, *partitions: TopicPartition) -> Accumulator:
    """Make an accumulator with open partitions."""
    it = Accumulator(bounds)
    for partition in partitions:
        it.open(partition)
    return it


def add(it: Accumulator, partition: TopicPartition, messages: list[Message], now: float = 0.0) -> bool:
    """Add messages with the size that they have."""
    return it.add(partition, messages, size_of(messages), now)


def offsets(batches: Sequence[Batch]) -> list[tuple[int, list[int]]]:
    """Tell partitions and offsets of batches."""
    return [(b.partition.partition, [m.offset() for m in b.messages]) for b in batches]


def test_nothing_due() -> None:
    """Below every bound nothing is taken."""
    it = gathered(WIDE, A)
    assert add(it, A, fakes(0, 5)) is False
    assert it.take(0.999) == []
    assert it.next_due() == 1.0


def test_bound_by_messages() -> None:
    """A batch is due at half of max_messages and never holds more than that; the rest waits for its turn."""
    it = gathered(Bounds(max_messages=3, max_bytes=1000, max_age=9.0), A)
    assert add(it, A, fakes(0, 1)) is False
    assert it.take(0.0) == []
    assert add(it, A, fakes(1, 6)) is True
    (first,) = it.take(0.0)
    assert ([0, 1, 2], 3, "messages") == ([m.offset() for m in first.messages], first.size, first.reason)
    it.done(first)
    (second,) = it.take(0.0)
    assert offsets([second]) == [(0, [3, 4, 5])]
    it.done(second)
    assert it.take(8.9) == []
    (third,) = it.take(9.0)
    assert (offsets([third]), third.reason) == ([(0, [6])], "age")


def test_the_wait_for_a_connection() -> None:
    """A batch has waited from when it was due, or the one before it was done, until it was taken; else not at all."""
    it = gathered(Bounds(max_messages=4, max_bytes=1000, max_age=10.0), A, B)
    add(it, A, fakes(0, 1), now=1.0)
    (by_age,) = it.take(14.0)
    assert (by_age.reason, by_age.waited) == ("age", 3.0)
    add(it, A, fakes(1, 2), now=15.0)
    add(it, A, fakes(3, 1), now=19.0)
    add(it, B, fakes(0, 1), now=15.5)
    add(it, B, fakes(1, 1), now=16.0)
    (others,) = it.take(18.0)
    assert (others.partition, others.reason, others.waited) == (B, "messages", 2.0)
    it.done(by_age)
    (after_another,) = it.take(20.0)
    assert (after_another.partition, after_another.waited) == (A, 0.0)  # until now its own predecessor was out


def test_nothing_waits_that_is_taken_along() -> None:
    """What goes along with a batch that is due was not due itself, and nor was what memory is short for."""
    it = gathered(WIDE, A, B)
    add(it, A, fakes(0, 1), now=0.0)
    add(it, B, fakes(0, 1), now=0.5)
    assert [batch.waited for batch in it.take(1.25)] == [0.25, 0.0]
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 1), now=0.0)
    assert [batch.waited for batch in it.take(0.5, pressure=True)] == [0.0]


def test_bound_by_bytes() -> None:
    """A batch is due at half of max_bytes and is cut before the message that would pass them."""
    it = gathered(Bounds(max_messages=100, max_bytes=10, max_age=9.0), A)
    assert add(it, A, fakes(0, 1, size=3)) is False
    assert it.take(0.0) == []
    assert add(it, A, fakes(1, 4, size=3)) is True
    (first,) = it.take(0.0)
    assert (offsets([first]), first.size, first.reason) == ([(0, [0, 1, 2])], 9, "bytes")


def test_bytes_exactly() -> None:
    """A batch of exactly max_bytes is one batch, and messages without bytes still fit behind it."""
    it = gathered(Bounds(max_messages=100, max_bytes=10, max_age=9.0), A)
    assert add(it, A, fakes(0, 2, size=5) + fakes(2, 2, size=0)) is True
    assert offsets(it.take(0.0)) == [(0, [0, 1, 2, 3])]
    it.open(A)
    add(it, A, fakes(0, 3, size=5))
    assert offsets(it.take(0.0)) == [(0, [0, 1])]


@pytest.mark.parametrize("before", [0, 1])
def test_message_larger_than_the_bound(before: int) -> None:
    """A message larger than max_bytes goes alone, after those before it."""
    it = gathered(Bounds(max_messages=100, max_bytes=10, max_age=9.0), A)
    add(it, A, [*fakes(0, before), Fake(before, 50), *fakes(before + 1, 1)])
    taken = []
    while batches := it.take(9.0):
        taken += offsets(batches)
        it.done(batches[0])
    assert taken == [(0, [at]) for at in range(before + 2)]
    assert it.memory == 0


def test_bound_by_age() -> None:
    """Age counts from the arrival of the oldest message, whatever came later."""
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 1), now=5.0)
    add(it, A, fakes(1, 1), now=5.9)
    assert it.next_due() == 6.0
    assert it.take(5.99) == []
    (batch,) = it.take(6.0)
    assert (offsets([batch]), batch.reason, batch.gathered_since) == ([(0, [0, 1])], "age", 5.0)


def test_one_that_is_due_brings_the_others_along() -> None:
    """What is not due yet goes with what is, behind it and as far as it fits; alone it is not taken."""
    it = gathered(Bounds(max_messages=5, max_bytes=1000, max_age=1.0), A, B, C)
    add(it, B, fakes(0, 2), now=0.0)
    add(it, C, fakes(0, 2), now=0.4)
    add(it, A, fakes(0, 2), now=0.5)
    batches = it.take(1.0)
    assert offsets(batches) == [(1, [0, 1]), (2, [0, 1])]
    assert [batch.reason for batch in batches] == ["age", "age"]
    assert it.take(1.0) == []
    assert it.next_due() == 1.5


def test_partition_that_is_out() -> None:
    """A partition whose batch is out gathers, but is not taken again, told as due or waited for before done()."""
    it = gathered(Bounds(max_messages=2, max_bytes=1000, max_age=1.0), A)
    add(it, A, fakes(0, 2))
    (batch,) = it.take(0.0)
    assert add(it, A, fakes(2, 4)) is False
    assert it.take(99.0, pressure=True) == []
    assert it.next_due() is None
    it.done(batch)
    assert it.next_due() == 1.0
    assert offsets(it.take(0.0)) == [(0, [2, 3])]


def test_oldest_first() -> None:
    """Of several due partitions the one whose messages wait longest goes first."""
    it = gathered(Bounds(max_messages=2, max_bytes=1000, max_age=1.0), A, B, C)
    for partition, now in ((B, 0.3), (A, 0.2), (C, 0.1)):
        add(it, partition, fakes(0, 2), now)
    taken = [it.take(0.5), it.take(0.5), it.take(0.5)]
    assert [offsets(batches) for batches in taken] == [[(2, [0, 1])], [(0, [0, 1])], [(1, [0, 1])]]


def test_several_partitions_in_one_write() -> None:
    """Due partitions share a write as long as their batches together keep within both bounds."""
    for bounds in (
        Bounds(max_messages=5, max_bytes=1000, max_age=1.0),
        Bounds(max_messages=100, max_bytes=5, max_age=1.0),
    ):
        it = gathered(bounds, A, B, C)
        for partition in (A, B, C):
            add(it, partition, fakes(0, 2))
        assert offsets(it.take(1.0)) == [(0, [0, 1]), (1, [0, 1])]
        assert offsets(it.take(1.0)) == [(2, [0, 1])]


def test_a_write_of_one_topic() -> None:
    """Where each topic has a table of its own a write is of one topic: rows, and what only moves checkpoints."""
    other = TopicPartition("clicks", 0)
    it = Accumulator(WIDE, by_topic=True)
    for partition, now in ((B, 0.1), (other, 0.2), (A, 0.3)):
        it.open(partition)
        add(it, partition, fakes(0, 2), now)
    taken = [it.take(1.2), it.take(1.2), it.take(1.2)]
    assert [[batch.partition for batch in batches] for batches in taken] == [[B, A], [other], []]
    for partition in (B, other, A):
        it.open(partition)
        it.tail(partition, 0, 5)
    taken = [it.take(1.2), it.take(1.2), it.take(1.2)]
    assert [[batch.partition for batch in batches] for batches in taken] == [[B, A], [other], []]


def test_hurry() -> None:
    """What is hurried is due at once, for the reason given, until it is closed; others are not."""
    it = gathered(WIDE, A, B)
    add(it, A, fakes(0, 1))
    add(it, B, fakes(0, 1))
    it.hurry([A, C], "revoke")
    (batch,) = it.take(0.0)
    assert (offsets([batch]), batch.reason) == ([(0, [0])], "revoke")
    it.done(batch)
    add(it, A, fakes(1, 1))
    assert offsets(it.take(0.0)) == [(0, [1])]
    it.open(A)
    add(it, A, fakes(0, 1))
    assert it.take(0.0) == []


def test_pressure() -> None:
    """Under memory pressure whatever there is is due."""
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 1))
    (batch,) = it.take(0.0, pressure=True)
    assert batch.reason == "pressure"


def test_batch_tells_where_it_ends() -> None:
    """A batch's checkpoint is one past its last offset, with the last message's leader epoch."""
    it = gathered(WIDE, A)
    add(it, A, [Fake(7), Fake(9)])
    (batch,) = it.take(1.0)
    assert (batch.first_offset, batch.next_offset, batch.leader_epoch) == (7, 10, 109)


def test_memory() -> None:
    """Memory counts values and overhead, batches that are out included, and is 0 when all is done."""
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 4, size=10))
    assert it.memory == 40 + 4 * MESSAGE_OVERHEAD
    (batch,) = it.take(1.0)
    assert it.memory == 40 + 4 * MESSAGE_OVERHEAD
    it.done(batch)
    assert it.memory == 0
    it.done(batch)
    assert it.memory == 0


def test_close() -> None:
    """Closing drops what is gathered and what is out; a late done() of it changes nothing."""
    it = gathered(Bounds(max_messages=2, max_bytes=1000, max_age=1.0), A, B)
    add(it, A, fakes(0, 5))
    (batch,) = it.take(0.0)
    assert it.holds([A])
    it.close([A, C])
    assert (it.memory, it.holds([A]), it.oldest(A), it.next_due()) == (0, False, None, None)
    it.open(A)
    add(it, A, fakes(0, 3))
    (again,) = it.take(0.0)
    it.done(batch)
    assert it.memory == 3 * (1 + MESSAGE_OVERHEAD)
    assert it.take(9.0) == []
    it.done(again)
    assert it.memory == 1 + MESSAGE_OVERHEAD


def test_oldest() -> None:
    """The oldest unwritten message is the first of the batch that is out, else the first gathered."""
    it = gathered(Bounds(max_messages=1, max_bytes=1000, max_age=1.0), A)
    assert it.oldest(A) is None
    add(it, A, fakes(3, 2))
    assert it.oldest(A) == Fake(3)
    (batch,) = it.take(0.0)
    assert it.oldest(A) == Fake(3)
    it.done(batch)
    assert it.oldest(A) == Fake(4)
    it.done(it.take(0.0)[0])
    assert it.oldest(A) is None
    assert not it.holds([A])


def test_keys_and_headers_count() -> None:
    """P8: a message is as large as value, key and headers, and null values of headers are nothing."""
    assert size_of([Fake(0, 10)]) == 10
    assert size_of([Fake(0, 10, key_size=5)]) == 15
    assert size_of([Fake(0, 10, key_size=5, header=bytes(7))]) == 15 + 8 + 7 + 2 * HEADER_OVERHEAD
    assert size_of([]) == 0


def test_keys_and_headers_count_by_a_sample() -> None:
    """P8: of a chunk's messages every so many is asked for its key and headers, and stands for those between."""
    alike: list[Message] = [Fake(at, 10, key_size=1000) for at in range(3 * SAMPLE + 1)]
    assert size_of(alike) == len(alike) * 1010
    mixed: list[Message] = [Fake(at, 10, key_size=1000 if at < SAMPLE else 0) for at in range(4 * SAMPLE)]
    assert size_of(mixed) == len(mixed) * (10 + 250)


def test_a_cut_counts_keys() -> None:
    """P8: a batch is cut within max_bytes with its keys; what was added is what is taken, to the byte."""
    it = gathered(Bounds(max_messages=1000, max_bytes=1000, max_age=9.0), A)
    add(it, A, [Fake(at, 10, key_size=90) for at in range(25)])
    sizes = []
    while batches := it.take(9.0):
        sizes.append((len(batches[0].messages), batches[0].size))
        it.done(batches[0])
    assert sizes == [(10, 1000), (10, 1000), (5, 500)]
    assert it.memory == 0


def test_split() -> None:
    """The rest of a batch that was split is the partition's next batch, due at once, with what is known of it."""
    it = gathered(Bounds(max_messages=10, max_bytes=1000, max_age=1.0), A)
    add(it, A, fakes(0, 12))
    (batch,) = it.take(0.0)
    why = Refusal(reason="type", stage="decode", error="E", message="m")
    batch.refused, batch.lettered = {2: why, 4: why, 9: why}, {2, 9}
    rest = it.split(batch, 4)
    assert ([m.offset() for m in batch.messages], batch.next_offset, batch.size) == ([0, 1, 2, 3], 4, 4)
    assert (batch.refused, batch.lettered) == ({2: why}, {2})
    assert it.take(9.0) == []
    it.done(batch)
    assert it.memory == 8 * (1 + MESSAGE_OVERHEAD)
    assert it.take(0.0) == [rest]
    assert ([m.offset() for m in rest.messages], rest.first_offset, rest.next_offset) == ([4, 5, 6, 7, 8, 9], 4, 10)
    assert (rest.refused, rest.lettered) == ({0: why, 5: why}, {5})
    it.done(rest)
    (last,) = it.take(9.0)
    assert [m.offset() for m in last.messages] == [10, 11]


def test_split_again() -> None:
    """A batch that is split again and again loses nothing: its parts come in order."""
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 9))
    (batch,) = it.take(9.0)
    it.split(batch, 6)
    it.split(batch, 3)
    it.done(batch)
    parts = [[m.offset() for m in batch.messages]]
    while taken := it.take(9.0):
        it.done(taken[0])
        parts.append([m.offset() for m in taken[0].messages])
    assert (parts, it.memory) == ([[0, 1, 2], [3, 4, 5], [6, 7, 8]], 0)


def test_split_of_a_closed_partition() -> None:
    """The rest of a batch whose partition has gone is not kept."""
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 5))
    (batch,) = it.take(9.0)
    it.close([A])
    it.split(batch, 2)
    assert (it.memory, it.take(9.0)) == (0, [])


def test_tail() -> None:
    """A drained partition's checkpoint is moved by a batch without messages; messages that come make it needless."""
    it = gathered(WIDE, A, B)
    it.tail(A, 5, 9)
    it.tail(B, 1, 2)
    add(it, B, fakes(3, 1))
    (batch,) = it.take(0.0)
    assert (batch.partition, batch.messages, batch.first_offset, batch.next_offset) == (A, [], 5, 9)
    it.tail(A, 5, 9)
    assert it.take(0.0) == []
    it.done(batch)
    assert it.take(0.0) == []
    (messages,) = it.take(9.0)
    assert (messages.partition, messages.first_offset) == (B, 3)


def _packed(messages: Sequence[Message]) -> bytes:
    """Return rows of one byte each, told from each other by their offsets."""
    return bytes(message.offset() % 256 for message in messages)


class Model:
    """Drives an accumulator at random and checks after each step what must always hold."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.it = gathered(bounds, A, B, C)
        self.now = 0.0
        self.added = dict.fromkeys((A, B, C), 0)
        self.taken = dict.fromkeys((A, B, C), 0)
        self.sizes: dict[TopicPartition, list[int]] = {A: [], B: [], C: []}
        self.out: dict[TopicPartition, Batch] = {}

    def add(self, partition: TopicPartition, sizes: list[int]) -> None:
        """Add messages of these sizes."""
        first = self.added[partition]
        messages: list[Message] = [Fake(first + i, size) for i, size in enumerate(sizes)]
        self.added[partition] += len(sizes)
        self.sizes[partition] += sizes
        packed = Packed(mapping=self, messages=len(messages), rows=len(messages), data=_packed(messages))
        self.it.add(partition, messages, size_of(messages), self.now, packed)

    def take(self, *, pressure: bool) -> None:
        """Take, and check order, completeness, bounds."""
        batches = self.it.take(self.now, pressure=pressure)
        for batch in batches:
            assert batch.partition not in self.out, "two batches of one partition are out"
            first = self.taken[batch.partition]
            found = [m.offset() for m in batch.messages]
            assert found == list(range(first, first + len(found))), "a hole, an overlap or another order"
            assert found, "an empty batch"
            assert batch.size == sum(len(m) for m in batch.messages)
            self.check_packed(batch)
            self.taken[batch.partition] += len(found)
            self.out[batch.partition] = batch
        assert sum(len(b.messages) for b in batches) <= self.bounds.max_messages
        assert sum(b.size for b in batches) <= self.bounds.max_bytes or [len(b.messages) for b in batches] == [1]

    def check_packed(self, batch: Batch) -> None:
        """Check that the pieces cover the batch, and that one which is not empty holds its own messages' rows."""
        start = 0
        for piece in batch.packed:
            assert piece.data == (_packed(batch.messages[start : start + piece.messages]) if piece.mapping else b"")
            start += piece.messages
        assert start == len(batch.messages)

    def split(self, partition: TopicPartition, chance: random.Random) -> None:
        """Keep a part of what is out."""
        if (batch := self.out.get(partition)) and len(batch.messages) > 1:
            self.check_packed(self.it.split(batch, chance.randint(1, len(batch.messages) - 1)))
            self.check_packed(batch)
            self.taken[partition] = batch.next_offset

    def give_back(self, partition: TopicPartition, chance: random.Random) -> None:
        """Give back what is out: it comes again from where it began."""
        if batch := self.out.pop(partition, None):
            self.it.give_back(batch, self.now + chance.random(), whole_topic=chance.random() < 0.5)
            self.taken[partition] = batch.first_offset

    def close(self, partition: TopicPartition) -> None:
        """Close and open again: offsets begin anew."""
        self.it.close([partition])
        self.out.pop(partition, None)
        self.added[partition] = self.taken[partition] = 0
        self.sizes[partition] = []
        self.it.open(partition)

    def done(self, partition: TopicPartition) -> None:
        """Be done with what is out."""
        if batch := self.out.pop(partition, None):
            self.it.done(batch)

    def check(self) -> None:
        """Check memory: all that was added and is not done; what is packed of it, at least."""
        expected = 0
        for partition, sizes in self.sizes.items():
            kept = self.taken[partition]
            if partition in self.out:
                kept -= len(self.out[partition].messages)
            expected += sum(sizes[kept:]) + MESSAGE_OVERHEAD * len(sizes[kept:])
        packed = sum(len(piece.data) for batch in self.out.values() for piece in batch.packed)
        most = sum(number * (1 + PACKED_OVERHEAD) for number in self.added.values())
        assert expected + packed <= self.it.memory <= expected + most

    def drain(self) -> None:
        """Take all that is left."""
        while any(self.added[p] > self.taken[p] for p in self.added) or self.out:
            self.it.hurry(self.added, "drain")
            self.take(pressure=False)
            assert self.out, "something is left and nothing is taken"
            for partition in list(self.out):
                self.done(partition)
            self.check()
        assert self.it.memory == 0


@settings(max_examples=150, deadline=None)
@given(
    bounds=st.builds(
        Bounds, max_messages=st.integers(1, 12), max_bytes=st.integers(1, 40), max_age=st.floats(0.0, 3.0)
    ),
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 80),
)
def test_any_sequence(bounds: Bounds, seed: int, steps: int) -> None:
    """Whatever happens in whatever order, each partition's batches are in order without hole or overlap, in bounds."""
    chance = random.Random(seed)
    model = Model(bounds)
    for _ in range(steps):
        model.now += chance.random()
        partition = chance.choice((A, B, C))
        steps_to_take = ("add", "take", "done", "close", "hurry", "split", "give back")
        match chance.choices(steps_to_take, weights=(5, 4, 4, 1, 1, 2, 1))[0]:
            case "add":
                model.add(partition, [chance.choice((0, 1, 3, 9, 60)) for _ in range(chance.randint(1, 15))])
            case "take":
                model.take(pressure=chance.random() < 0.2)
            case "done":
                model.done(partition)
            case "close":
                model.close(partition)
            case "split":
                model.split(partition, chance)
            case "give back":
                model.give_back(partition, chance)
            case _:
                model.it.hurry([partition], "revoke")
        model.check()
    if chance.random() < 0.5:
        model.it.close([A, B, C])
        assert model.it.memory == 0
    else:
        model.drain()


def test_what_is_given_back_comes_again_first_and_later() -> None:
    """Rule 3: the very batch goes again before what came after it, not before its time, and is counted once."""
    it = gathered(Bounds(max_messages=3, max_bytes=1000, max_age=1.0), A, B)
    add(it, A, fakes(0, 5))
    (batch,) = it.take(0.0)
    memory = it.memory
    it.give_back(batch, 5.0, whole_topic=False)
    assert (memory, 5, False) == (it.memory, it.messages, it.is_out(A))
    assert it.holds([A])
    assert batch.messages[0] is it.oldest(A)
    assert (5.0, []) == (it.next_due(), it.take(4.9))
    assert [batch] == it.take(5.0)
    it.done(batch)
    (rest,) = it.take(5.0)
    assert [(0, [3, 4])] == offsets([rest])
    it.done(rest)
    assert (0, 0) == (it.messages, it.memory)
    add(it, A, fakes(5, 1), 6.0)
    assert [(0, [5])] == offsets(it.take(7.0))


def test_one_try_of_a_topic_that_rests() -> None:
    """While a topic's table is locked one write of it is tried at a time, and the other topics are taken as ever."""
    free, locked = TopicPartition("free", 0), [TopicPartition("locked", number) for number in range(3)]
    it = Accumulator(Bounds(max_messages=9, max_bytes=1000, max_age=1.0), by_topic=True, connections=4)
    for partition in (free, *locked):
        it.open(partition)
    for partition in locked:
        add(it, partition, fakes(0, 9))
    out = [it.take(0.0)[0] for _ in locked]
    for batch in out:
        it.give_back(batch, 5.0, whole_topic=True)
    add(it, free, fakes(0, 1))
    assert [free] == [batch.partition for batch in it.take(1.0)]
    (tried,) = it.take(5.0)
    assert ([], None) == (it.take(9.0), it.next_due())
    it.done(tried)
    assert 2 == sum(len(it.take(9.0)) for _ in range(3))


def test_the_last_connection_is_not_for_what_rests() -> None:
    """Of partitions that wait for their transform fewer are tried than there are connections, each without others."""
    it = Accumulator(Bounds(max_messages=9, max_bytes=1000, max_age=1.0), connections=3)
    waiting = [TopicPartition("orders", number) for number in range(4)]
    for partition in waiting:
        it.open(partition)
        add(it, partition, fakes(0, 1))
    (*given_back, good) = it.take(1.0)
    for batch in given_back:
        it.give_back(batch, 2.0, whole_topic=False)
    it.done(good)
    add(it, good.partition, fakes(1, 1))
    assert [1, 1, 1, 0] == [len(it.take(3.0)) for _ in range(4)]
    assert it.is_out(good.partition)


def test_what_rests_is_hurried_once_and_forgotten_with_its_partition() -> None:
    """A stop tries it once more at once; a partition that is gone leaves nothing behind that would hold up others."""
    it = gathered(WIDE, A)
    add(it, A, fakes(0, 1))
    (batch,) = it.take(1.0)
    it.give_back(batch, 100.0, whole_topic=True)
    it.hurry([A], "drain")
    assert [batch] == it.take(2.0)
    it.give_back(batch, 100.0, whole_topic=True)
    assert [] == it.take(3.0)
    it.open(A)
    it.give_back(batch, 100.0, whole_topic=True)  # of before
    add(it, A, fakes(0, 1))
    assert [(0, [0])] == offsets(it.take(3.0))
