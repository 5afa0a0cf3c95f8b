"""A simulated Kafka: logs, one consumer group, its offsets; and the Kafka thread of a member, without a thread.

The group gives partitions, takes them back one by one (cooperative) and expels members that are silent. The thread is
the daemon's own, but for what blocks: a revoke waits for the loop, here by going on when the loop has answered. What a
member sends to its coordinator arrives in the order in which it was sent.

Over 400 lines, because the group, the Consumer and the thread are three sides of one protocol.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import confluent_kafka as ck

from consumerd.commits import INTERVAL, Commit, Commits
from consumerd.kafka import FULL_WAIT, IDLE_WAIT, REVOKE_TIMEOUT, ConsumerThread
from consumerd.types import TopicPartition
from tests.unit.simulation.loop import CLOCK, NEUTRAL, OWNER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from consumerd.accumulator import Bounds
    from tests.unit.simulation.world import Process, World

TOPIC = "orders"
IDLE = 2.0
"""Seconds after which an idle thread looks around."""
FINISH = 2.0
Event = tuple[str, list[TopicPartition]]


@dataclass(slots=True)
class Message:
    """One message of a log."""

    at: int
    number: int
    text: bytes

    def __len__(self) -> int:
        return len(self.text)

    def topic(self) -> str:
        """Return its topic."""
        return TOPIC

    def partition(self) -> int:
        """Return its partition."""
        return self.number

    def error(self) -> None:
        """Be no error."""

    def key(self) -> bytes | None:
        """Have none."""
        return None

    def value(self) -> bytes | None:
        """Return the value."""
        return self.text

    def offset(self) -> int:
        """Return the offset."""
        return self.at

    def leader_epoch(self) -> int | None:
        """Return an epoch that grows with the log."""
        return self.at // 8

    def timestamp(self) -> tuple[int, int]:
        """Return some time."""
        return 1, 1_700_000_000_000

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        """Have none."""
        return None


class Broker:
    """Logs and one group. `fault_rate` is the share of requests that fail."""

    def __init__(self, world: World, partitions: int) -> None:
        self.world = world
        self.rng = world.rng
        self.fault_rate = 0.0
        self.partitions = [TopicPartition(TOPIC, number) for number in range(partitions)]
        self.logs: dict[TopicPartition, list[Message]] = {partition: [] for partition in self.partitions}
        self.high = dict.fromkeys(self.partitions, 0)
        self.committed: dict[TopicPartition, tuple[int, str]] = {}
        self.members: list[Thread] = []
        self.owner: dict[TopicPartition, Thread | None] = dict.fromkeys(self.partitions)
        self._moving: dict[TopicPartition, Thread] = {}

    def append(self, partition: TopicPartition, text: bytes) -> int:
        """Append a message; return its offset."""
        offset = self.high[partition]
        self.logs[partition].append(Message(offset, partition.partition, text))
        self.high[partition] = offset + 1
        return offset

    def wake(self) -> None:
        """Have all members fetch."""
        for thread in self.members:
            thread.wake()

    # The group.

    def join(self, thread: Thread) -> None:
        """Let a member in, and give it its share."""
        if thread not in self.members:
            self.members.append(thread)
            thread.happens(("assign", []))  # its share may be empty
        self.spread(thread)

    def spread(self, to: Thread | None = None) -> None:
        """Give what nobody has; `to` gets some of what others have."""
        for partition, owner in self.owner.items():
            if owner is None and self.members:
                self._give(partition, self.rng.choice(self.members))
            elif to is not None and self.rng.random() < len(self.members) ** -1:
                self.move(partition, to)

    def move(self, partition: TopicPartition, to: Thread) -> None:
        """Take a partition from its owner; `to`, which may be the same member, gets it then."""
        owner = self.owner[partition]
        if owner is not None and partition not in self._moving:
            self._moving[partition] = to
            owner.happens(("revoke", [partition]))

    def given_up(self, thread: Thread, partitions: Iterable[TopicPartition]) -> None:
        """Give on what a member has given up."""
        for partition in partitions:
            if self.owner[partition] is thread:
                self.owner[partition] = None
                to = self._moving.pop(partition, None)
                if self.members:
                    self._give(partition, to if to in self.members else self.rng.choice(self.members))

    def expel(self, thread: Thread) -> None:
        """Take a member for dead: others get its partitions at once, and it learns of that later."""
        if thread in self.members:
            self.members.remove(thread)
            thread.expelled = True
            thread.events.clear()
            for partition, owner in self.owner.items():
                if owner is thread:
                    self.owner[partition] = None
                    self._moving.pop(partition, None)
                    self.world.hit(partition)
            self.spread()
            self.world.loop.call_later(self.rng.random() * 8, thread.happens, ("lost", []), context=NEUTRAL)

    def leave(self, thread: Thread) -> None:
        """Let a member go that has given all up."""
        if thread in self.members:
            self.members.remove(thread)
            self.given_up(thread, [partition for partition, owner in self.owner.items() if owner is thread])

    def _give(self, partition: TopicPartition, to: Thread) -> None:
        self.owner[partition] = to
        to.happens(("assign", [partition]))

    # Requests.

    def commit(self, thread: Thread, offsets: Sequence[ck.TopicPartition]) -> None:
        """Take commits, of whatever partitions, from who is a member."""
        fault = None
        if thread not in self.members:
            fault = ck.KafkaError(ck.KafkaError.UNKNOWN_MEMBER_ID)
        elif self.rng.random() < self.fault_rate:
            fault = ck.KafkaError(ck.KafkaError.REBALANCE_IN_PROGRESS)
        unknown = fault is None and self.rng.random() < self.fault_rate
        for offset in offsets:
            partition = TopicPartition(offset.topic, offset.partition)
            if fault is None:
                self.world.on_kafka_commit(thread.process, partition, offset.offset)
                self.committed[partition] = offset.offset, offset.metadata or ""
            else:
                self.world.hit(partition)
        if unknown:  # it was taken, and its answer is lost
            fault = ck.KafkaError(ck.KafkaError._TIMED_OUT)
        thread.later(thread.answered, fault, list(offsets))


class Consumer:
    """What the daemon uses of confluent_kafka's Consumer."""

    def __init__(self, broker: Broker, thread: Thread) -> None:
        self._broker = broker
        self._thread = thread
        self._positions: dict[TopicPartition, int | None] = {}
        self._paused: set[TopicPartition] = set()

    def consume(self) -> list[Message]:
        """Return some messages of some partitions."""
        messages: list[Message] = []
        for partition, position in self._positions.items():
            if position is None or partition in self._paused or self._broker.rng.random() < 0.2:
                continue
            log = self._broker.logs[partition]
            count = self._broker.rng.randint(1, 6)
            got = log[_index(log, position) :][:count]
            messages += got
            whole = not got or got[-1] is log[-1]
            self._positions[partition] = self._broker.high[partition] if whole else got[-1].at + 1
        return messages

    def fetchable(self) -> bool:
        """Whether there is something to consume."""
        return any(
            position is not None and position < self._broker.high[partition] and partition not in self._paused
            for partition, position in self._positions.items()
        )

    def incremental_assign(self, partitions: list[ck.TopicPartition]) -> None:
        """Take partitions."""
        self._positions.update(dict.fromkeys(_ours(partitions)))

    def incremental_unassign(self, partitions: list[ck.TopicPartition]) -> None:
        """Let partitions go."""
        for partition in _ours(partitions):
            self._positions.pop(partition, None)
            self._paused.discard(partition)

    def pause(self, partitions: list[ck.TopicPartition]) -> None:
        """Fetch no more of partitions."""
        self._paused.update(_ours(partitions))

    def resume(self, partitions: list[ck.TopicPartition]) -> None:
        """Fetch partitions again."""
        self._paused.difference_update(_ours(partitions))

    def seek(self, partition: ck.TopicPartition) -> None:
        """Go on at an offset."""
        self._positions[_ours([partition])[0]] = partition.offset

    def position(self, partitions: list[ck.TopicPartition]) -> list[ck.TopicPartition]:
        """Return what comes next of partitions."""
        at = {partition: self._positions.get(partition) for partition in _ours(partitions)}
        return [ck.TopicPartition(*partition, -1001 if offset is None else offset) for partition, offset in at.items()]

    def committed(self, partitions: list[ck.TopicPartition], **_: object) -> list[ck.TopicPartition]:
        """Return committed offsets."""
        if self._broker.rng.random() < self._broker.fault_rate:
            raise ck.KafkaException(ck.KafkaError(ck.KafkaError._TIMED_OUT))
        there = {partition: self._broker.committed.get(partition, (-1001, "")) for partition in _ours(partitions)}
        return [ck.TopicPartition(*partition, *committed) for partition, committed in there.items()]

    def list_topics(self, topic: str, **_: object) -> SimpleNamespace:
        """Return a leader for each partition."""
        partitions = {partition.partition: SimpleNamespace(leader=1) for partition in self._broker.partitions}
        return SimpleNamespace(topics={topic: SimpleNamespace(partitions=partitions)})

    def get_watermark_offsets(self, partition: ck.TopicPartition, **_: object) -> tuple[int, int]:
        """Return where a log begins and ends."""
        return 0, self._broker.high[_ours([partition])[0]]

    def commit(self, offsets: list[ck.TopicPartition], **_: object) -> None:
        """Send a commit."""
        self._thread.send(self._broker.commit, self._thread, offsets)


class Thread(ConsumerThread):
    """The Kafka thread of one member, as callbacks of the loop: `_step` is what its own loop does in one turn."""

    def __init__(
        self,
        config: dict[str, Any],
        topics: Sequence[str],
        listener: Any,  # noqa: ANN401
        name: str,
        batch: Bounds,
    ) -> None:
        super().__init__(config, topics, listener, name, batch)
        self.process: Process = OWNER.get()  # type: ignore[assignment]
        self.process.thread = self
        self.world = self.process.world
        self.commits = _Commits(self._tell, self.wake)
        self.events: list[Event] = []
        self.expelled = False
        """The group has let it go, and it has not heard."""
        self._kafka: Any = Consumer(self.world.broker, self)
        self._told_in_order: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._step_at: asyncio.TimerHandle | None = None
        self._blocked = False
        self._fetched: list[Any] = []
        self._finish_until: float | None = None
        self._channel = 0.0

    # What connects it with the loop and the broker.

    def start(self) -> None:
        """Join the group."""
        self.send(self.world.broker.join, self)
        self.wake()

    async def _ask(self, function: Any) -> Any:  # noqa: ANN401
        asyncio.get_running_loop().call_soon(self.wake)
        return await super()._ask(function)

    async def close(self) -> None:
        """Leave the group, and wait for that."""
        asyncio.get_running_loop().call_soon(self.wake)
        await super().close()

    def wake(self, within: float = 0.02) -> None:
        """See to it that a turn comes."""
        at = CLOCK.now + self.world.rng.random() * within
        if self._step_at is not None:
            if self._step_at.when() <= at:
                return
            self._step_at.cancel()
        self._step_at = self.world.loop.call_at(at, self._step, context=self.process.context)

    def later(self, function: Callable[..., None], *values: object) -> None:
        """Run something on this thread, in its turn."""
        self.world.loop.call_later(
            self.world.rng.random() * self.world.latency, function, *values, context=self.process.context
        )

    def send(self, function: Callable[..., None], *values: object) -> None:
        """Send to the coordinator: in order."""
        self._channel = max(self._channel + 1e-6, CLOCK.now + self.world.rng.random() * self.world.latency)
        self.world.loop.call_at(self._channel, function, *values, context=NEUTRAL)

    def happens(self, event: Event) -> None:
        """Take note of what the group decided."""
        self.events.append(event)
        self.wake()

    def answered(self, error: ck.KafkaError | None, offsets: list[ck.TopicPartition]) -> None:
        """Take the answer to a commit."""
        self.commits.on_answer(error, offsets)
        self.wake()

    def _tell(self, function: Callable[..., None], *values: object) -> None:
        self._told_in_order.append((function, values))
        self.world.loop.call_soon(self._pump, context=self.process.context)

    def _pump(self) -> None:
        function, values = self._told_in_order.pop(0)
        function(*values)

    # A turn.

    def _step(self) -> None:
        self._step_at = None
        if self._blocked or self.closed.done():
            return
        if self._closing.is_set():
            self._leave()
            return
        now = CLOCK.now
        self._serve(self._kafka)
        self.commits.send(self._kafka, self._owned, now, at_once=False)
        self._look_around(self._kafka, now)
        room = self._has_room(self._kafka, now)
        if room:
            self._fetched = self._kafka.consume()
            while self.events and not self._blocked:
                self._handle(*self.events.pop(0))
        if not self._blocked:
            self._hand_over()
        if not room:
            self.wake(FULL_WAIT * 4)
        elif self._kafka.fetchable():
            self.wake()
        else:
            self.wake(INTERVAL if self.commits._waiting else IDLE)

    def _hand_over(self) -> None:
        """Deliver what was fetched, perhaps before a rebalance."""
        fetched, self._fetched = self._fetched, []
        self._deliver(self._kafka, fetched)

    def _handle(self, what: str, partitions: list[TopicPartition]) -> None:
        """Meet a rebalance, as in the callbacks."""
        self.world.log(what, self.process.name, [p.partition for p in partitions or self._owned])
        if what == "assign":
            for partition in partitions:
                self.process.given_back.pop(partition, None)
            self._on_assign(self._kafka, _theirs(partitions))
        elif what == "revoke":
            self._revoke([partition for partition in partitions if partition in self._owned], self.wake)
        else:
            self.expelled = False
            if self._owned:
                self._on_lost(self._kafka, _theirs(sorted(self._owned)))
            self.send(self.world.broker.join, self)

    def _revoke(self, ours: list[TopicPartition], then: Callable[[], None]) -> None:
        """Run `_on_revoke` when the loop has answered what it waits for, or too late; `then` goes on."""
        self._blocked = True
        self._live.difference_update(ours)
        until = CLOCK.now + REVOKE_TIMEOUT

        def begin() -> None:
            task = asyncio.ensure_future(self._listener.revoked(ours, until))
            task.add_done_callback(end)

        def end(task: asyncio.Task[None] | None) -> None:
            if task is not None:
                task.result()
                self.world.on_revoked(self.process, ours, in_time=until > CLOCK.now)
            if timer in ended:
                return
            ended.append(timer)
            timer.cancel()
            self._blocked = False
            listener, self._listener = self._listener, _Answered(self._listener, in_time=task is not None)
            self._on_revoke(self._kafka, _theirs(ours))
            self._listener = listener
            self.send(self.world.broker.given_up, self, ours)
            self._hand_over()
            then()

        ended: list[asyncio.TimerHandle] = []
        timer = self.world.loop.call_later(REVOKE_TIMEOUT + 1, end, None, context=self.process.context)
        self._tell(begin)

    def _leave(self) -> None:
        """Send the last commits, wait a little for their answers, and leave: `_finish` and `close`."""
        if self._finish_until is None:
            self._pause_all(self._kafka)
            self._finish_until = CLOCK.now + FINISH
        self.commits.send(self._kafka, self._owned, CLOCK.now, at_once=True)
        if not self.commits.all_answered() and CLOCK.now < self._finish_until:
            self.wake(IDLE_WAIT)
        elif self._owned:
            self._revoke(sorted(self._owned), self._left)
        else:
            self._left()

    def _left(self) -> None:
        self.send(self.world.broker.leave, self)
        self._tell(self._close_future)


class _Answered:
    """A listener whose answer to a revoke is there, or is not in time: `_on_revoke` need not wait."""

    def __init__(self, listener: Any, *, in_time: bool) -> None:  # noqa: ANN401
        self._listener = listener
        self._in_time = in_time

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._listener, name)

    def revoked(self, *_: object) -> _Answered:
        """Return what stands for the future."""
        return self

    def result(self, *_: object) -> None:
        """Raise if the answer is not there."""
        if not self._in_time:
            raise TimeoutError


class _Commits(Commits):
    """Commits that wake the thread, which does not look for them every few milliseconds."""

    def __init__(self, tell: Callable[..., None], wake: Callable[[float], None]) -> None:
        super().__init__(tell)
        self._wake = wake

    def leave(self, commits: Iterable[Commit]) -> None:
        """Leave offsets to be committed soon."""
        super().leave(commits)
        self._wake(INTERVAL)

    def promise(self, commits: Sequence[Commit]) -> list[asyncio.Future[None]]:
        """Commit offsets now."""
        self._wake(IDLE_WAIT)
        return super().promise(commits)


def _index(log: list[Message], position: int) -> int:
    """Return where in a log the first message at or after an offset is."""
    index = min(position, len(log))
    while index and log[index - 1].at >= position:
        index -= 1
    return index


def _ours(partitions: list[ck.TopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(p.topic, p.partition) for p in partitions]


def _theirs(partitions: list[TopicPartition]) -> list[ck.TopicPartition]:
    return [ck.TopicPartition(*partition) for partition in partitions]
