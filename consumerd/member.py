"""One handler as a member of its consumer group, from start to stop or halt.

Here everything that happens to a handler meets: the thread that owns the Consumer (`kafka.py`) tells of assignments,
messages and revocations; `assignment.py` turns assigned partitions into leased ones; writers (`writer.py`) take work
and report what was written. A halt ends this handler alone: it leaves its group and frees its buffers.

Over 400 lines, because the order in which these meet is what the promises hang on, and it is read in one place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import tenacity

from consumerd import metrics, postgres
from consumerd.accumulator import Accumulator, size_of
from consumerd.assignment import Assignment
from consumerd.breaker import Breaker
from consumerd.brokers import consumer_config
from consumerd.budget import divide
from consumerd.checkpoint import Checkpoints, KafkaCheckpoints, Lease, ensure_schema
from consumerd.dead_letter import DeadLetters
from consumerd.errors import ConsumerdError, Halt, Outage, Rejected
from consumerd.halting import Halting, first_halt
from consumerd.held_up import HeldUp
from consumerd.kafka import ConsumerThread
from consumerd.live_table import LiveTables
from consumerd.loader import leads_to
from consumerd.packed import Packed
from consumerd.pause import Pause
from consumerd.progress import Progress
from consumerd.reconcile import RECONCILE, Reconciler
from consumerd.topics import Topics
from consumerd.transformer import Transformer
from consumerd.types import TopicPartition
from consumerd.watch import Watch
from consumerd.ways_on import Accepted
from consumerd.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch, FlushReason
    from consumerd.brokers import Found
    from consumerd.config import Config, HandlerConfig
    from consumerd.errors import Blocked, Refusal, Source
    from consumerd.kafka import Chunk
    from consumerd.topics import Topic
    from consumerd.types import Message
    from consumerd.writer import Work

log = logging.getLogger(__name__)

MEMBER, CONSUMER, GROUP, TOPICS, PATTERNS, WATCH = "member", "consumer", "group", "topics", "patterns", "watch"
"""Who meets outages, beside the writers."""
JOIN_VISIBLE_AFTER = 5.0
"""Seconds after which a handler that is not in its group yet says so."""
PRESSURE = 0.8
"""Share of the buffer from which on everything gathered is written at once."""
CLAIM_SHARE = 0.3
"""Share of a revoke's deadline that a claim under way has to land; one that lands later would fence the next owner."""
FLUSH_SHARE = 0.5
"""Share of a revoke's deadline in which gathered messages are still begun to be written."""
TAIL_INTERVAL = 30.0
"""Seconds between two moves of a checkpoint over offsets that hold no message."""
GROW_AFTER = 10
"""Times as long as a write that Postgres cancelled had taken, until writes grow again: each try may cost as much."""
MOST_GROW_AFTER = 60.0
"""Seconds of this at most."""
MOST_DOUBLINGS = 30
"""Of the pause before what was given back is tried again; it ends at `retry.max` long before."""
CANCELLED_ALONE = 30
"""Times that Postgres may cancel the write of one message alone, before that is a halt."""
LEAST_SHARES = 2
"""Times the memory of librdkafka's queue, which is made once, that a member must have when its share gets smaller."""
TIMER_SLACK = 0.001
"""Seconds by which the timer for a batch's age is late rather than early."""


class Member:
    """One handler, and all that belongs to it."""

    on_trial = False
    """Whether every write is rolled back."""
    _progress_type = Progress
    _assignment_type = Assignment
    _reconciler_type = Reconciler

    def __init__(self, config: Config, handler: HandlerConfig, memory: int, accepted: Accepted | None = None) -> None:
        self.config = config
        self.handler = handler
        self.progress = self._progress_type(handler.name, leads_to(config.path), error_text=handler.poison.error_text)
        self.accepted = accepted or Accepted()
        """What an operator has accepted of a halt of the member before this one."""
        self.pause = Pause(self)
        self.breaker = Breaker(handler.poison)
        self.letters = DeadLetters(config.kafka, handler)
        self.transformer: Transformer | None = None
        self.tables = LiveTables(handler, self.connect)
        self.held_up = HeldUp(self)
        self.reconciler = self._reconciler_type(self)
        self.checkpoints: Checkpoints | KafkaCheckpoints
        self._tails: dict[TopicPartition, float] = {}
        self._claiming: AsyncConnection[Any] | None = None
        self.watch = Watch(self._connect, handler.name, self.reconciler.soon)
        self.share = memory
        self.budget = divide(memory, handler)
        self._batches = Accumulator(
            self.budget.batch, by_topic=self.tables.by_topic, connections=handler.max_connections
        )
        self.limit = self.budget.batch.max_messages
        """Messages of one write: fewer after Postgres cancelled one, more again later with each that it did not."""
        self._grow_from = 0.0
        self.packing = asyncio.Lock()
        """Held while a write is put together: side by side all would be ready late, and all in memory."""
        self._topics: Topics
        self._found: dict[str, Topic] = {}
        self.assignment: Assignment
        self._positions: dict[TopicPartition, int] = {}
        self._thread: ConsumerThread | None = None
        self._writers: list[Writer] = []
        self._halting = Halting(self)
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    # The handler's life.

    async def run(self) -> None:
        """Run until cancelled or halted."""
        try:
            async with asyncio.TaskGroup() as tasks:
                name = self.handler.name
                tasks.create_task(
                    self.watch.run(partial(self._on_error, WATCH), partial(self.recovered, WATCH)),
                    name=f"{name}: watch",
                )
                await self.retry(MEMBER, self._start)
                tasks.create_task(self._claim_forever(), name=f"{name}: claim")
                tasks.create_task(self._fail(), name=f"{name}: failure")
                tasks.create_task(self._watch_topics(), name=f"{name}: topics")
                tasks.create_task(self._follow_patterns(), name=f"{name}: patterns")
                tasks.create_task(self._follow_partitions(), name=f"{name}: partitions")
                tasks.create_task(self.reconciler.run(), name=f"{name}: reconcile")
                for number, writer in enumerate(self._writers):
                    tasks.create_task(writer.run(), name=f"{name}: writer {number}")
        except Exception as error:  # noqa: BLE001 - the root of the handler's tasks
            await self._halt(first_halt(error))
        finally:
            if self.transformer is not None:
                await self.transformer.close()

    async def drain(self, deadline: float) -> bool:
        """Write what is gathered, commit, and leave the group; False if that was not done by the deadline."""
        if self.progress.state == "halted" or self._thread is None:
            return True
        self.progress.to("stopping")
        with suppress(Outage):  # a halt has closed the thread
            await self._thread.stop_delivery()
        drained = await self.flush(list(self.assignment.leases), "drain", deadline)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(deadline, time.monotonic() + 1)):
                await self._thread.close()
        await asyncio.to_thread(self.letters.close)
        if self.progress.halted is not None:
            return False
        self.progress.to("stopped")
        return drained and (self.checkpoints.mode == "postgres" or self._thread.commits.all_answered())

    async def _start(self) -> None:
        """Look at everything that must be there before the first message; raises Halt with what to type."""
        if self.handler.transform is not None and self.transformer is None:
            transformer = Transformer(self.handler, self.budget.batch.max_bytes)
            try:
                await transformer.start()
            except BaseException:
                await transformer.close()
                raise
            self.transformer = transformer
        self._topics = Topics(self.config.kafka)
        found = self._found = self.letters.sources = await self._topics.find(
            self.handler.topics, self._letters_of_all()
        )
        if self.handler.poison.action == "dead-letter":
            self.letters.largest = await self._topics.ensure_dead_letter(self.handler.dead_letter, found)
        conn = await self.connect()
        try:
            self.checkpoints = await self._open_checkpoints(conn)
            await self.tables.start(conn)
            store = await self.checkpoints.store(conn)
        finally:
            await conn.close()
        self._writers = [Writer(self, f"writer {n}") for n in range(self.handler.max_connections)]
        self._thread = self._new_thread(sorted(found))
        self.assignment = self._assignment_type(
            self.config.kafka,
            self.handler,
            topics=found,
            store=store,
            checkpoints=self.checkpoints,
            thread=self._thread,
            on_commit=self._settled.set,
            accepted=self.accepted,
        )
        self._thread.start()
        self.recovered(MEMBER)
        asyncio.get_running_loop().call_later(JOIN_VISIBLE_AFTER, self._still_outside)

    # What a replay has others of.

    async def _open_checkpoints(self, conn: AsyncConnection[Any]) -> Checkpoints | KafkaCheckpoints:
        if self.handler.checkpoint == "kafka":
            return KafkaCheckpoints(self.handler.group_id, self.tables.target)
        await ensure_schema(conn, self.config.postgres.schema_name)
        return Checkpoints(self.config.postgres.schema_name, self.handler.group_id, self.tables.target)

    def _new_thread(self, topics: Sequence[str]) -> ConsumerThread:
        settings = consumer_config(self.config.kafka, self.handler.group_id, self.budget.queue)
        return ConsumerThread(settings, topics, self, self.handler.name, self.budget.batch)

    def outrun(self, partition: TopicPartition) -> None:
        """Take note that another member has claimed a partition that is assigned here."""
        self.assignment.claim_later(partition)

    def epoch_of_letters(self, partition: TopicPartition, lease: Lease) -> int:  # noqa: ARG002 - a replay's
        """Return the epoch that letters of a partition carry: by it they are told from those that were settled."""
        return lease.epoch

    def _letters_of_all(self) -> list[str]:
        return [handler.dead_letter.topic for handler in self.config.handlers]

    def _still_outside(self) -> None:
        """Say that the group has not let this member in yet."""
        if self.progress.state == "starting" and not self.assignment.assigned:
            sentence = (
                f"group {self.handler.group_id} has not let this member in yet: a member that died is in it until its "
                f"session times out (session.timeout.ms, 45 s by default), and a rebalance waits for members that do "
                f"not answer (max.poll.interval.ms, a minute by default)"
            )
            self.progress.outage("kafka", sentence, GROUP)

    async def _claim_forever(self) -> None:
        while True:
            await self.retry(MEMBER, self._claim, await self.assignment.next_to_claim())

    async def _watch_topics(self) -> None:
        """Halt when a topic is gone, once what was gathered of it is written: that is nowhere else any more."""
        halt = await self._topics.watch(self._found)
        if halt is not None:
            self.progress.outage("kafka", f"{halt}; before that what was gathered of it is written", TOPICS)
            gone = [partition for partition in self.assignment.leases if partition.topic in halt.topics]
            await self.flush(gone, "drain", None)
            raise halt

    async def _follow_patterns(self) -> None:
        """Look now and then for topics that have come to match a pattern."""
        if not any(topic.startswith("^") for topic in self.handler.topics):
            return
        while (interval := self._topics.look_interval) is not None:
            await asyncio.sleep(interval)
            await self.retry(PATTERNS, self._take_up_topics)

    async def _follow_partitions(self) -> None:
        """Have partitions divided anew that nobody has ever begun with, look after look; once for each.

        A static member that starts again is given what it had, without a rebalance, and whoever led the group by then
        does not look for what is new any more: partitions and topics that came meanwhile would be nobody's. (To ask
        the brokers who has what is no way: librdkafka's own assertion ended the process while they were down, seen.)
        """
        if self.config.kafka.group_instance_id is None:
            return
        assert self._thread is not None  # noqa: S101 - it was started
        seen: set[TopicPartition] = set()
        asked: set[TopicPartition] = set()
        while (interval := self._topics.look_interval) is not None:
            await asyncio.sleep(interval)
            try:
                new = await self._never_begun() - asked
                if left := new & seen:
                    names = " ".join(map(str, sorted(left)))
                    log.info("nobody has partitions: joining anew", extra={"handler": self.handler.name, "left": names})
                    await self._thread.join_anew()
                    asked |= left
            except Outage:  # the consumer meets the same, and tells
                new = set()
            seen = new

    async def _never_begun(self) -> set[TopicPartition]:
        """Return partitions that are not assigned here, and that nobody has claimed yet."""
        others = await self._topics.partitions(self._found) - self.assignment.assigned.keys()
        if not others or self.pause.on:
            return set()
        if self.checkpoints.mode == "kafka":
            found = await self.found(sorted(others))
            return {partition for partition in others if found[partition].committed is None}
        conn = await self.connect()
        try:
            stands = await self.checkpoints.read(conn, sorted(others))
        finally:
            await conn.close()
        return {partition for partition in others if partition not in stands or stands[partition].epoch == 0}

    async def _take_up_topics(self) -> None:
        """Read topics that have appeared; but one whose letters would not fit stops nobody else."""
        assert self._thread is not None  # noqa: S101 - it was started
        new = await self._topics.appeared(self.handler.topics, self._letters_of_all(), self._found)
        self.recovered(PATTERNS, "kafka")
        refused = []
        for name in list(new) if self.handler.poison.action == "dead-letter" else ():
            try:
                await self._topics.ensure_dead_letter(self.handler.dead_letter, [name])
            except Halt as halt:
                del new[name]
                refused.append(f"topic {name} is not read, the others are: {halt}")
        if new:
            log.info("topics appeared", extra={"handler": self.handler.name, "topics": " ".join(new)})
            self._found.update(new)
            await self._thread.subscribe(sorted(self._found))
        if refused:
            self.progress.outage("dead_letter", "; ".join(refused), PATTERNS)
        else:
            self.recovered(PATTERNS)

    async def _fail(self) -> None:
        """Raise what the Kafka thread reported."""
        await self._halting.failure

    async def _halt(self, halt: Halt) -> None:
        """Leave the group, free the buffers, and say why; the daemon and its other handlers go on."""
        # What was received is there to be read, though the watermark is looked at later; its age is known for as long
        # as the messages are here.
        received = {
            partition: at for partition, at in self._positions.items() if at > self.progress.high.get(partition, 0)
        }
        self.progress.watermarks(received)
        self.progress.lag(self.unwritten())
        self.progress.halt(halt)
        if self._thread is not None:
            self.release(list(self.assignment.leases))
            await self._thread.close()
        await asyncio.to_thread(self.letters.close)

    async def retry(self, who: str, function: Callable[..., Awaitable[None]], *values: object) -> None:
        """Run until it succeeds; outages are retried for ever, visibly, as met by `who`."""
        retry = self.handler.retry
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Outage),
            wait=tenacity.wait_random_exponential(multiplier=retry.initial, max=retry.max),
            before_sleep=partial(self._on_outage, who),
        )
        await retrying(function, *values)

    # What writers use.

    async def next_work(self) -> Work:
        """Wait for batches that are due; each comes with its partition's lease."""
        while True:
            batches = self._batches.take(time.monotonic(), pressure=self._under_pressure())
            if batches:
                self.progress.taken(batches)
                return [(batch, self.assignment.leases[batch.partition]) for batch in batches]
            self._wake.clear()
            self._set_timer()
            await self._wake.wait()

    def holds(self, batch: Batch, lease: Lease) -> bool:
        """Whether a batch is still to be written: its partition is leased as it was, and it is not written yet."""
        return self.assignment.leases.get(batch.partition) is lease and lease.next_offset <= batch.first_offset

    def written(self, work: Work, seconds: float, existing: int = 0) -> None:
        """Take note of a committed write: leases move, memory is freed, Kafka is told in a while.

        Of the write's rows `existing` were there already; whose, nobody knows: they are counted for its first batches.
        """
        commits = []
        for batch, lease in work:
            for offset in self.accepted.passed(batch.partition, lease.next_offset, batch.next_offset):
                self.progress.passed_over(batch.partition, offset)
            lease.next_offset = batch.next_offset
            lease.max_offset = max(lease.max_offset, batch.next_offset)
            self._batches.done(batch)
            self.recovered(str(batch.partition))
            if self.assignment.leases.get(batch.partition) is lease:  # else it is gone, or came back since
                if not batch.messages and self._positions.get(batch.partition) == batch.first_offset:
                    self._positions[batch.partition] = batch.next_offset
                tally = self.breaker.tally(batch.partition)
                commits.append(self.assignment.commit_of(batch.partition, batch.next_offset, batch.leader_epoch, tally))
            existing -= self.progress.written(batch, seconds, existing)
            if batch.leader_epoch is not None:
                lease.leader_epoch = batch.leader_epoch
        self.assignment.commit(commits)
        self._settled.set()
        if time.monotonic() >= self._grow_from:
            self.limit = min(self.budget.batch.max_messages, self.limit + self.limit // 4 + 1)
        self._wake.set()  # more of these partitions may be due, and another writer free

    def give_back(self, batch: Batch, outage: Blocked, seconds: float) -> None:
        """Let others have the connection for as long as it was in vain, and try this batch again later, visibly."""
        metrics.retries.labels(self.handler.name, outage.source).inc()
        self.progress.outage(outage.source, str(outage), str(batch.partition))
        batch.given_back += 1
        backoff = self.handler.retry.initial * 2 ** min(batch.given_back, MOST_DOUBLINGS)
        until = time.monotonic() + max(seconds, min(self.handler.retry.max, backoff))
        self._batches.give_back(batch, until, whole_topic=outage.source == "postgres")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()

    def is_out(self, partition: TopicPartition) -> bool:
        """Whether a batch of a partition is being written."""
        return self._batches.is_out(partition)

    def settled(self) -> None:
        """Wake whoever waits for writes to end."""
        self._settled.set()

    def cancelled(self, work: Work, seconds: float) -> None:
        """Write less at once, for Postgres cancelled a write; raises Halt when it was one message, again and again."""
        messages = sum(len(batch.messages) for batch, _ in work)
        if messages > 1 and messages // 2 < self.limit:
            self.limit = messages // 2
            self._grow_from = time.monotonic() + min(MOST_GROW_AFTER, GROW_AFTER * seconds)
            extra = {"handler": self.handler.name, "messages": self.limit}
            log.warning("Postgres cancelled a write: smaller ones for a while", extra=extra)
        if messages == 1:
            ((batch, _),) = (entry for entry in work if entry[0].messages)
            batch.cancelled += 1
            if batch.cancelled >= CANCELLED_ALONE:
                raise Halt(
                    "database",
                    "Postgres cancels the write of a single message again and again: raise statement_timeout, or mend "
                    "the trigger or the lock that it waits for",
                )

    def split(self, batch: Batch, count: int) -> None:
        """Keep the first messages of a batch that is being written; the others are written next, and judged then."""
        self._batches.split(batch, count)
        self.breaker.take_back(batch)
        self._wake.set()

    def committed(self, work: Work) -> bool:
        """Whether Kafka has acknowledged what must be before these may be written."""
        return all(self.assignment.committed(batch.partition) for batch, _ in work)

    async def wait_for_commits(self, work: Work) -> None:
        """Wait until `committed`, or until some of these are not held any more."""
        held = len(work)
        await self._wait(
            lambda: self.committed(work) or sum(self.holds(batch, lease) for batch, lease in work) < held, None
        )

    async def hold(self, partitions: Sequence[TopicPartition]) -> None:
        """Have nothing more of partitions delivered, until they are claimed again."""
        if self._thread is not None:
            await self._thread.hold(partitions)

    async def found(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Found]:
        """Ask the brokers about partitions; raises Outage."""
        return await self._thread.found(partitions) if self._thread is not None else {}

    def reads(self, topics: Iterable[str]) -> bool:
        """Whether any of some topics is among those that were found."""
        return not self._found.keys().isdisjoint(topics)

    @property
    def partitions(self) -> list[TopicPartition]:
        """Return all partitions of the handler's topics; none before it has begun."""
        topics = self._found.values() if self._thread is not None else ()
        return [TopicPartition(topic.name, number) for topic in topics for number in range(topic.partitions)]

    async def confirm_topics(self, arrived: float) -> None:
        """Make sure that what arrived at a time came of the topics that the offsets belong to; raises Halt, Outage."""
        await self._topics.confirm(self._found, arrived)

    def isolated(self, batch: Batch, refused: dict[int, Refusal]) -> None:
        """Take note of rows that Postgres refused."""
        metrics.isolations.labels(self.handler.name).inc()
        extra = {"handler": self.handler.name, "partition": str(batch.partition), "refused": len(refused)}
        log.debug("Postgres refused rows of a batch", extra=extra)

    async def connect(self, *, claims: bool = False) -> AsyncConnection[Any]:
        """Open a connection of this handler, and watch over it."""
        conn = await self._connect()
        self.watch.add(conn, claims=claims)
        return conn

    async def _connect(self) -> AsyncConnection[Any]:
        return await postgres.connect(self.config.postgres, f"consumerd/{self.handler.name}")

    # Outages.

    def _on_outage(self, who: str, state: tenacity.RetryCallState) -> None:
        """Show an outage that somebody met, before the wait for the next try."""
        error = cast("Outage", state.outcome.exception() if state.outcome else None)
        metrics.retries.labels(self.handler.name, error.source).inc()
        self._on_error(who, error)
        if error.source == "postgres" and who != RECONCILE:
            self.reconciler.soon()

    def _on_error(self, who: str, error: ConsumerdError) -> None:
        """Show an outage; one that only looks on does not end for any other error."""
        if isinstance(error, Outage):
            self.progress.outage(error.source, str(error), who)

    def recovered(self, who: str, *sources: Source) -> None:
        """Take back outages that somebody met, all of them when no source is named."""
        self.progress.recovered(who, *sources)

    # What the Kafka thread tells (kafka.Listener).

    def fill(self, in_transit: int) -> float:
        """Return the share of the buffer that is used: of its memory, or of what keeps every connection busy."""
        return max((self._batches.memory + in_transit) / self.budget.full, self._batches.messages / self.budget.enough)

    def pack(self, partition: TopicPartition, messages: list[Any]) -> Packed:
        """Return what messages are as rows of the table as it is known now; called on the Kafka thread."""
        try:
            return self.tables.of(partition.topic).mapping.pack(messages)
        except Rejected:  # found again, and which, by whoever writes it
            return Packed(messages=len(messages))

    def started(self, partition: TopicPartition, offset: int) -> None:
        """Open a leased partition: only what comes after this was fetched from where the lease goes on."""
        lease = self.assignment.leases.get(partition)
        if lease is not None and lease.next_offset == offset:
            self._positions[partition] = offset
            self._batches.open(partition)
            self.progress.leased(partition, offset)

    def received(self, chunks: list[Chunk]) -> None:
        """Gather messages of started partitions."""
        now = time.monotonic()
        for chunk in chunks:
            position = self._positions.get(chunk.partition)
            if position is None:
                continue
            messages, size, packed = chunk.messages, chunk.size, chunk.packed
            if messages[0].offset() < position:
                messages = [message for message in messages if message.offset() >= position]
                size, packed = size_of(messages), Packed(messages=len(messages))
            if (
                messages
                and chunk.partition in self.accepted.skips
                and (skipped := self.accepted.skipped(chunk.partition, messages))
            ):
                self.progress.consumed(chunk.partition, len(skipped))
                messages = [message for message in messages if message.offset() not in skipped]
                size, packed = size_of(messages), Packed(messages=len(messages))
            if messages:
                if self._halting.is_another_log(chunk.partition, messages[0]) or self._halting.is_another_log(
                    chunk.partition, messages[-1]
                ):
                    continue
                self._positions[chunk.partition] = messages[-1].offset() + 1
                self.progress.consumed(chunk.partition, len(messages))
                if self._batches.add(chunk.partition, messages, size, now, packed):
                    self._wake.set()
        if self._under_pressure():
            self._wake.set()
        self._set_timer()

    def assigned(self, partitions: list[TopicPartition]) -> None:
        """Note an assignment; the claim follows."""
        self.assignment.assign(partitions)
        self.recovered(GROUP)
        self.progress.rebalanced(len(self.assignment.assigned), assigned=partitions)

    async def revoked(self, partitions: list[TopicPartition], deadline: float) -> None:
        """Write what is gathered of partitions that go, as far as time allows; roll back what is in flight then."""
        self.assignment.unassign(partitions)
        now = time.monotonic()
        try:
            async with asyncio.timeout_at(now + (deadline - now) * CLAIM_SHARE):
                await self.assignment.claims_landed()
        except TimeoutError:
            if self._claiming is not None:
                postgres.cut(self._claiming)
        if self.progress.state != "halted":
            await self._lay_down(partitions, "revoke", deadline)
        self.release(partitions)
        self.breaker.forget(partitions)
        self.held_up.tell()
        self.progress.rebalanced(len(self.assignment.assigned), revoked=partitions)

    def lost(self, partitions: list[TopicPartition], why: str) -> None:
        """Drop partitions that are another's already; a write in flight is fenced or was in time."""
        self.assignment.lose(partitions)
        self.release(partitions)
        self.breaker.forget(partitions)
        self.held_up.tell()
        self.progress.rebalanced(len(self.assignment.assigned), lost=partitions)
        self.progress.left()
        if self.progress.state != "halted":
            self.progress.outage("kafka", f"group {self.handler.group_id} has let this member go: {why}", GROUP)

    def watermarks(self, high: dict[TopicPartition, int]) -> None:
        """Note the high watermarks."""
        self.progress.watermarks(high)

    def positions(self, positions: dict[TopicPartition, int]) -> None:
        """Have the checkpoint follow where a log ends with offsets that hold no message (transactions, compaction).

        Otherwise lag would never be 0, and retention would seem to overtake the checkpoint.
        """
        now = time.monotonic()
        for partition, position in positions.items():
            lease = self.assignment.leases.get(partition)
            if (
                lease is not None
                and position > lease.next_offset == self._positions.get(partition)
                and now >= self._tails.get(partition, -TAIL_INTERVAL) + TAIL_INTERVAL
            ):
                self._tails[partition] = now
                self._batches.tail(partition, lease.next_offset, position)
                self._wake.set()

    def reachable(self, sentence: str | None) -> None:
        """Note that no broker answers, or that one does again."""
        if sentence is None:
            self.recovered(CONSUMER)
        elif self.progress.state != "halted":
            self.progress.outage("kafka", sentence, CONSUMER)

    def reached_gap(self, partition: TopicPartition, halt: Halt) -> None:
        """Halt once everything before a gap is written."""
        self._halting.behind(partition, halt)

    def failed(self, error: BaseException) -> None:
        """Halt, by the task that waits for it."""
        self._halting.failed(error)

    # Partitions.

    async def _claim(self, partitions: Sequence[TopicPartition]) -> None:
        """Claim assigned partitions and have them delivered."""
        conn = self._claiming = await self.connect(claims=True)
        try:
            leases = await self.assignment.claim(await self.held_up.look(conn, partitions), conn)
        except Halt:
            self.held_up.keep()
            raise
        finally:
            self._claiming = None
            await conn.close()
        if leases and not self.pause.on:
            self.release(leases)
            now = time.monotonic()
            for partition, lease in leases.items():
                self.breaker.recall(partition, lease.tally, now)
            await self.assignment.deliver(leases)
        self.recovered(MEMBER)
        self.progress.joined()
        self.held_up.tell()

    def release(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget partitions with all that is gathered of them."""
        self._batches.close(partitions)
        for partition in partitions:
            self.assignment.release(partition)
            self._positions.pop(partition, None)
            self.recovered(str(partition))
            # The lag of a handler that halted or was paused stays to be seen.
            if self.progress.halted is None and not (self.pause.on and partition in self.assignment.assigned):
                self.progress.released(partition)
        self._settled.set()
        self._wake.set()  # others may be taken now that waited for a try of one of these

    async def lay_down(self, deadline: float) -> bool:
        """Hold nothing of any partition any more, but stay in the group; False if what was gathered is read again."""
        if self._thread is None:
            return True
        with suppress(Outage):
            await self._thread.hold(list(self.assignment.assigned))
        leased = list(self.assignment.leases)
        written = await self._lay_down(leased, "drain", deadline)
        self.release(leased)
        self.take_up()
        return written

    def take_up(self) -> None:
        """Claim all that is assigned, or look at it, as a pause allows."""
        if self._thread is not None:
            self.assignment.claim_all()

    async def _lay_down(self, partitions: Sequence[TopicPartition], reason: FlushReason, deadline: float) -> bool:
        """Write what is gathered of partitions as far as time allows, and roll back what is in flight then."""
        now = time.monotonic()
        half = now + (deadline - now) * FLUSH_SHARE
        written = False
        # At least once, no batch is written before a commit; and that does not come any more in a revoke.
        if self.checkpoints.mode == "postgres" or reason != "revoke":
            written = await self.flush(partitions, reason, half)
            written &= await self._wait(lambda: all(map(self.assignment.committed, partitions)), half)
        self._batches.close(partitions)
        await self._settle(partitions, deadline)
        return written

    async def flush(self, partitions: Sequence[TopicPartition], reason: FlushReason, deadline: float | None) -> bool:
        """Write what is gathered of partitions; False if some is left at the deadline."""
        self._batches.hurry(partitions, reason)
        self._wake.set()
        return await self._wait(lambda: not self._batches.holds(partitions), deadline)

    async def _settle(self, partitions: Sequence[TopicPartition], deadline: float) -> None:
        """Wait for the writes in flight of partitions; at the deadline close their sockets."""
        gone = set(partitions)

        def in_flight() -> list[Writer]:
            return [
                writer
                for writer in self._writers
                if writer.writing and any(b.partition in gone and self.holds(b, lease) for b, lease in writer.work)
            ]

        await self._wait(lambda: not in_flight(), deadline)
        for writer in self._writers:  # a probe, too, holds the checkpoint's lock
            if any(batch.partition in gone and self.holds(batch, lease) for batch, lease in writer.work):
                writer.cut()

    async def _wait(self, condition: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until writes, releases or commits have made a condition true; False at the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                while not condition():
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def stuck_for(self, now: float) -> float:
        """Return the seconds since the Kafka thread last turned; 0 while there is none that is to turn."""
        return self._thread.stuck_for(now) if self._thread is not None else 0.0

    def paused(self) -> int:
        """Return how many of the partitions held are not read just now."""
        return self._thread.paused if self._thread is not None else 0

    async def resize(self, memory: int, deadline: float) -> bool:
        """Keep within another share of the memory from now on; False where that cannot be without a fresh member."""
        if memory < LEAST_SHARES * self.budget.queue:
            return False
        self.share = memory
        self.budget = divide(memory, self.handler, self.budget.queue)
        self._batches.bound(self.budget.batch)
        self.limit = min(self.limit, self.budget.batch.max_messages)
        if self.transformer is not None:
            self.transformer.most_bytes = self.budget.batch.max_bytes
        return await self._wait(lambda: self.memory() <= self.budget.buffered, deadline)

    def memory(self) -> int:
        """Return the memory of messages held here."""
        return self._batches.memory

    def _under_pressure(self) -> bool:
        return self.fill(0) > PRESSURE

    def _set_timer(self) -> None:
        """See to it that writers wake when the oldest gathered batch reaches its age."""
        if self._timer is None and (due := self._batches.next_due()) is not None:
            at = max(due, time.monotonic()) + TIMER_SLACK
            self._timer = asyncio.get_running_loop().call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._wake.set()

    def unwritten(self) -> dict[TopicPartition, Message | None]:
        """Return the oldest message of each leased partition that was received and is not written yet."""
        leases = self.assignment.leases if self._thread is not None else ()
        return {partition: self._batches.oldest(partition) for partition in leases}
