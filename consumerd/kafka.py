"""The thread that owns a handler's Consumer: nobody else ever calls it.

It consumes, groups by partition, hands chunks to the event loop, and runs what the loop asks for (start a partition,
look at offsets) from a queue between two calls. Commits are not asked for one by one: the loop leaves the newest for
each partition, and the thread sends them now and then.

Callbacks of librdkafka run inside `consume()` on this thread and never raise: an exception there destroys messages
that were fetched already. A revoke is the one thing that waits for the loop: the batches in flight are settled before
the partitions go.

Backpressure: at the bound the thread first stops consuming, so librdkafka's own queue (a part of the bound) fills and
its fetcher stops; `pause()` would throw that queue away. Only when the bound is held for long are the partitions
paused, because then the thread must poll again to stay in its group.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import confluent_kafka as ck
from confluent_kafka import KafkaError, KafkaException

from consumerd.accumulator import size_of
from consumerd.errors import ConsumerdError, Halt, Outage
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from consumerd.config import KafkaConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

CONSUME_MESSAGES = 1000
"""Messages of one `consume()`: 300 microseconds of holding the interpreter lock."""
IDLE_WAIT = 0.05
"""Seconds that an idle `consume()` waits; what the loop asks for waits as long."""
LINGER = 0.005
"""Seconds to gather more once a message came: without it, 10,000 messages/s would be 10,000 wake-ups/s."""
COMMIT_INTERVAL = 0.5
"""Seconds between commits to Kafka: they only inform, the checkpoint is in Postgres."""
COMMIT_TIMEOUT = 10.0
"""Seconds after which a commit that was not acknowledged is sent again."""
FULL_WAIT = 0.005
"""Seconds to look again whether there is room."""
PAUSE_AFTER = 1.0
"""Seconds at the bound after which partitions are paused."""
RESUME_BELOW = 0.5
"""Share of the bound below which they go on; pausing threw the prefetch away, so not at once."""
REVOKE_TIMEOUT = 5.0
"""Seconds that a revoke waits for the batches in flight."""
WATERMARK_INTERVAL = 1.0
CALL_TIMEOUT = 5.0
"""Seconds for one call that asks a broker."""
MAX_PARTITION_QUEUE = 16 * 1024 * 1024
MIN_PARTITION_QUEUE = 256 * 1024
MAX_FETCH = 50 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one `consume()` brought for one partition; `size` is the bytes of the values."""

    partition: TopicPartition
    messages: list[Any]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """An offset to commit, with its stamp."""

    partition: TopicPartition
    offset: int
    leader_epoch: int | None
    metadata: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a broker says of a partition: its log's bounds, and the group's committed offset (None: none)."""

    low: int
    high: int
    committed: int | None
    metadata: str | None


class Listener(Protocol):
    """What the thread tells the loop; all but `memory` are called on the loop."""

    def memory(self) -> int:
        """Return the bytes held in the loop; called on the thread."""

    def received(self, chunks: list[Chunk]) -> None: ...
    def assigned(self, partitions: list[TopicPartition]) -> None: ...
    async def revoked(self, partitions: list[TopicPartition], deadline: float) -> None: ...
    def lost(self, partitions: list[TopicPartition]) -> None: ...
    def watermarks(self, high: dict[TopicPartition, int]) -> None: ...
    def reachable(self, sentence: str | None) -> None: ...
    def failed(self, error: ConsumerdError) -> None: ...


def client_config(kafka: KafkaConfig) -> dict[str, Any]:
    """Return librdkafka's properties for any client of ours, secrets read afresh."""
    properties = {
        name: value if isinstance(value, (str, int, float, bool)) else value.read()
        for name, value in kafka.properties.items()
    }
    return {"bootstrap.servers": kafka.bootstrap_servers, "log_level": 2, **properties}


def consumer_config(kafka: KafkaConfig, group_id: str, memory: int, partitions: int) -> dict[str, Any]:
    """Return the Consumer's properties; `memory` is the bytes that librdkafka's queues may hold."""
    per_partition = max(MIN_PARTITION_QUEUE, min(MAX_PARTITION_QUEUE, memory // max(partitions, 1)))
    config: dict[str, Any] = {
        "partition.assignment.strategy": "cooperative-sticky",
        # Once a queue is full librdkafka stops fetching that partition for this long; its default is a second.
        "fetch.queue.backoff.ms": 5,
        **client_config(kafka),
        "group.id": group_id,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # The start is decided by us; anything else would skip data without a word.
        "auto.offset.reset": "error",
        "check.crcs": True,
        "queued.min.messages": 100_000,
        "queued.max.messages.kbytes": per_partition // 1024,
        "fetch.message.max.bytes": min(per_partition, 1024 * 1024),
        "fetch.max.bytes": max(1024 * 1024, min(MAX_FETCH, memory // 2)),
    }
    if config.get("group.protocol") == "consumer":
        del config["partition.assignment.strategy"]
    if kafka.group_instance_id:
        config["group.instance.id"] = kafka.group_instance_id
    return config


class ConsumerThread(threading.Thread):
    """One member of one consumer group."""

    def __init__(
        self, config: dict[str, Any], topics: Sequence[str], bound: int, listener: Listener, name: str
    ) -> None:
        super().__init__(name=f"kafka-{name}", daemon=True)
        self._config = config
        self._topics = list(topics)
        self._bound = bound
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._requests: queue.SimpleQueue[tuple[Callable[[ck.Consumer], Any], asyncio.Future[Any]]] = queue.SimpleQueue()
        strategy = str(config.get("partition.assignment.strategy", "cooperative-sticky"))
        self._incremental = "cooperative" in strategy
        self._closing = threading.Event()
        self.closed = self._loop.create_future()
        # Only this thread touches these.
        self._owned: set[TopicPartition] = set()
        self._live: set[TopicPartition] = set()
        self._paused = False
        self._full_since: float | None = None
        self._told = 0
        self._commits_sent: dict[TopicPartition, Commit] = {}
        self._unreachable = False
        self._commit_sent: float | None = None
        self._next_commit = self._next_watermarks = 0.0
        # Only the loop touches this; the thread reads it.
        self._heard = 0
        # Shared, under the lock.
        self._lock = threading.Lock()
        self._urgent = False
        self._commits: dict[TopicPartition, Commit] = {}
        self._awaited: list[tuple[Commit, asyncio.Future[None]]] = []

    # What the loop calls.

    async def found(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Found]:
        """Ask the brokers for the bounds and the committed offsets of partitions; raises Outage."""
        return await self._ask(lambda consumer: _found(consumer, partitions))

    async def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        """Return the first offset at or after a time; the log's end if there is none."""
        return await self._ask(lambda consumer: _offset_at(consumer, partition, timestamp_ms))

    async def start_at(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Deliver messages of assigned partitions from these offsets on; those gone meanwhile are passed over."""
        await self._ask(lambda consumer: self._start_at(consumer, offsets))

    async def stop_delivery(self, partitions: Iterable[TopicPartition]) -> None:
        """Deliver no more messages of these partitions, until they are started again."""
        gone = set(partitions)
        await self._ask(lambda _: self._live.difference_update(gone))

    def commit(self, commits: Iterable[Commit]) -> None:
        """Leave offsets to be committed soon; newer ones replace older ones."""
        with self._lock:
            self._commits.update({commit.partition: commit for commit in commits})

    async def committed(self, commits: Sequence[Commit]) -> None:
        """Commit offsets now and wait until the broker has acknowledged each; the caller sets the deadline."""
        futures = [self._loop.create_future() for _ in commits]
        with self._lock:
            self._commits.update({commit.partition: commit for commit in commits})
            self._awaited += zip(commits, futures, strict=True)
            self._urgent = True
        await asyncio.gather(*futures)

    async def close(self) -> None:
        """Commit what is left, leave the group, and wait for the thread's end."""
        self._closing.set()
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
        """Consume until closed; anything unforeseen halts the handler."""
        try:
            consumer = ck.Consumer({**self._config, "error_cb": self._on_error, "on_commit": self._on_commit})
        except KafkaException as error:
            self._tell(self._listener.failed, Halt("kafka", f"librdkafka refuses [kafka.properties]: {_text(error)}"))
            self._tell(self._close_future)
            return
        try:
            consumer.subscribe(
                self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            while not self._closing.is_set():
                self._turn(consumer)
            self._finish(consumer)
        except ConsumerdError as error:
            self._tell(self._listener.failed, error)
        except Exception as error:  # noqa: BLE001 - the thread's root: its death must be known
            log.exception("the Kafka thread failed")
            self._tell(self._listener.failed, Halt("bug", f"the Kafka thread failed: {type(error).__name__}: {error}"))
        finally:
            try:
                consumer.close()
            finally:
                self._tell(self._close_future)

    def _turn(self, consumer: ck.Consumer) -> None:
        """One turn: what was asked for, commits, and what there is to consume."""
        self._serve(consumer)
        now = time.monotonic()
        self._send_commits(consumer, now)
        self._look_around(consumer, now)
        if self._has_room(consumer, now):
            messages = consumer.consume(1, IDLE_WAIT)
            if messages:
                messages += consumer.consume(CONSUME_MESSAGES - 1, LINGER)
            self._deliver(consumer, messages)
        else:
            time.sleep(FULL_WAIT)

    def _has_room(self, consumer: ck.Consumer, now: float) -> bool:
        """Whether to consume: always while paused, when only events come."""
        held = self._listener.memory() + self._told - self._heard
        if held < self._bound:
            self._full_since = None
            if self._paused and held < self._bound * RESUME_BELOW:
                self._paused = False
                consumer.resume(_positions(self._live))
            return True
        self._full_since = self._full_since or now
        if not self._paused and now - self._full_since > PAUSE_AFTER:
            self._paused = True
            consumer.pause(_positions(self._live))
        return self._paused

    def _deliver(self, consumer: ck.Consumer, messages: list[ck.Message]) -> None:
        """Hand messages to the loop, grouped by partition; those of partitions that are not ours are dropped."""
        grouped: defaultdict[tuple[str, int], list[ck.Message]] = defaultdict(list)
        for message in messages:
            if message.error() is None:
                grouped[message.topic(), message.partition()].append(message)  # type: ignore[index]
            else:
                self._on_event(consumer, message)
        chunks = [
            Chunk(partition, group, size_of(group))
            for key, group in grouped.items()
            if (partition := TopicPartition(*key)) in self._live
        ]
        if chunks:
            size = sum(chunk.size for chunk in chunks)
            self._told += size
            self._tell(self._received, chunks, size)

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
            if not self._paused:
                consumer.resume(_positions([partition]))

    def _seek(self, consumer: ck.Consumer, partition: TopicPartition, offset: int) -> None:
        """Seek; an assignment takes a moment to reach librdkafka's own threads, and seeking fails until then."""
        deadline = time.monotonic() + CALL_TIMEOUT
        while True:
            try:
                consumer.seek(ck.TopicPartition(*partition, offset))
            except KafkaException as error:
                if error.args[0].code() != KafkaError._STATE or time.monotonic() > deadline:  # noqa: SLF001
                    raise
                time.sleep(FULL_WAIT)
            else:
                return

    # Commits.

    def _send_commits(self, consumer: ck.Consumer, now: float, *, at_once: bool = False) -> None:
        """Send the offsets left by the loop, one request at a time; those of partitions not ours are dropped."""
        if self._commit_sent is not None and now - self._commit_sent < COMMIT_TIMEOUT and not at_once:
            return
        with self._lock:
            if not self._commits or (now < self._next_commit and not self._urgent and not at_once):
                return
            commits, self._commits, self._urgent = self._commits, {}, False
        self._commits_sent = {p: commit for p, commit in commits.items() if p in self._owned}
        if self._commits_sent:
            offsets = [
                ck.TopicPartition(*c.partition, c.offset, c.metadata, c.leader_epoch or -1)
                for c in self._commits_sent.values()
            ]
            consumer.commit(offsets=offsets, asynchronous=True)
            self._commit_sent, self._next_commit = now, now + COMMIT_INTERVAL

    def _on_commit(self, error: KafkaError | None, partitions: list[ck.TopicPartition]) -> None:
        """Settle those who wait for an acknowledgement; what failed is sent again unless it was replaced."""
        self._commit_sent = None
        failed = {TopicPartition(p.topic, p.partition): error or p.error for p in partitions if error or p.error}
        acknowledged = {(p.topic, p.partition, p.offset) for p in partitions} if not failed else set()
        if failed:
            reason = next(iter(failed.values()))
            log.warning("a commit to Kafka failed; the checkpoint stands", extra={"error": str(reason)})
        with self._lock:
            settled = [future for commit, future in self._awaited if (*commit.partition, commit.offset) in acknowledged]
            self._awaited = [entry for entry in self._awaited if entry[1] not in settled]
            for partition in failed:
                if partition in self._commits_sent:
                    self._commits.setdefault(partition, self._commits_sent[partition])
        for future in settled:
            self._tell(_settle, future, None, None)

    def _finish(self, consumer: ck.Consumer) -> None:
        """Send the last commits and wait a little for their acknowledgement, while the callbacks still come."""
        deadline = time.monotonic() + CALL_TIMEOUT
        self._pause_all(consumer)
        while time.monotonic() < deadline:
            self._send_commits(consumer, time.monotonic())
            with self._lock:
                if not self._commits and self._commit_sent is None:
                    return
            self._next_commit = 0.0
            consumer.consume(1, IDLE_WAIT)

    def _pause_all(self, consumer: ck.Consumer) -> None:
        self._live.clear()
        if self._owned:
            consumer.pause(_positions(self._owned))

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
                log.error("a revoke was not settled in time", extra={"partitions": _names(ours)})
            self._send_commits(consumer, time.monotonic(), at_once=True)
            self._owned.difference_update(ours)
            if self._incremental:
                consumer.incremental_unassign(partitions)
            else:
                consumer.unassign()
        except Exception as error:  # noqa: BLE001 - recorded; the loop raises it
            self._tell(self._listener.failed, Halt("kafka", f"revoke failed: {error}"))

    def _on_lost(self, consumer: ck.Consumer, partitions: list[ck.TopicPartition]) -> None:
        """Partitions are another's already: commit nothing. What is still being written is fenced."""
        try:
            ours = _ours(partitions)
            self._live.difference_update(ours)
            self._owned.difference_update(ours)
            if self._incremental:
                consumer.incremental_unassign(partitions)
            else:
                consumer.unassign()
            self._tell(self._listener.lost, ours)
        except Exception as error:  # noqa: BLE001 - recorded; the loop raises it
            self._tell(self._listener.failed, Halt("kafka", f"losing partitions failed: {error}"))

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._tell(self._listener.failed, Halt("kafka", f"librdkafka gave up: {error.str()}"))
        elif error.code() in {KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION, KafkaError._SSL}:  # noqa: SLF001
            self._unreachable = True
            self._tell(self._listener.reachable, f"Kafka: {error.str()}")

    def _on_event(self, consumer: ck.Consumer, message: ck.Message) -> None:
        """An error that came in a message's place."""
        error = message.error()
        code = error.code() if error else None
        where = f"{message.topic()}:{message.partition()}"
        if code == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001
            partition = TopicPartition(str(message.topic()), int(message.partition() or 0))
            if partition in self._live:
                self._tell(self._listener.failed, _gap(consumer, partition, message.offset()))
        elif code in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}:  # noqa: SLF001
            self._tell(self._listener.failed, Halt("topic", f"topic {message.topic()} is gone from the broker"))
        elif code in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED}:
            sentence = f"{where}: {error}: grant this principal READ on the topic and on the group"
            self._tell(self._listener.failed, Halt("kafka", sentence))
        else:
            log.warning("the consumer reports an error", extra={"error": str(error)})

    # Looking around.

    def _look_around(self, consumer: ck.Consumer, now: float) -> None:
        """Tell the loop the high watermarks, and whether a broker that was gone answers again."""
        if now < self._next_watermarks:
            return
        self._next_watermarks = now + WATERMARK_INTERVAL
        if self._unreachable:
            try:
                consumer.list_topics(self._topics[0], timeout=WATERMARK_INTERVAL)
            except KafkaException:
                return
            self._unreachable = False
            self._tell(self._listener.reachable, None)
        high = {}
        for partition in self._live:
            bounds = consumer.get_watermark_offsets(ck.TopicPartition(*partition), cached=True)
            if bounds and bounds[1] >= 0:
                high[partition] = bounds[1]
        self._tell(self._listener.watermarks, high)

    def _tell(self, function: Callable[..., None], *values: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:
            log.debug("the event loop is closed")

    def _close_future(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    """Settle a future unless its owner has given up on it."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _found(consumer: ck.Consumer, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Found]:
    committed = consumer.committed(_positions(partitions), timeout=CALL_TIMEOUT)
    found = {}
    for entry in committed:
        if entry.error:
            raise Outage("kafka", f"Kafka: committed offset of {entry.topic}:{entry.partition}: {entry.error}")
        bounds = consumer.get_watermark_offsets(ck.TopicPartition(entry.topic, entry.partition), timeout=CALL_TIMEOUT)
        if bounds is None:
            raise Outage("kafka", f"Kafka: no answer for the offsets of {entry.topic}:{entry.partition}")
        offset = entry.offset if entry.offset >= 0 else None
        found[TopicPartition(entry.topic, entry.partition)] = Found(
            low=bounds[0], high=bounds[1], committed=offset, metadata=entry.metadata
        )
    return found


def _offset_at(consumer: ck.Consumer, partition: TopicPartition, timestamp_ms: int) -> int:
    (answer,) = consumer.offsets_for_times([ck.TopicPartition(*partition, timestamp_ms)], timeout=CALL_TIMEOUT)
    if answer.error:
        raise Outage("kafka", f"Kafka: offset of {partition} by time: {answer.error}")
    if answer.offset >= 0:
        return int(answer.offset)
    bounds = consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
    return int(bounds[1])


def _gap(consumer: ck.Consumer, partition: TopicPartition, offset: int | None) -> Halt:
    """Name what is missing of a partition whose position is outside its log."""
    try:
        low, high = consumer.get_watermark_offsets(ck.TopicPartition(*partition), timeout=CALL_TIMEOUT)
    except (KafkaException, TypeError):
        return Halt("gap", f"{partition}: the position is outside the log, and the log's bounds are not known")
    return gap(partition, offset if offset is not None and offset >= 0 else None, low, high)


def gap(partition: TopicPartition, position: int | None, low: int, high: int) -> Halt:
    """Return the halt of a partition whose position is not in its log, offsets [low, high)."""
    if position is not None and position < low:
        what = f"offsets {position}..{low - 1} are gone from the log (retention was faster than this handler)"
    else:
        what = f"the position {'' if position is None else f'{position} '}is not in the log, which holds {low}..{high}"
    return Halt(
        "gap",
        f"{partition}: {what}; nothing was skipped. To go on after the gap: kafka-consumer-groups --reset-offsets "
        f"--topic {partition} --to-offset {low} --execute for this handler's group, then restart",
    )


def _positions(partitions: Iterable[TopicPartition]) -> list[ck.TopicPartition]:
    return [ck.TopicPartition(*partition) for partition in partitions]


def _ours(partitions: Iterable[ck.TopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(p.topic, p.partition) for p in partitions]


def _names(partitions: Iterable[TopicPartition]) -> str:
    return " ".join(map(str, partitions))


def _text(error: KafkaException) -> str:
    cause = error.args[0] if error.args else error
    return cause.str() if isinstance(cause, KafkaError) else str(cause)
