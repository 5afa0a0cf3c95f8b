"""What came packed serves the write it was packed for; anything else is packed again."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumerd.accumulator import Accumulator, Batch, Bounds
from consumerd.encode import TOMBSTONE
from consumerd.errors import Halt, Refusal, Rejected, SkipReason
from consumerd.kafka import PACKED_AT_ONCE, Chunk, ConsumerThread
from consumerd.member import Member
from consumerd.packed import Packed, joined
from consumerd.types import TopicPartition
from consumerd.ways_on import Accepted
from consumerd.writer import _packed

BAD = "x"


@dataclass(eq=False)
class Fake:
    """A mapping of letters into their bytes: a `!` cannot be decoded, a `-` is passed over, an `x` cannot be packed."""

    packs: list[str] = field(default_factory=list)

    def pack(self, messages: Any, refused: dict[int, Refusal] | None = None, _: object = ()) -> Packed:  # noqa: ANN401
        """Pack, and note what."""
        self.packs.append("".join(messages))
        known = {**(refused or {}), **{at: TOMBSTONE for at, message in enumerate(messages) if message == "!"}}
        taken = [message for at, message in enumerate(messages) if at not in known]
        good = [message for message in taken if message != "-"]
        if BAD in good:
            raise Rejected(TOMBSTONE, good.index(BAD))
        skipped: Counter[SkipReason] = Counter({"tombstone": len(taken) - len(good)})
        data = "".join(good).encode()
        return Packed(mapping=self, messages=len(messages), rows=len(good), data=data, refused=known, skipped=skipped)


class Message(str):  # noqa: SLOT000 - it has an offset
    """A letter with an offset."""

    at = 0

    def offset(self) -> int:
        """Give the offset."""
        return self.at

    def key(self) -> None:
        """Have none."""

    def headers(self) -> None:
        """Have none."""


def batch(*pieces: Packed, messages: str) -> Batch:
    """Make a batch of messages of one letter each."""
    return Batch(
        partition=TopicPartition("o", 0),
        first_offset=0,
        next_offset=len(messages),
        messages=cast("Any", list(messages)),
        size=len(messages),
        reason="age",
        gathered_since=0.0,
        packed=list(pieces),
    )


def put_together(mapping: Fake, *batches: Batch) -> tuple[int, bytes]:
    """Return rows and data of one write."""
    data = asyncio.run(_packed([(one, cast("Any", None)) for one in batches], cast("Any", mapping)))
    return data.rows, bytes(data.packed)


def test_as_it_came() -> None:
    """Pieces of one mapping are put together in order, across batches; what they refuse is noted by position."""
    mapping = Fake()
    first = batch(mapping.pack("ab"), mapping.pack("c!"), messages="abc!")
    second = batch(mapping.pack("!e"), messages="!e")
    mapping.packs.clear()
    assert put_together(mapping, first, second) == (4, b"abce")
    assert (mapping.packs, list(first.refused), list(second.refused)) == ([], [3], [0])


def test_of_another_table() -> None:
    """What was packed for another mapping, or for none, is packed for this one."""
    mapping = Fake()
    it = batch(mapping.pack("ab"), Fake().pack("cd"), Packed(messages=1), messages="abcde")
    mapping.packs.clear()
    assert put_together(mapping, it) == (5, b"abcde")
    assert mapping.packs == ["cd", "e"]


def test_refused_since() -> None:
    """The piece that holds a row which the database refused is packed without it, the others are left alone."""
    mapping = Fake()
    it = batch(mapping.pack("a!"), mapping.pack("cde"), mapping.pack("f"), messages="a!cdef")
    it.refused[3] = TOMBSTONE
    mapping.packs.clear()
    assert put_together(mapping, it) == (4, b"acef")
    assert (mapping.packs, sorted(it.refused)) == (["cde"], [1, 3])


def test_skipped() -> None:
    """What pieces skip is counted once, however often the batch is put together, and is kept when they are joined."""
    mapping = Fake()
    pieces = [
        Packed(mapping=mapping, messages=2, rows=1, data=b"b", skipped=Counter({"where": 1})),
        Packed(mapping=mapping, messages=3, rows=1, data=b"d", skipped=Counter({"where": 2})),
    ]
    for it in (batch(*pieces, messages="abcde"), batch(*joined(pieces), messages="abcde")):
        assert put_together(mapping, it) == put_together(mapping, it) == (2, b"bd")
        assert it.skipped == {"where": 3}


def test_passed_over() -> None:
    """Messages that are passed over are counted, once however often the write is put together, of joined pieces too."""
    mapping = Fake()
    pieces = [mapping.pack("a-"), mapping.pack("-"), mapping.pack("b--")]
    for it in (batch(*pieces, messages="a--b--"), batch(*joined(pieces), messages="a--b--")):
        for _ in range(2):
            assert put_together(mapping, it) == (2, b"ab")
            assert it.skipped == {"tombstone": 4}
    it = batch(Packed(messages=6), messages="a--b--")
    assert put_together(mapping, it) == (2, b"ab")
    assert it.skipped == {"tombstone": 4}


def test_no_binary_form() -> None:
    """A row without a binary form is named by its number in the write."""
    mapping = Fake()
    it = batch(mapping.pack("ab"), Packed(messages=3), messages="abcxe")
    with pytest.raises(Rejected) as raised:
        put_together(mapping, it)
    assert raised.value.row == 3


@pytest.mark.parametrize(("length", "packed"), [(PACKED_AT_ONCE, True), (PACKED_AT_ONCE + 1, False)])
def test_large_messages_are_packed_when_written(length: int, packed: bool) -> None:
    """What comes is packed at once, but for messages so large that they should not be in memory twice."""
    messages: list[Any] = [Message("v" * length)] * 3
    thread = ConsumerThread.__new__(ConsumerThread)
    thread._listener = cast("Any", SimpleNamespace(pack=lambda _, them: Packed(messages=len(them), rows=len(them))))
    chunk = thread._chunk(TopicPartition("o", 0), messages)
    assert (chunk.size, chunk.packed.messages, chunk.packed.rows) == (3 * length, 3, 3 if packed else 0)


def test_no_binary_form_when_it_comes() -> None:
    """A row without a binary form is left to who writes it: the thread that reads goes on."""
    member = Member.__new__(Member)
    member.tables = cast("Any", SimpleNamespace(of=lambda _: SimpleNamespace(mapping=Fake())))
    partition = TopicPartition("o", 0)
    assert member.pack(partition, list("ab")).data == b"ab"
    assert not (left := member.pack(partition, list("axb"))).rows
    assert (left.messages, left.mapping) == (3, None)


def test_fetched_before_the_position() -> None:
    """Of a chunk that begins before the position, the rest is kept, and the piece that was packed of all is not."""
    gathered: list[tuple[list[Any], Packed]] = []
    member = Member.__new__(Member)
    member._positions = {TopicPartition("o", 0): 2}
    member.accepted = Accepted()
    member.progress = cast("Any", SimpleNamespace(consumed=lambda *_: None))
    member._batches = cast(
        "Any", SimpleNamespace(add=lambda _, messages, __, ___, piece: gathered.append((messages, piece)))
    )
    stubs: Any = member
    stubs._halting = SimpleNamespace(is_another_log=lambda *_: False)
    stubs._under_pressure = lambda: False
    stubs._set_timer = lambda: None
    messages: list[Any] = [Message(letter) for letter in "abcd"]
    for at, message in enumerate(messages):
        message.at = at
    member.received([Chunk(TopicPartition("o", 0), messages, 4, Fake().pack(messages))])
    ((kept, piece),) = gathered
    assert ("".join(kept), piece.messages, piece.mapping) == ("cd", 2, None)
    assert member._positions == {TopicPartition("o", 0): 4}


def test_rows_of_no_message() -> None:
    """Pieces that are not of the batch's messages are never written."""
    mapping = Fake()
    with pytest.raises(Halt):
        put_together(mapping, batch(mapping.pack("abc"), messages="bc"))


def test_a_trickle_of_poison() -> None:
    """Thousands of messages that came one by one are a few pieces of a batch: none is looked at for each other."""
    mapping = Fake()
    it = Accumulator(Bounds(max_messages=20_000, max_bytes=1 << 20, max_age=0.0))
    partition = TopicPartition("o", 0)
    it.open(partition)
    for number in range(5_000):
        message: Any = Message("a!"[number % 2])
        message.at = number
        it.add(partition, [message], 1, 0.0, mapping.pack([message]))
    (one,) = it.take(1.0)
    assert [piece.messages for piece in one.packed] == [1_000] * 5
    rows, data = put_together(mapping, one)
    assert (rows, data, list(one.refused)) == (2_500, b"a" * 2_500, list(range(1, 5_000, 2)))
