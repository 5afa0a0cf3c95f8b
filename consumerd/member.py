"""One handler as a member of its consumer group: what it holds, and everything that changes that.

The thread that owns the Consumer (`kafka.py`) tells it of assignments, messages and revocations; writers take work
from it. A partition is assigned, then claimed (its checkpoint's epoch raised), then placed (who wins, checkpoint or
Kafka: `checkpoint.decide`), and only then delivered. From there on its lease says what the next write expects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import tenacity

from consumerd import catalog, metrics, postgres
from consumerd.accumulator import Accumulator, Batch, Bounds
from consumerd.breaker import Breaker
from consumerd.checkpoint import (
    Checkpoints,
    Committed,
    Decision,
    Lease,
    Stamp,
    Stored,
    decide,
    decode_stamp,
    ensure_schema,
)
from consumerd.dead_letter import DeadLetters
from consumerd.encode import Encoder
from consumerd.errors import ConfigError, ConsumerdError, Halt, Outage
from consumerd.kafka import Chunk, Commit, ConsumerThread, Found, consumer_config, gap
from consumerd.progress import Progress
from consumerd.sinks.append import Append
from consumerd.sinks.upsert import Upsert
from consumerd.topics import Topic, Topics
from consumerd.writer import Work, Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from psycopg import AsyncConnection

    from consumerd.config import Config, HandlerConfig
    from consumerd.errors import Refusal
    from consumerd.sinks.base import Sink
    from consumerd.types import TopicPartition

log = logging.getLogger(__name__)

LIBRDKAFKA_SHARE = 0.5
"""Share of a handler's memory for librdkafka's queues; the rest is for what is gathered and in flight."""
PRESSURE = 0.8
"""Share of the bound from which on everything gathered is written at once."""
FLUSH_SHARE = 0.5
"""Share of a revoke's deadline in which gathered messages are still begun to be written."""
RECLAIM_AFTER = 10.0
"""Seconds after which a partition that another member claimed, and that is assigned here still, is claimed again: that
member was a zombie that had not heard of its loss, and has by then."""
ADOPT_TIMEOUT = 10.0
"""Seconds to wait for the acknowledgement of a commit that adopts an operator's offset."""
WRITE_PRIVILEGES = {"append": ("INSERT",), "upsert": ("INSERT", "UPDATE", "SELECT")}


class Member:
    """One handler, from start to stop or halt."""

    def __init__(self, config: Config, handler: HandlerConfig, memory: int) -> None:
        self.config = config
        self.handler = handler
        self.progress = Progress(handler.name)
        self.breaker = Breaker(handler.poison)
        self.letters = DeadLetters(config.kafka, handler)
        self.encoder: Encoder
        self.sink: Sink
        self.checkpoints: Checkpoints
        self.bound = int(memory * (1 - LIBRDKAFKA_SHARE))
        self._queue_memory = memory - self.bound
        self._batches = Accumulator(
            Bounds(
                max_messages=handler.batch.max_messages,
                max_bytes=handler.batch.max_bytes,
                max_age=handler.batch.max_age,
            )
        )
        self._topics: dict[str, Topic] = {}
        self._store = ""
        self._thread: ConsumerThread | None = None
        self._writers: list[Writer] = []
        self._assigned: set[TopicPartition] = set()
        self._leases: dict[TopicPartition, Lease] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._to_claim: asyncio.Queue[TopicPartition] = asyncio.Queue()
        self._claiming = asyncio.Lock()
        self._started: set[TopicPartition] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    # The handler's life.

    async def run(self) -> None:
        """Run until cancelled or halted. A halt ends this handler alone."""
        try:
            await self._retry(self._start)
            async with asyncio.TaskGroup() as tasks:
                name = self.handler.name
                tasks.create_task(self._claim_forever(), name=f"{name}: claim")
                tasks.create_task(self._fail(), name=f"{name}: failure")
                for number, writer in enumerate(self._writers):
                    tasks.create_task(writer.run(), name=f"{name}: writer {number}")
        except (ConsumerdError, ExceptionGroup) as error:
            await self._halt(_first_halt(error))

    async def drain(self, deadline: float) -> bool:
        """Write what is gathered, commit, and leave the group; False if that was not done by the deadline."""
        if self.progress.state == "halted" or self._thread is None:
            return True
        self.progress.to("stopping")
        await self._thread.stop_delivery(self._assigned)
        drained = await self._flush(list(self._leases), "drain", deadline)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(deadline, _now() + 1)):
                await self._thread.close()
        await asyncio.to_thread(self.letters.close)
        self.progress.to("stopped")
        return drained

    async def _start(self) -> None:
        """Look at everything that must be there before the first message; raises Halt with what to type."""
        topics = Topics(self.config.kafka)
        never = [handler.dead_letter.topic for handler in self.config.handlers]
        self._topics = await topics.find(self.handler.topics, never)
        await topics.ensure_dead_letter(self.handler.dead_letter, self._topics)
        conn = await self.connect()
        try:
            await ensure_schema(conn, self.config.postgres.schema_name)
            await self._load_table(conn)
            self._store = await self.checkpoints.store(conn)
        finally:
            await conn.close()
        partitions = sum(topic.partitions for topic in self._topics.values())
        settings = consumer_config(self.config.kafka, self.handler.group_id, self._queue_memory, partitions)
        self._thread = ConsumerThread(settings, sorted(self._topics), self.bound, self, self.handler.name)
        self._writers = [Writer(self) for _ in range(self.handler.max_connections)]
        self._thread.start()
        self.recovered()

    async def _fail(self) -> None:
        """Raise what the Kafka thread reported."""
        await self._failure

    async def _halt(self, halt: Halt) -> None:
        """Leave the group, free the buffers, and say why; the daemon and its other handlers go on."""
        self.progress.halt(halt)
        self._release(list(self._assigned))
        if self._thread is not None:
            await self._thread.close()
        await asyncio.to_thread(self.letters.close)

    async def _retry(self, function: Any, *values: Any) -> None:
        """Run until it succeeds; outages are retried for ever, visibly."""
        retry = self.handler.retry
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Outage),
            wait=tenacity.wait_random_exponential(multiplier=retry.initial, max=retry.max),
            before_sleep=self.on_outage,
        )
        await retrying(function, *values)

    # What writers use.

    async def next_work(self) -> Work:
        """Wait for batches that are due; each comes with its partition's lease."""
        while True:
            now = _now()
            batches = self._batches.take(now, pressure=self._batches.memory > self.bound * PRESSURE)
            if batches:
                self.progress.taken(batches)
                return [(batch, self._leases[batch.partition]) for batch in batches]
            self._wake.clear()
            self._set_timer()
            await self._wake.wait()

    def holds(self, batch: Batch, lease: Lease) -> bool:
        """Whether a batch is still to be written: its partition is leased as it was, and it is not written yet."""
        return self._leases.get(batch.partition) is lease and lease.next_offset <= batch.first_offset

    def written(self, work: Work, seconds: float) -> None:
        """Take note of a committed write: leases move, memory is freed, Kafka is told in a while."""
        commits = []
        for batch, lease in work:
            lease.next_offset = batch.next_offset
            lease.max_offset = max(lease.max_offset, batch.next_offset)
            self._batches.done(batch)
            if self._leases.get(batch.partition) is lease:
                commits.append(self._commit_of(batch.partition, batch.next_offset, batch.leader_epoch))
            self.progress.written(batch, seconds)
        if self._thread is not None:
            self._thread.commit(commits)
        self.recovered("postgres", "dead_letter")
        self._settled.set()

    def isolated(self, batch: Batch, refused: dict[int, Refusal]) -> None:
        """Take note of rows that Postgres refused."""
        metrics.isolations.labels(self.handler.name).inc()
        log.debug(
            "Postgres refused rows of a batch",
            extra={"handler": self.handler.name, "partition": str(batch.partition), "refused": len(refused)},
        )

    async def read_back(self, conn: AsyncConnection[Any], batch: Batch, lease: Lease) -> None:
        """Learn from the checkpoint why a write of this batch was fenced.

        Our own commit may have landed though its acknowledgement was lost; Postgres may have gone back; or another
        member has claimed the partition.
        """
        partition = batch.partition
        epoch, offset = (await self.checkpoints.read(conn, [partition])).get(partition, (None, None))
        if not self.holds(batch, lease):
            return
        if epoch == lease.epoch and offset == lease.next_offset:
            return  # it was another batch of the same write that was fenced
        if epoch == lease.epoch and offset == batch.next_offset:
            self.written([(batch, lease)], 0.0)
            return
        metrics.fenced_writes.labels(self.handler.name).inc()
        self._release([partition])
        if epoch == lease.epoch and offset is not None and self._thread is not None:
            log.warning(
                "the checkpoint is not where the last write left it: reading again from there",
                extra={"handler": self.handler.name, "partition": str(partition), "from": offset, "was": lease.next_offset},
            )
            self._lease(partition, Lease(epoch=epoch, next_offset=offset, max_offset=lease.max_offset))
            await self._thread.start_at({partition: offset})
            self._started.add(partition)
            return
        log.warning("fenced: another member claimed the partition", extra={"handler": self.handler.name, "partition": str(partition)})
        asyncio.get_running_loop().call_later(RECLAIM_AFTER, self._claim_again, partition)

    async def connect(self) -> AsyncConnection[Any]:
        """Open a connection of this handler."""
        return await postgres.connect(self.config.postgres, f"consumerd/{self.handler.name}")

    async def load_table(self) -> None:
        """Read the table again, because it has changed; raises Halt when the mapping no longer fits."""
        conn = await self.connect()
        try:
            await self._load_table(conn)
        finally:
            await conn.close()
        log.info("the table has changed: read again from the catalog", extra={"handler": self.handler.name})

    async def _load_table(self, conn: AsyncConnection[Any]) -> None:
        config = self.handler.table
        async with postgres.errors_of(conn):
            table = await catalog.load(conn, config.name, WRITE_PRIVILEGES[config.write])
        try:
            self.encoder = Encoder(table, self.handler)
        except ConfigError as error:
            raise Halt("table", str(error)) from error
        columns = self.encoder.columns
        self.sink = Append(table, columns) if config.write == "append" else Upsert(table, columns, config.key)
        self.checkpoints = Checkpoints(self.config.postgres.schema_name, self.handler.group_id, table.identifier)

    # Outages.

    def on_outage(self, state: tenacity.RetryCallState) -> None:
        """Show an outage before the wait for its next try."""
        error = cast("Outage", state.outcome.exception() if state.outcome else None)
        metrics.retries.labels(self.handler.name, error.source).inc()
        self.progress.outage(error.source, str(error))

    def recovered(self, *sources: str) -> None:
        """Take outages back."""
        self.progress.recovered(*sources)

    # What the Kafka thread tells (kafka.Listener).

    def memory(self) -> int:
        """Return the memory of messages held here."""
        return self._batches.memory

    def received(self, chunks: list[Chunk]) -> None:
        """Gather messages of leased partitions; what lies before the position was delivered before a seek."""
        now = _now()
        for chunk in chunks:
            position = self._positions.get(chunk.partition)
            if position is None:
                continue
            messages, size = chunk.messages, chunk.size
            if messages[0].offset() < position:
                messages = [message for message in messages if message.offset() >= position]
                size = sum(map(len, messages))
            if messages:
                self._positions[chunk.partition] = messages[-1].offset() + 1
                self.progress.consumed(chunk.partition, len(messages))
                if self._batches.add(chunk.partition, messages, size, now):
                    self._wake.set()
        if self._batches.memory > self.bound * PRESSURE:
            self._wake.set()
        self._set_timer()

    def assigned(self, partitions: list[TopicPartition]) -> None:
        """Note an assignment; the claim follows."""
        self._assigned.update(partitions)
        self.progress.rebalanced(len(self._assigned), assigned=partitions)
        for partition in partitions:
            self._to_claim.put_nowait(partition)

    async def revoked(self, partitions: list[TopicPartition], deadline: float) -> None:
        """Write what is gathered of partitions that go, as far as time allows; what is in flight then is rolled back."""
        now = _now()
        self._assigned.difference_update(partitions)
        # A claim that is under way must not land after the next member's.
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                async with self._claiming:
                    pass
        if self.progress.state != "halted":
            await self._flush(partitions, "revoke", now + (deadline - now) * FLUSH_SHARE)
            self._batches.close(partitions)
            await self._settle(partitions, deadline)
        self._release(partitions)
        self.progress.rebalanced(len(self._assigned), revoked=partitions)

    def lost(self, partitions: list[TopicPartition]) -> None:
        """Drop partitions that are another's already; a write in flight is fenced or was in time."""
        self._assigned.difference_update(partitions)
        self._release(partitions)
        self.progress.rebalanced(len(self._assigned), lost=partitions)

    def watermarks(self, high: dict[TopicPartition, int]) -> None:
        """Note the high watermarks."""
        self.progress.high.update(high)

    def reachable(self, sentence: str | None) -> None:
        """Note that no broker answers, or that one does again."""
        if sentence is None:
            self.recovered("kafka")
        else:
            self.progress.outage("kafka", sentence)

    def failed(self, error: ConsumerdError) -> None:
        """Halt, by the task that waits for it."""
        if not self._failure.done():
            self._failure.set_exception(error)

    # Partitions.

    async def _claim_forever(self) -> None:
        while True:
            partitions = {await self._to_claim.get()}
            while not self._to_claim.empty():
                partitions.add(self._to_claim.get_nowait())
            await self._retry(self._claim, sorted(partitions))

    async def _claim(self, wanted: Sequence[TopicPartition]) -> None:
        """Claim assigned partitions, settle where each goes on, and have them delivered."""
        wanted = [p for p in wanted if p in self._assigned and p not in self._started]
        if not wanted or self._thread is None:
            return
        found = await self._thread.found(wanted)
        conn = await self.connect()
        try:
            async with self._claiming:
                partitions = [partition for partition in wanted if partition in self._assigned]
                stored = await self.checkpoints.claim(conn, partitions, self._counts(partitions))
            for partition in partitions:
                await self._place(conn, partition, stored[partition], found[partition])
        finally:
            await conn.close()
        ready = {p: self._leases[p].next_offset for p in partitions if p in self._leases}
        await self._thread.start_at(ready)
        self._started.update(ready)
        self.recovered("postgres", "kafka")
        self.progress.joined()

    def _counts(self, partitions: Sequence[TopicPartition]) -> dict[str, int]:
        """Return how many partitions each of their topics has; one may have grown since the start."""
        counts = {topic: self._topics[topic].partitions for topic, _ in partitions if topic in self._topics}
        for topic, number in partitions:
            counts[topic] = max(counts.get(topic, 0), number + 1)
        return counts

    async def _place(
        self, conn: AsyncConnection[Any], partition: TopicPartition, stored: Stored, found: Found
    ) -> None:
        """Settle where one claimed partition goes on; its lease is the result."""
        topic = self._topics.get(partition.topic)
        topic_id = topic.topic_id if topic else None
        committed = Committed(offset=found.committed, stamp=decode_stamp(found.metadata))
        decision = decide(
            partition,
            stored,
            committed,
            store=self._store,
            group=self.handler.group_id,
            topic_id=topic_id,
            target=self.checkpoints.target,
        )
        if decision.note:
            log.warning(decision.note, extra={"handler": self.handler.name, "partition": str(partition)})
        offset = decision.offset if decision.offset is not None else await self._beginning(partition, decision, found)
        if not found.low <= offset <= found.high:
            raise gap(partition, offset, found.low, found.high)
        if decision.kind != "resume" and not await self.checkpoints.place(
            conn, partition, stored.epoch, offset, topic_id
        ):
            return
        if decision.kind == "adopt":
            await self._acknowledge(partition, offset)
        if partition in self._assigned:
            maximum = max(stored.max_offset or 0, offset)
            self._lease(partition, Lease(epoch=stored.epoch, next_offset=offset, max_offset=maximum))

    async def _beginning(self, partition: TopicPartition, decision: Decision, found: Found) -> int:
        """Return where a partition without a checkpoint begins."""
        start = self.handler.start
        if decision.late or start == "earliest":
            return found.low
        if isinstance(start, datetime) and self._thread is not None:
            return await self._thread.offset_at(partition, int(start.timestamp() * 1000))
        return found.high

    async def _acknowledge(self, partition: TopicPartition, offset: int) -> None:
        """Stamp an adopted offset in Kafka, and wait for that: a crash must not adopt the same reset twice."""
        if self._thread is None:
            return
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT):
                await self._thread.committed([self._commit_of(partition, offset, None)])
        except TimeoutError:
            raise Outage("kafka", f"no acknowledgement for the commit of {partition}") from None

    def _lease(self, partition: TopicPartition, lease: Lease) -> None:
        self._leases[partition] = lease
        self._positions[partition] = lease.next_offset
        self._batches.open(partition)
        self.progress.leased(partition, lease.next_offset)

    def _release(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget partitions with all that is gathered of them."""
        self._batches.close(partitions)
        for partition in partitions:
            self._leases.pop(partition, None)
            self._started.discard(partition)
            self._positions.pop(partition, None)
            self.progress.released(partition)
        self._settled.set()

    def _claim_again(self, partition: TopicPartition) -> None:
        if partition in self._assigned:
            self._to_claim.put_nowait(partition)

    def _commit_of(self, partition: TopicPartition, offset: int, leader_epoch: int | None) -> Commit:
        topic = self._topics.get(partition.topic)
        stamp = Stamp(
            store=self._store,
            group=self.handler.group_id,
            topic_id=topic.topic_id if topic else None,
            offset=offset,
        )
        return Commit(partition=partition, offset=offset, leader_epoch=leader_epoch, metadata=stamp.encode())

    async def _flush(self, partitions: Sequence[TopicPartition], reason: Any, deadline: float) -> bool:
        """Write what is gathered of partitions; False if some is left at the deadline."""
        self._batches.hurry(partitions, reason)
        self._wake.set()
        return await self._wait(lambda: not self._batches.holds(partitions), deadline)

    async def _settle(self, partitions: Sequence[TopicPartition], deadline: float) -> None:
        """Wait for the writes in flight of partitions; at the deadline close their sockets."""
        gone = set(partitions)

        def in_flight() -> list[Writer]:
            return [w for w in self._writers if any(b.partition in gone and self.holds(b, le) for b, le in w.work)]

        if not await self._wait(lambda: not in_flight(), deadline):
            for writer in in_flight():
                await writer.abort()

    async def _wait(self, condition: Any, deadline: float) -> bool:
        try:
            async with asyncio.timeout_at(deadline):
                while not condition():
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def _set_timer(self) -> None:
        """See to it that writers wake when the oldest gathered batch reaches its age."""
        if self._timer is None and (due := self._batches.next_due()) is not None:
            self._timer = asyncio.get_running_loop().call_at(max(due, _now() + 0.001), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._wake.set()

    def lags(self) -> dict[TopicPartition, Any]:
        """Return the oldest message of each leased partition that is not written yet."""
        return {partition: self._batches.oldest(partition) for partition in self._leases}


def _now() -> float:
    """Return the event loop's time, which is time.monotonic()."""
    return time.monotonic()


def _first_halt(error: BaseException) -> Halt:
    """Return the halt among errors that ended a handler's tasks; anything else is a defect of ours."""
    if isinstance(error, BaseExceptionGroup):
        halts = [_first_halt(inner) for inner in error.exceptions]
        return next((halt for halt in halts if halt.reason != "bug"), halts[0])
    if isinstance(error, Halt):
        return error
    log.error("a task of the handler failed", exc_info=error)
    return Halt("bug", f"{type(error).__name__}: {error}")
