"""The thread that owns a handler's Consumer: nobody else ever calls it.

It consumes, groups by partition, has the messages packed as rows while they are in its core's cache, hands chunks to
the event loop, and runs what the loop asks for (start a partition, look at offsets) from a queue between two calls.
Commits are not asked for one by one: the loop leaves the newest for each partition, and the thread sends them now and
then.

Callbacks of librdkafka run inside `consume()` on this thread and never raise: an exception there destroys messages
that were fetched already. A revoke is the one thing that waits for the loop: the batches in flight are settled before
the partitions go.

Backpressure: at the bound the thread first stops consuming, so librdkafka's own queue (a part of the bound) fills and
its fetcher stops; `pause()` would throw that queue away. Only when the bound is held for long are the partitions
paused, because then the thread must poll again to stay in its group.

Over 400 lines, because one thread owns one Consumer and everything that it may do with it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import confluent_kafka as ck
import orjson
from confluent_kafka import KafkaError, KafkaException

from consumerd import brokers
from consumerd.accumulator import MESSAGE_OVERHEAD, Bounds, size_of
from consumerd.commits import Commits
from consumerd.errors import ConsumerdError, Halt, Outage
from consumerd.packed import Packed
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from consumerd.brokers import Found

log = logging.getLogger(__name__)
T = TypeVar("T")

CONSUME_MESSAGES = 1000
"""Messages of one `consume()`, at most: a millisecond of holding the interpreter lock, packing included."""
CONSUME_BYTES = 1024 * 1024
"""Bytes of one `consume()`, as its first message lets expect: all that librdkafka holds, and as much again that it then
fetches, would be too much."""
PACKED_AT_ONCE = 4096
"""Mean bytes of messages up to which they are packed when they come. Larger ones gain nothing by it, for no cache holds
a thousand of them, and would be in memory twice for as long as they wait."""
IDLE_WAIT = 0.05
"""Seconds that an idle `consume()` waits; what the loop asks for waits as long."""
LINGER = 0.005
"""Seconds to gather more once a message came: without it, 10,000 messages/s would be 10,000 wake-ups/s."""
FULL_WAIT = 0.005
"""Seconds to look again whether there is room."""
PAUSE_AFTER = 1.0
"""Seconds at the bound after which partitions are paused."""
RESUME_BELOW = 0.5
"""Share of the bound below which they go on; pausing threw the prefetch away, so not at once."""
REVOKE_TIMEOUT = 5.0
"""Seconds that a revoke waits for the batches in flight."""
WATERMARK_INTERVAL = 1.0
LOOK_TIMEOUT = 1.0
"""Seconds that the thread gives a broker to answer what is only looked at."""
UNKNOWN = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}  # noqa: SLF001
"""A broker that starts says so of topics that are there; `Topics.watch` sees those that are gone."""
DAMAGED = {KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError._NOT_IMPLEMENTED}  # noqa: SLF001
"""What follows one of these in a partition is not to be trusted."""
SESSION_TIMEOUT_MS = 45_000
"""librdkafka's default of session.timeout.ms."""
REJOIN_AFTER = 0.25
"""Share of a session without any broker after which a new join is asked for: the last heartbeat is some seconds older,
and a broker that restarts quickly need not be joined anew."""
NO_TOPIC = "consumerd:rejoin"
"""No topic can have this name (Kafka knows no colon in one)."""
_READ = "grant this principal READ on the topic and on the group"
FOR_GOOD = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: _READ,
    KafkaError.GROUP_AUTHORIZATION_FAILED: _READ,
    KafkaError.INVALID_SESSION_TIMEOUT: 'correct "session.timeout.ms" under [kafka.properties]: brokers allow from '
    "group.min.session.timeout.ms (6000 by default) to group.max.session.timeout.ms",
}
"""What brokers answer to every try, with the way on."""
FENCED = [KafkaError(code).str() for code in (KafkaError.FENCED_INSTANCE_ID, KafkaError.UNRELEASED_INSTANCE_ID)]
"""What a fatal error says when another consumer has this one's `group.instance.id`. It need not be another process: a
coordinator that was restarted has fenced the very member that it knew before (seen)."""
UNSUPPORTED = [
    KafkaError(code).str()
    for code in (KafkaError.UNSUPPORTED_VERSION, KafkaError.UNSUPPORTED_ASSIGNOR, KafkaError._UNSUPPORTED_FEATURE)  # noqa: SLF001
]
"""What a fatal error says that is the same the next time."""
REJOIN_PAUSE = 1.0
"""Seconds after a consumer's fatal error until the next joins; doubled each time, for two processes that have one name
take the partitions from each other."""
MAX_REJOIN_PAUSE = 60.0
LONG_MEMBERSHIP = 300.0
"""Seconds of a consumer's life after which the errors before it are forgotten."""
FINISH_TIMEOUT = 5.0
"""Seconds for the acknowledgement of the last commits."""
SEEK_TIMEOUT = 5.0
FIND_PARTITIONS = 20
"""Partitions to ask brokers about at a time: each is a question of its own, and in between the thread polls."""
STATISTICS_INTERVAL_MS = 2000
"""Milliseconds between two looks at librdkafka's statistics, where nothing else tells of an empty assignment."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one `consume()` brought for one partition; `size` is `size_of` the messages, `packed` their rows."""

    partition: TopicPartition
    messages: list[Any]
    size: int
    packed: Packed


class Listener(Protocol):
    """What the thread tells the loop; all but `fill` and `pack` are called on the loop."""

    def fill(self, in_transit: int) -> float:
        """Return the share of the buffer that is used, given bytes on their way to it; called on the thread."""

    def pack(self, partition: TopicPartition, messages: list[Any]) -> Packed:
        """Return what messages of a partition are as rows; called on the thread, in whose cache they are."""

    def started(self, partition: TopicPartition, offset: int) -> None:
        """Take note that what is received of a partition from now on begins at an offset."""

    def received(self, chunks: list[Chunk]) -> None:
        """Take messages of partitions that were started."""

    def assigned(self, partitions: list[TopicPartition]) -> None:
        """Take note of partitions that came, paused."""

    async def revoked(self, partitions: list[TopicPartition], deadline: float) -> None:
        """Settle what is in flight of partitions that go; the thread waits for it."""

    def lost(self, partitions: list[TopicPartition], why: str) -> None:
        """Take note of partitions that are another's already."""

    def watermarks(self, high: dict[TopicPartition, int]) -> None:
        """Take note of high watermarks."""

    def positions(self, positions: dict[TopicPartition, int]) -> None:
        """Take note of positions: what lies below one was told of before, or holds no message."""

    def reachable(self, sentence: str | None) -> None:
        """Take note that no broker answers, or, with None, that one does again."""

    def reached_gap(self, partition: TopicPartition, halt: Halt) -> None:
        """Take note that what follows the messages told so far is gone from the log."""

    def failed(self, error: ConsumerdError) -> None:
        """Take note of what ends the handler."""


class ConsumerThread(threading.Thread):
    """One member of one consumer group."""

    def __init__(
        self, config: dict[str, Any], topics: Sequence[str], listener: Listener, name: str, batch: Bounds
    ) -> None:
        super().__init__(name=f"kafka-{name}", daemon=True)
        # No chunk is more than half of a batch: it is not cut, which would cost its packed rows.
        self._most_messages = min(CONSUME_MESSAGES, max(1, batch.max_messages // 2))
        self._most_bytes = min(CONSUME_BYTES, batch.max_bytes // 2)
        self._config = config
        self._topics = list(topics)
        self._only = _only(topics)
        """The one topic that there can be messages of: they need not be asked for theirs."""
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self.commits = Commits(self._tell)
        """Offsets for the thread to commit."""
        self._requests: queue.SimpleQueue[tuple[Callable[[ck.Consumer], Any], asyncio.Future[Any]]] = (
            queue.SimpleQueue()
        )
        strategy = str(config.get("partition.assignment.strategy", "cooperative-sticky"))
        self._incremental = "cooperative" in strategy
        self._stopping, self._closing = threading.Event(), threading.Event()
        self.closed = self._loop.create_future()
        # Only this thread touches these; `paused` looks at their sizes.
        self._owned: set[TopicPartition] = set()
        self._live: set[TopicPartition] = set()
        self._paused = False
        self._full_since: float | None = None
        self._told = 0
        self._unreachable_since: float | None = None
        self._rejoining = False
        self._spare = False
        self._over = False
        """Whether the consumer had a fatal error: it is of no use any more."""
        self._since = 0.0
        """When the consumer was made."""
        self._rejoin_pause = REJOIN_PAUSE
        self._next_watermarks = 0.0
        self._looked = 0
        self._turned = time.monotonic()
        """When it began its last turn; the loop reads it."""
        # Only the loop touches this; the thread reads it.
        self._heard = 0

    # What the loop calls.

    @property
    def paused(self) -> int:
        """How many of the member's partitions are not read just now: at the bound all, else those not started yet."""
        return max(0, len(self._owned) - (0 if self._paused else len(self._live)))

    async def found(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Found]:
        """Ask the brokers for the bounds and the committed offsets of partitions; raises Outage."""
        found: dict[TopicPartition, Found] = {}
        for first in range(0, len(partitions), FIND_PARTITIONS):
            some = partitions[first : first + FIND_PARTITIONS]
            found |= await self._ask(lambda consumer, some=some: brokers.find(consumer, some))  # type: ignore[misc]
        self._listener.watermarks({partition: it.bounds[1] for partition, it in found.items() if it.bounds})
        return found

    async def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        """Return the first offset at or after a time; the log's end if there is none."""
        return await self._ask(lambda consumer: brokers.offset_at(consumer, partition, timestamp_ms))

    async def start_at(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver messages of assigned partitions from these offsets on; those gone meanwhile are passed over."""
        await self._ask(lambda consumer: self._start_at(consumer, offsets))

    async def hold(self, partitions: Sequence[TopicPartition]) -> None:
        """Deliver nothing of partitions until they are started again."""
        await self._ask(lambda consumer: self._hold(consumer, partitions))

    async def subscribe(self, topics: Sequence[str]) -> None:
        """Read these topics from now on: those of before, and others that have appeared."""
        await self._ask(lambda consumer: self._subscribe_to(consumer, topics))

    async def join_anew(self) -> None:
        """Have the group's partitions divided anew: this member's own are revoked, and come back, for that."""
        await self._ask(self._join_anew)

    async def stop_delivery(self) -> None:
        """Deliver no more messages; callbacks are served on. Raises Outage when there is no consumer just now."""
        self._stopping.set()
        await self._ask(self._pause_all)

    def stuck_for(self, now: float) -> float:
        """Return the seconds since it began its last turn: many, where it hangs. One that closes is not to turn."""
        return 0.0 if self._closing.is_set() else now - self._turned

    async def close(self) -> None:
        """Commit what is left, leave the group, and wait for the thread's end."""
        self._closing.set()
        self._stopping.set()
        await asyncio.shield(self.closed)

    async def _ask(self, function: Callable[[ck.Consumer], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._requests.put((function, future))
        done, _ = await asyncio.wait([future, self.closed], return_when=asyncio.FIRST_COMPLETED)
        if future not in done:
            raise Outage("kafka", "the consumer was closed")
        return future.result()

    # The thread.

    def run(self) -> None:
        """Be a member of the group until closed; anything unforeseen halts the handler."""
        try:
            while not self._closing.is_set():
                self._be_a_member()
                if self._over:
                    self._pause_before_the_next()
        finally:
            self._tell(self._close_future)

    def _be_a_member(self) -> None:
        """Consume until closed, or until a fatal error."""
        callbacks: dict[str, Any] = {"error_cb": self._on_error, "on_commit": self.commits.on_answer}
        if self._config.get("group.protocol") == "consumer":
            callbacks |= {"stats_cb": self._on_statistics, "statistics.interval.ms": STATISTICS_INTERVAL_MS}
        try:
            consumer = ck.Consumer({**self._config, **callbacks})
        except KafkaException as error:
            self._fail(brokers.refused(error))
            return
        self._since = time.monotonic()
        try:
            self._subscribe(consumer, self._topics)
            while not self._closing.is_set() and not self._over:
                self._turn(consumer)
            if not self._over:
                self._finish(consumer)
                self._say_goodbye(consumer)
        except ConsumerdError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the root of the thread
            # Frames and classes alone: texts of exceptions hold values of rows.
            frames = "".join(traceback.format_tb(error.__traceback__))
            extra = {"error": type(error).__qualname__, "frames": frames}
            log.error("the Kafka thread failed", extra=extra)  # noqa: TRY400
            said = f": {_text(error)}" if isinstance(error, KafkaException) else ""
            self._fail(Halt("bug", f"the Kafka thread failed: {type(error).__name__}{said}"))
        finally:
            consumer.close()

    def _fail(self, error: ConsumerdError) -> None:
        """End the thread; it is told before the consumer is closed, whose revoke waits for the loop."""
        self._closing.set()
        self._tell(self._listener.failed, error)

    def _pause_before_the_next(self) -> None:
        """Wait a while until another consumer joins; a stop ends that, for there is nothing to stop."""
        pause = REJOIN_PAUSE if time.monotonic() - self._since > LONG_MEMBERSHIP else self._rejoin_pause
        self._turned = time.monotonic() + pause
        if self._stopping.wait(pause):
            self._closing.set()
        self._rejoin_pause = min(pause * 2, MAX_REJOIN_PAUSE)
        self._over, self._paused, self._full_since = False, False, None
        self._rejoining, self._spare = False, False

    def _subscribe(self, consumer: ck.Consumer, topics: list[str]) -> None:
        consumer.subscribe(topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _subscribe_to(self, consumer: ck.Consumer, topics: Sequence[str]) -> None:
        self._topics, self._only = list(topics), _only(topics)
        self._subscribe(consumer, self._topics)

    def _turn(self, consumer: ck.Consumer) -> None:
        """One turn: what was asked for, commits, and what there is to consume."""
        self._serve(consumer)
        now = self._turned = time.monotonic()
        self.commits.send(consumer, self._owned, now, at_once=False)
        self._look_around(consumer, now)
        if self._has_room(consumer, now):
            messages = consumer.consume(1, IDLE_WAIT)
            if messages and (more := min(self._most_messages, self._most_bytes // _memory(messages)) - 1) > 0:
                messages += consumer.consume(more, LINGER)
            self._deliver(consumer, messages)
        else:
            time.sleep(FULL_WAIT)

    def _has_room(self, consumer: ck.Consumer, now: float) -> bool:
        """Whether to consume: always while paused, when only events come."""
        fill = self._listener.fill(self._told - self._heard)
        if fill < 1:
            self._full_since = None
            if self._paused and fill < RESUME_BELOW:
                self._paused = False
                consumer.resume(brokers.positions(self._live))
            return True
        self._full_since = self._full_since or now
        if not self._paused and now - self._full_since > PAUSE_AFTER:
            self._paused = True
            consumer.pause(brokers.positions(self._live))
        return self._paused

    def _deliver(self, consumer: ck.Consumer, messages: list[ck.Message]) -> None:
        """Hand messages to the loop, grouped by partition; those of partitions that are not ours are dropped."""
        grouped: defaultdict[tuple[str, int] | int, list[ck.Message]] = defaultdict(list)
        events = []
        for message in messages:
            if message.error() is not None:
                events.append(message)
            elif self._only:
                grouped[message.partition()].append(message)  # type: ignore[index]
            else:
                grouped[message.topic(), message.partition()].append(message)  # type: ignore[index]
        chunks = [
            self._chunk(partition, group)
            for key, group in grouped.items()
            if (partition := TopicPartition(self._only, key) if isinstance(key, int) else TopicPartition(*key))
            in self._live
        ]
        if chunks:
            size = sum(chunk.size + chunk.packed.memory + MESSAGE_OVERHEAD * len(chunk.messages) for chunk in chunks)
            self._told += size
            self._tell(self._received, chunks, size)
        for event in events:  # after the messages: what is said of a gap is said of what follows them
            self._on_event(consumer, event)

    def _chunk(self, partition: TopicPartition, messages: list[ck.Message]) -> Chunk:
        size = size_of(messages)  # type: ignore[arg-type]
        small = size <= PACKED_AT_ONCE * len(messages)
        packed = self._listener.pack(partition, messages) if small else Packed(messages=len(messages))
        return Chunk(partition, messages, size, packed)

    def _received(self, chunks: list[Chunk], size: int) -> None:
        self._listener.received(chunks)
        self._heard += size

    def _serve(self, consumer: ck.Consumer) -> None:
        """Run what the loop asked for."""
        while True:
            try:
                function, future = self._requests.get_nowait()
            except queue.Empty:
                return
            try:
                result = function(consumer)
            except KafkaException as error:
                self._tell(_settle, future, None, Outage("kafka", f"Kafka: {_text(error)}"))
            except ConsumerdError as error:
                self._tell(_settle, future, None, error)
            else:
                self._tell(_settle, future, result, None)

    def _start_at(self, consumer: ck.Consumer, offsets: Mapping[TopicPartition, int]) -> None:
        for partition, offset in offsets.items():
            if partition not in self._owned:
                continue
            self._seek(consumer, partition, offset)
            self._live.add(partition)
            # In order with the messages: those told before this were fetched before the seek.
            self._tell(self._listener.started, partition, offset)
            if not self._paused:
                consumer.resume(brokers.positions([partition]))

    def _seek(self, consumer: ck.Consumer, partition: TopicPartition, offset: int) -> None:
        """Seek; an assignment takes a moment to reach librdkafka's own threads, and seeking fails until then."""
        deadline = time.monotonic() + SEEK_TIMEOUT
        while True:
            try:
                consumer.seek(ck.TopicPartition(*partition, offset))
            except KafkaException as error:
                if error.args[0].code() != KafkaError._STATE or time.monotonic() > deadline:  # noqa: SLF001
                    raise
                time.sleep(FULL_WAIT)
            else:
                return

    def _hold(self, consumer: ck.Consumer, partitions: Sequence[TopicPartition]) -> None:
        ours = [partition for partition in partitions if partition in self._owned]
        self._live.difference_update(ours)
        if ours:
            consumer.pause(brokers.positions(ours))

    def _finish(self, consumer: ck.Consumer) -> None:
        """Send the last commits and wait a little for their acknowledgement, while the callbacks still come."""
        deadline = time.monotonic() + FINISH_TIMEOUT
        self._pause_all(consumer)
        while time.monotonic() < deadline:
            self.commits.send(consumer, self._owned, time.monotonic(), at_once=True)
            if self.commits.all_answered():
                return
            consumer.consume(1, IDLE_WAIT)

    def _say_goodbye(self, consumer: ck.Consumer) -> None:
        """Say to the group that a member without a partition goes.

        `close()` says so of one that has some; of one that has none the group learns when its session times out, and a
        rebalance that is under way waits as long (seen).
        """
        if not self._owned and self._incremental and not self._has_own_id():
            consumer.unsubscribe()

    def _pause_all(self, consumer: ck.Consumer) -> None:
        self._live.clear()
        if self._owned:
            consumer.pause(brokers.positions(self._owned))

    # Callbacks: on this thread, inside consume() and close(). None may raise.

    def _on_assign(self, consumer: ck.Consumer, partitions: list[ck.TopicPartition]) -> None:
        """Take partitions, paused: the checkpoint decides where they start, and reading it takes the loop."""
        try:
            positions = [ck.TopicPartition(p.topic, p.partition, ck.OFFSET_BEGINNING) for p in partitions]
            if self._incremental:
                consumer.incremental_assign(positions)
            else:
                consumer.assign(positions)
            if positions:
                consumer.pause(positions)
            ours = _ours(partitions)
            self._owned.update(ours)
            self._tell(self._listener.assigned, ours)
        except Exception as error:  # noqa: BLE001 - recorded; the loop raises it
            self._tell(self._listener.failed, Halt("kafka", f"assignment failed: {error}"))

    def _on_revoke(self, consumer: ck.Consumer, partitions: list[ck.TopicPartition]) -> None:
        """Give partitions back once their batches in flight are settled; commit them without waiting for it."""
        try:
            ours = _ours(partitions)
            self._live.difference_update(ours)
            revoked = self._listener.revoked(ours, time.monotonic() + REVOKE_TIMEOUT)
            done = asyncio.run_coroutine_threadsafe(revoked, self._loop)
            try:
                done.result(REVOKE_TIMEOUT + 1)
            except TimeoutError:
                log.warning("a revoke was not settled in time", extra={"partitions": _names(ours)})
            self.commits.send(consumer, self._owned, time.monotonic(), at_once=True)
            self._owned.difference_update(ours)
            self.commits.forget(ours)
            if self._incremental:
                consumer.incremental_unassign(partitions)
            else:
                consumer.unassign()
        except Exception as error:  # noqa: BLE001 - recorded; the loop raises it
            self._tell(self._listener.failed, Halt("kafka", f"revoke failed: {error}"))

    def _on_lost(self, consumer: ck.Consumer, partitions: list[ck.TopicPartition]) -> None:
        """Partitions are another's already: commit nothing. What is still being written is fenced."""
        try:
            self._lose(_ours(partitions), "its heartbeats did not come in time, or it did not poll")
            if self._incremental:
                consumer.incremental_unassign(partitions)
            else:
                consumer.unassign()
        except Exception as error:  # noqa: BLE001 - recorded; the loop raises it
            self._tell(self._listener.failed, Halt("kafka", f"losing partitions failed: {error}"))

    def _lose(self, partitions: list[TopicPartition], why: str) -> None:
        self._live.difference_update(partitions)
        self._owned.difference_update(partitions)
        self.commits.forget(partitions)
        self._tell(self._listener.lost, partitions, why)

    def _on_statistics(self, text: str) -> None:
        """Learn that this member is in its group without a partition: the consumer protocol calls back for none (seen).

        Nor does its join state tell (it stays "init"); a coordinator that was there for a while has let it in.
        """
        group = orjson.loads(text).get("cgrp", {})
        spare = not self._owned and group.get("state") == "up" and group.get("stateage", 0) > STATISTICS_INTERVAL_MS
        if spare and not self._spare:
            self._tell(self._listener.assigned, [])
        self._spare = spare

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in {KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION, KafkaError._SSL}:  # noqa: SLF001
            self._unreachable_since = self._unreachable_since or time.monotonic()
            self._tell(self._listener.reachable, f"Kafka: {error.str()}")

    def _on_event(self, consumer: ck.Consumer, message: ck.Message) -> None:
        """Deal with an error that came in a message's place."""
        error = message.error()
        code = error.code() if error else None
        where = f"{message.topic()}:{message.partition()}"
        if code == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001
            partition = TopicPartition(str(message.topic()), int(message.partition() or 0))
            if partition in self._live:
                group, bootstrap = self._config["group.id"], self._config["bootstrap.servers"]
                halt = brokers.gap_of(consumer, partition, message.offset(), group, bootstrap)
                self._tell(self._listener.reached_gap, partition, halt)
        elif code in DAMAGED:
            self._stop_at_damage(consumer, message)
        elif error is not None and code in FOR_GOOD:
            what = f"group {self._config['group.id']}" if message.topic() is None else where
            self._tell(self._listener.failed, Halt("kafka", f"{what}: {error.str()}: {FOR_GOOD[error.code()]}"))
        elif error is not None and code == KafkaError._FATAL:  # noqa: SLF001
            self._on_fatal(error.str())
        elif code not in UNKNOWN:
            log.warning("the consumer reports an error", extra={"error": str(error)})

    def _on_fatal(self, text: str) -> None:
        """Give everything up; another consumer joins in this one's place."""
        if any(never in text for never in UNSUPPORTED):
            raise Halt("kafka", f"the brokers do not support what [kafka.properties] asks for ({text}): change that")
        why = text
        if any(fenced in text for fenced in FENCED):
            name = self._config.get("group.instance.id")
            why = f"another member has group_instance_id {name!r}; no two processes may have the same one"
        self._over = True
        self._lose(sorted(self._owned), why)

    def _stop_at_damage(self, consumer: ck.Consumer, message: ck.Message) -> None:
        """Deliver nothing that follows: librdkafka goes on from wherever it takes the next batch to be (seen)."""
        partition = TopicPartition(str(message.topic()), int(message.partition() or 0))
        if partition in self._live:
            self._live.discard(partition)
            consumer.pause(brokers.positions([partition]))
            sentence = (
                f"{partition}: what the broker sends at offset {message.offset()} is damaged ({message.error()}); "
                f"nothing was skipped; a restart helps if it was the network; else mend that replica of the partition"
            )
            self._tell(self._listener.reached_gap, partition, Halt("kafka", sentence))

    # Looking around.

    def _look_around(self, consumer: ck.Consumer, now: float) -> None:
        """Tell the loop the high watermarks, and whether a broker that was gone answers again."""
        if now < self._next_watermarks:
            return
        self._next_watermarks = now + WATERMARK_INTERVAL
        if self._unreachable_since is not None:
            try:
                consumer.list_topics(self._topics[0], timeout=WATERMARK_INTERVAL)
            except KafkaException:
                self._keep_membership(consumer, now - self._unreachable_since)
                return
            self._unreachable_since, self._rejoining = None, False
            self._tell(self._listener.reachable, None)
        high = {}
        if self._paused and self._live:  # what is paused is not fetched, and its cached watermark stands still
            self._looked += 1
            partition = sorted(self._live)[self._looked % len(self._live)]
            with suppress(KafkaException):
                consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=LOOK_TIMEOUT)
        for partition in self._live:
            bounds = consumer.get_watermark_offsets(ck.TopicPartition(*partition), cached=True)
            if bounds[1] >= 0:
                high[partition] = bounds[1]
        self._tell(self._listener.watermarks, high)
        at = consumer.position(brokers.positions(self._live)) if self._live else []
        self._tell(self._listener.positions, {TopicPartition(p.topic, p.partition): p.offset for p in at})

    def _keep_membership(self, consumer: ck.Consumer, away: float) -> None:
        """Ask to join the group anew before the session times out; the member then keeps its id.

        When its session times out librdkafka forgets the id and joins as another member, but a broker that was away
        begins to count the session of the one that it knows when it is back, and lets nobody in before that has run out
        (45 s). A member that is about to join has no session to lose, and keeps its id. What makes it join is a change
        of its subscription. Static members, and those of the consumer protocol, have an id of their own.
        """
        session = int(self._config.get("session.timeout.ms", SESSION_TIMEOUT_MS)) / 1000
        if self._rejoining or self._has_own_id() or not self._incremental or away < session * REJOIN_AFTER:
            return
        self._rejoining = True
        self._join_anew(consumer)

    def _has_own_id(self) -> bool:
        return "group.instance.id" in self._config or self._config.get("group.protocol") == "consumer"

    def _join_anew(self, consumer: ck.Consumer) -> None:
        self._subscribe(consumer, [NO_TOPIC])
        self._subscribe(consumer, self._topics)  # librdkafka keeps it until the revoke that comes of the first is done

    def _tell(self, function: Callable[..., None], *values: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:
            log.debug("the event loop is closed")

    def _close_future(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def _only(topics: Sequence[str]) -> str:
    """Return the one topic that there is; nothing if there are others."""
    return topics[0] if len(topics) == 1 and not topics[0].startswith("^") else ""


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    """Settle a future unless its owner has given up on it."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _memory(messages: list[ck.Message]) -> int:
    """Return the bytes that messages take when they are held, as the accumulator counts them."""
    return size_of(messages) + MESSAGE_OVERHEAD * len(messages)  # type: ignore[arg-type]


def _ours(partitions: Iterable[ck.TopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(p.topic, p.partition) for p in partitions]


def _names(partitions: Iterable[TopicPartition]) -> str:
    return " ".join(map(str, partitions))


def _text(error: KafkaException) -> str:
    cause = error.args[0] if error.args else error
    return cause.str() if isinstance(cause, KafkaError) else str(cause)
