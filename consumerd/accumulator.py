"""Gathers messages into batches, per partition. Pure: the time is passed in, nothing is awaited.

Each partition is a queue of chunks (what one `consume()` brought for it). A batch is cut from the queue's front only
when somebody takes it: one that is half full goes to a connection that is free, and grows to its bounds while all are
busy. Whoever takes one for its age takes along what others hold, as far as it fits into one write: a trickle in many
partitions is few transactions. With a chunk come its rows, packed for COPY. A partition whose batch is out is not taken
again before `done()`: its batches are written in offset order, one at a time. What a writer gives back is taken again
later, first of its partition.

Over 400 lines, because what is held, what is out and what both cost in memory must agree after each step.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from consumerd.packed import Packed, joined, parted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from confluent_kafka import KafkaError

    from consumerd.errors import Refusal, SkipReason
    from consumerd.transform import Outcome
    from consumerd.types import Message, TopicPartition

FlushReason = Literal["messages", "bytes", "age", "pressure", "revoke", "drain", "tail"]

MESSAGE_OVERHEAD = 400
"""Bytes that a buffered message costs beside its value, key and headers: the objects for message, topic and key
(measured as resident memory per message of 100,000 buffered ones: 250 to 390)."""
HEADER_OVERHEAD = 100
"""Bytes that a header costs beside its name and value (measured: 60 to 80)."""
SAMPLE = 32
"""Of so many messages one is asked for its key and headers, which takes 0.2 microseconds, and 1.5 for each header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Upper bounds of a batch. `max_age` in seconds, from the arrival of its first message until it is due."""

    max_messages: int
    max_bytes: int
    max_age: float

    def reached(self, messages: int, size: int) -> FlushReason | None:
        """Return which bound makes a batch due: half of it does, for who asks is free and would else be idle."""
        if 2 * messages >= self.max_messages:
            return "messages"
        return "bytes" if 2 * size >= self.max_bytes else None


@dataclass(slots=True, kw_only=True, eq=False)
class Judged:
    """What the breaker has counted of one batch, and when; zeros once it counts no more."""

    partition: TopicPartition
    at: float
    messages: int
    refused: int


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """Consecutive messages of one partition, kept raw until they are checkpointed.

    One without messages moves the checkpoint over offsets that hold none: `Accumulator.tail`.
    """

    partition: TopicPartition
    first_offset: int
    next_offset: int
    """The checkpoint after this batch."""
    messages: list[Message]
    size: int
    reason: FlushReason
    gathered_since: float
    arrived: float = 0.0
    """When its last message came."""
    waited: float = 0.0
    """Seconds for which it was due and no connection was free."""
    packed: list[Packed] = field(default_factory=list)
    """The messages as rows, piece by piece."""
    packed_size: int = 0
    """Bytes that are counted for it."""
    refused: dict[int, Refusal] = field(default_factory=dict)
    """Position in `messages` of each that does not become a row, and why."""
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    """How many of `messages` become neither row nor letter, as they were last packed."""
    outcomes: list[Outcome] = field(default_factory=list)
    """What the handler's transform made of the first messages; without one nothing."""
    extra: int = 0
    """Rows beyond one for each message that has any."""
    lettered: set[int] = field(default_factory=set)
    """Those of `refused` whose letter was acknowledged: a retry does not send it twice."""
    on_their_way: set[int] = field(default_factory=set)
    """Those whose letter was sent and not acknowledged yet."""
    letter_error: KafkaError | None = None
    """Why one of its letters was not taken."""
    judged: Judged | None = None
    """What the breaker has counted of it; None: it has not seen this batch."""
    fruitless: int = 0
    """Times that the database refused the batch and then none of its rows."""
    cancelled: int = 0
    """Times that the database cancelled its write when it was one message alone."""
    given_back: int = 0
    """Times that its writer has given it back: what it waits for concerns no other."""
    in_doubt: bool = False
    """Whether a COMMIT of it may have landed without an answer: cut then, neither part would find its checkpoint."""
    orphaned_since: float | None = None
    """Since when rows of it have been refused for a foreign key that refers to nothing."""

    @property
    def owes_letters(self) -> bool:
        """Whether some of what is refused has no acknowledged letter yet."""
        return not self.lettered.issuperset(self.refused)

    @property
    def rows(self) -> int:
        """The rows that it becomes, as it was last packed."""
        return len(self.messages) - len(self.refused) - self.skipped.total() + self.extra

    @property
    def leader_epoch(self) -> int | None:
        """The epoch of the leader that served the last message."""
        return self.messages[-1].leader_epoch() if self.messages else None

    def cut(self, count: int) -> Batch:
        """Keep the first `count` messages and return the others, with what is known of them.

        None of the letters may be on its way.
        """
        assert not self.on_their_way, "a letter would not find its batch"  # noqa: S101 - the caller's promise
        kept = size_of(self.messages[:count])
        self.packed, rest_packed = parted(self.packed, count)
        rest = Batch(
            partition=self.partition,
            first_offset=self.messages[count].offset(),
            next_offset=self.next_offset,
            messages=self.messages[count:],
            size=max(0, self.size - kept),  # the few that are kept are sized: a batch may be cut many times
            reason=self.reason,
            gathered_since=self.gathered_since,
            arrived=self.arrived,
            packed=rest_packed,
            refused={position - count: why for position, why in self.refused.items() if position >= count},
            outcomes=self.outcomes[count:],
            lettered={position - count for position in self.lettered if position >= count},
        )
        self.next_offset = rest.first_offset
        del self.messages[count:], self.outcomes[count:]
        self.size -= rest.size
        self.refused = {position: why for position, why in self.refused.items() if position < count}
        self.lettered = {position for position in self.lettered if position < count}
        rest.packed_size = min(self.packed_size, sum(piece.memory for piece in rest.packed))
        self.packed_size -= rest.packed_size
        return rest


@dataclass(slots=True, eq=False)
class _Chunk:
    messages: list[Message]
    size: int
    arrived: float
    packed: Packed


@dataclass(slots=True, eq=False)
class _Queue:
    """What one partition has gathered."""

    chunks: deque[_Chunk] = field(default_factory=deque)
    messages: int = 0
    size: int = 0
    out: Batch | None = None
    rest: deque[Batch] = field(default_factory=deque)
    """What was cut off batches that were out: the next ones."""
    tail: tuple[int, int] | None = None
    """Offsets, the second not included, that hold no message and follow what is written."""
    hurry: FlushReason | None = None
    free: float | None = None
    """When it was first seen that none is out."""
    full: float | None = None
    """Since when it holds half of a bound."""

    @property
    def since(self) -> float | None:
        """When the oldest message that waits arrived; None if none waits, or one is out."""
        if self.out is not None:
            return None
        if self.rest:
            return self.rest[0].gathered_since
        return self.chunks[0].arrived if self.chunks else None


def size_of(messages: Sequence[Message]) -> int:
    """Return the bytes of the messages' values, keys and headers, the last two by a sample: what `max_bytes` bounds."""
    size = sum(map(len, messages))
    beside = 0
    for message in messages[::SAMPLE]:
        if key := message.key():
            beside += len(key)
        if headers := message.headers():
            beside += sum(HEADER_OVERHEAD + len(name) + len(value or b"") for name, value in headers)
    return size + beside * len(messages) // len(range(0, len(messages), SAMPLE)) if beside else size


class Accumulator:
    """The messages of one handler that are not yet written."""

    def __init__(self, bounds: Bounds, *, by_topic: bool = False, connections: int = 1) -> None:
        self._bounds = bounds
        self._most_tried = max(1, connections - 1)
        """Of those that rest, how many are tried at a time: the last connection is for the others."""
        self._resting: dict[TopicPartition | str, float] = {}
        """Topics, or partitions, whose last write was given back, and until when nothing of them is taken. After that
        one write of each is tried at a time, which takes nothing else along."""
        self._by_topic = by_topic
        """Whether a write is of one topic: each has a table of its own."""
        self._queues: dict[TopicPartition, _Queue] = {}
        self.messages = 0
        """Messages held, batches that are out included."""
        self._size = 0
        """Bytes of the messages held, and of what is packed of them."""

    def bound(self, bounds: Bounds) -> None:
        """Cut batches within other bounds from now on."""
        self._bounds = bounds

    @property
    def memory(self) -> int:
        """Bytes of memory held, batches that are out included: what `max_buffered` bounds."""
        return self._size + MESSAGE_OVERHEAD * self.messages

    def open(self, partition: TopicPartition) -> None:
        """Accept messages of a partition from now on."""
        self.close([partition])
        self._queues[partition] = _Queue()

    def add(
        self,
        partition: TopicPartition,
        messages: list[Message],
        size: int,
        now: float,
        packed: Packed | None = None,
    ) -> bool:
        """Gather what one `consume()` brought for an open partition; True when its batch is due for its size."""
        packed = packed or Packed(messages=len(messages))
        queue = self._queues[partition]
        queue.tail = None
        queue.chunks.append(_Chunk(messages, size, now, packed))
        queue.messages += len(messages)
        queue.size += size
        self.messages += len(messages)
        self._size += size + packed.memory
        if queue.free is None and queue.out is None:
            queue.free = now
        if queue.full is None and self._bounds.reached(queue.messages, queue.size):
            queue.full = now
        return queue.out is None and queue.full is not None

    def tail(self, partition: TopicPartition, start: int, end: int) -> None:
        """Make due a batch without messages, if the partition has none: its log ends with offsets that hold none."""
        queue = self._queues.get(partition)
        if queue is not None and not queue.chunks and not queue.rest and queue.out is None:
            queue.tail = (start, end)

    def split(self, batch: Batch, count: int) -> Batch:
        """Keep the first `count` messages of a batch that is out; return the others, the partition's next batch."""
        rest = batch.cut(count)
        queue = self._queues.get(batch.partition)
        if queue is not None and queue.out is batch:
            queue.rest.appendleft(rest)
            queue.messages += len(rest.messages)
            queue.size += rest.size
        return rest

    def give_back(self, batch: Batch, until: float, *, whole_topic: bool) -> None:
        """Have a batch that is out taken again, first of its partition, and nothing of it (of its topic) before then.

        The batch stays what it is, with all that is known of it; a partition closed since then has none.
        """
        queue = self._queues.get(batch.partition)
        if queue is not None and queue.out is batch:
            queue.out, queue.free = None, until
            queue.rest.appendleft(batch)
            queue.messages += len(batch.messages)
            queue.size += batch.size
            self._resting[batch.partition.topic if whole_topic else batch.partition] = until

    def hurry(self, partitions: Iterable[TopicPartition], reason: FlushReason) -> None:
        """Make what these partitions hold due at once: they are about to go."""
        for partition in partitions:
            if queue := self._queues.get(partition):
                queue.hurry = reason
                if name := self._name_at_rest(partition):
                    self._resting[name] = 0.0

    def take(self, now: float, *, pressure: bool = False) -> list[Batch]:
        """Cut the batches of one write: those that are due, the oldest first, together within the bounds.

        Others go along with one that is due by its age. Under memory pressure everything is due.
        """
        waiting = []
        for partition, queue in self._queues.items():
            if (since := queue.since) is not None and not self._rests(partition, now):
                reason = self._due(queue, now, pressure=pressure)
                waiting.append((reason is None, since, partition, queue, reason))
                queue.free = now if queue.free is None else queue.free
        waiting.sort(key=lambda entry: entry[:3])
        if not waiting or (first_reason := waiting[0][-1]) is None:
            return self._take_tails(now)
        first_topic, tried = waiting[0][2].topic, self._name_at_rest(waiting[0][2])
        batches: list[Batch] = []
        messages = size = 0
        for _, _, partition, queue, reason in waiting:
            if (self._by_topic and partition.topic != first_topic) or self._name_at_rest(partition) != tried:
                continue
            if reason is None and first_reason != "age":
                break
            if batches and (
                messages + queue.messages > self._bounds.max_messages or size + queue.size > self._bounds.max_bytes
            ):
                break
            waited = self._waited(queue, reason, now)
            batch = queue.out = self._next(partition, queue, reason or first_reason)
            batch.waited = waited
            queue.free = None
            queue.full = now if self._bounds.reached(queue.messages, queue.size) else None
            batches.append(batch)
            messages += len(batch.messages)
            size += batch.size
        return batches

    def done(self, batch: Batch) -> None:
        """Forget a batch that was taken. One of a partition closed since then is forgotten already."""
        queue = self._queues.get(batch.partition)
        if queue is not None and queue.out is batch:
            queue.out = None
            if self._resting and (name := self._name_at_rest(batch.partition)):
                del self._resting[name]
            self.messages -= len(batch.messages)
            self._size -= batch.size + batch.packed_size

    def close(self, partitions: Iterable[TopicPartition]) -> None:
        """Drop partitions with all that they hold, a batch that is out included."""
        for partition in partitions:
            for name in (partition, partition.topic):
                self._resting.pop(name, None)
            if queue := self._queues.pop(partition, None):
                self.messages -= queue.messages + (len(queue.out.messages) if queue.out else 0)
                self._size -= queue.size + sum(chunk.packed.memory for chunk in queue.chunks)
                self._size -= sum(batch.packed_size for batch in queue.rest)
                self._size -= queue.out.size + queue.out.packed_size if queue.out else 0

    def next_due(self) -> float | None:
        """Return when the oldest gathered batch reaches `max_age`, its rest is over; None if nothing waits for that."""
        due = [
            max(since + self._bounds.max_age, self._resting.get(name, 0.0) if name else 0.0)
            for partition, queue in self._queues.items()
            if (since := queue.since) is not None
            for name in [self._name_at_rest(partition)]
            if not (name and self._is_tried(name))  # whose end is waited for
        ]
        return min(due, default=None)

    def holds(self, partitions: Iterable[TopicPartition]) -> bool:
        """Whether any of these has messages that are not written."""
        return any(
            queue.chunks or queue.out or queue.rest for p in partitions if (queue := self._queues.get(p)) is not None
        )

    def is_out(self, partition: TopicPartition) -> bool:
        """Whether a batch of the partition is being written."""
        queue = self._queues.get(partition)
        return queue is not None and queue.out is not None

    def oldest(self, partition: TopicPartition) -> Message | None:
        """Return the oldest message of a partition that is not written."""
        queue = self._queues.get(partition)
        if queue is None:
            return None
        first = queue.out or (queue.rest[0] if queue.rest else None)
        if first is not None and first.messages:
            return first.messages[0]
        return queue.chunks[0].messages[0] if queue.chunks else None

    def _name_at_rest(self, partition: TopicPartition) -> TopicPartition | str | None:
        """Return what rests, the partition or its topic; None mostly."""
        if not self._resting:
            return None
        return next((name for name in (partition, partition.topic) if name in self._resting), None)

    def _rests(self, partition: TopicPartition, now: float) -> bool:
        """Whether nothing of a partition is to be taken now."""
        name = self._name_at_rest(partition)
        return name is not None and (now < self._resting[name] or self._is_tried(name))

    def _is_tried(self, name: TopicPartition | str) -> bool:
        """Whether what rests is being tried, or as many others as may be."""
        out = {each for p, queue in self._queues.items() if queue.out is not None for each in (p, p.topic)}
        tried = out & self._resting.keys()
        return name in tried or len(tried) >= self._most_tried

    def _due(self, queue: _Queue, now: float, *, pressure: bool) -> FlushReason | None:
        if queue.rest:
            return queue.rest[0].reason
        if reason := self._bounds.reached(queue.messages, queue.size):
            return reason
        if now - queue.chunks[0].arrived >= self._bounds.max_age:
            return "age"
        return queue.hurry or ("pressure" if pressure else None)

    def _waited(self, queue: _Queue, reason: FlushReason | None, now: float) -> float:
        """Return for how long a queue's next batch was due, none of it out, and nobody came for it."""
        free = now if queue.free is None else queue.free
        if queue.rest:
            return max(0.0, now - free)  # what is given back is free later, unless it is hurried
        if reason == "age":
            return now - max(free, queue.chunks[0].arrived + self._bounds.max_age)
        return now - max(free, queue.full) if queue.full is not None else 0.0

    def _take_tails(self, now: float) -> list[Batch]:
        """Return batches without messages, for the partitions whose log ends so."""
        batches: list[Batch] = []
        for partition, queue in self._queues.items():
            if batches and self._by_topic and partition.topic != batches[0].partition.topic:
                continue
            if self._name_at_rest(partition):
                continue
            if queue.tail is not None and queue.out is None:
                (start, end), queue.tail = queue.tail, None
                queue.out = Batch(
                    partition=partition,
                    first_offset=start,
                    next_offset=end,
                    messages=[],
                    size=0,
                    reason="tail",
                    gathered_since=now,
                    arrived=now,
                )
                batches.append(queue.out)
        return batches

    def _next(self, partition: TopicPartition, queue: _Queue, reason: FlushReason) -> Batch:
        """Return what was cut off the last batch, or cut the next one."""
        if not queue.rest:
            return self._cut(partition, queue, reason)
        rest = queue.rest.popleft()
        queue.messages -= len(rest.messages)
        queue.size -= rest.size
        return rest

    def _cut(self, partition: TopicPartition, queue: _Queue, reason: FlushReason) -> Batch:
        """Cut one batch within the bounds from a queue's front; at least one message, however large.

        Once it is half full it ends where a chunk does: the rows of one that is cut have to be packed again.
        """
        since = arrived = queue.chunks[0].arrived
        messages: list[Message] = []
        pieces: list[Packed] = []
        size = packed_size = 0
        while queue.chunks:
            chunk = queue.chunks[0]
            fits = self._fitting(chunk, self._bounds.max_messages - len(messages), self._bounds.max_bytes - size)
            if fits == len(chunk.messages):
                queue.chunks.popleft()
                messages += chunk.messages
                size += chunk.size
                pieces.append(chunk.packed)
                packed_size += chunk.packed.memory
                arrived = chunk.arrived
                continue
            if messages and (fits == 0 or self._bounds.reached(len(messages), size)):
                break
            fits = fits or 1
            head = chunk.messages[:fits]
            head_size = size_of(head)
            pieces.append(Packed(messages=len(head)))
            packed_size += chunk.packed.memory
            arrived = chunk.arrived
            chunk.messages = chunk.messages[fits:]
            chunk.size -= head_size
            chunk.packed = Packed(messages=len(chunk.messages))
            messages += head
            size += head_size
            if not chunk.messages:
                queue.chunks.popleft()
            break
        queue.messages -= len(messages)
        queue.size -= size
        return Batch(
            partition=partition,
            first_offset=messages[0].offset(),
            next_offset=messages[-1].offset() + 1,
            messages=messages,
            size=size,
            reason=reason,
            gathered_since=since,
            arrived=arrived,
            packed=joined(pieces),
            packed_size=packed_size,
        )

    @staticmethod
    def _fitting(chunk: _Chunk, messages: int, size: int) -> int:
        """Return how many of a chunk's first messages keep within both bounds."""
        if len(chunk.messages) <= messages and chunk.size <= size:
            return len(chunk.messages)
        if chunk.size <= size:
            return messages
        beside = max(0, chunk.size - sum(map(len, chunk.messages))) // len(chunk.messages)
        fits = 0
        for message in chunk.messages[:messages]:
            size -= len(message) + beside
            if size < 0:
                break
            fits += 1
        return fits
