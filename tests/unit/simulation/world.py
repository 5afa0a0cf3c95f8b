"""One seed: a broker, a database and the processes of one handler, what happens to them, and what must hold.

What must hold is looked at where it could break: at each COMMIT, each claim and each commit to Kafka; and at the end,
when nothing disturbs any more, everything must have been written exactly once (at least once, in that mode).

Over 400 lines, because what happens and what must hold are read side by side.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from consumerd.config import Config, HandlerConfig
from consumerd.errors import Outage
from consumerd.kafka import REVOKE_TIMEOUT
from consumerd.member import Member
from consumerd.topics import Topic
from consumerd.types import TopicPartition
from tests.unit.simulation.broker import TOPIC, Broker
from tests.unit.simulation.database import Backend, Connection, Database, Row, Transaction
from tests.unit.simulation.loop import CLOCK, NEUTRAL, OWNER, Loop, Owner, Stuck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumerd.accumulator import Batch
    from tests.unit.simulation.broker import Thread

BATCH = 4
"""Messages of a batch, at most."""
SESSION_TIMEOUT = 10.0
PATIENCE = 400.0
"""Virtual seconds after the last disturbance in which everything must have been written."""
DRAIN = 30.0
CHANCE = Random(0)  # what the daemon itself leaves to chance (waits between tries); seeded with each world

ACTIONS = {
    "rebalance": {"move": 6, "kick": 2, "produce": 3, "hole": 1},
    "faults": {"move": 2, "sever": 3, "restart": 1, "slow": 1, "produce": 3},
    "zombies": {"move": 2, "freeze": 3, "kick": 1, "crash": 2, "produce": 3},
    "back": {"move": 2, "snapshot": 4, "back": 2, "freeze": 1, "crash": 1, "produce": 4},
    "all": {
        "move": 3, "kick": 1, "sever": 1, "restart": 1, "slow": 1, "freeze": 1, "crash": 1,
        "snapshot": 2, "back": 1, "produce": 4, "hole": 1,
    },
}  # fmt: skip
"""What happens in a world of each kind, and how often."""


class Process(Owner):
    """One process of the daemon, with its one member."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.world = world
        self.name = name
        self.thread: Thread | None = None
        self.connections: list[Connection] = []
        self.writes: dict[TopicPartition, Connection] = {}
        self.given_back: dict[TopicPartition, int] = {}
        """Epoch under which each partition was given back in time."""
        self.claimed: dict[TopicPartition, int] = {}
        self.context = copy_context()
        self.context.run(OWNER.set, self)
        self.member: Member = self.context.run(Member, world.config, world.handler, 1 << 20)
        self.task = world.loop.create_task(self.member.run(), name=name, context=self.context)

    async def drain(self) -> bool:
        """Stop as the daemon stops."""
        drained = await self.member.drain(CLOCK.now + DRAIN)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        return drained


class World:
    """Everything of one seed. `problem` is what did not hold, `trace` what happened before, if it is wanted."""

    def __init__(self, seed: int, kind: str, *, mode: str = "postgres", traced: bool = False) -> None:
        self.rng = Random(f"{kind} {mode} {seed}")
        CHANCE.seed(seed)
        self.trace: list[str] | None = [] if traced else None
        self.problem: str | None = None
        self.kind = kind
        self.mode = mode
        self.loop = Loop(self.rng, shuffled=seed % 2 == 1)
        self.latency = 0.05
        self.refused: set[tuple[int, int]] = set()
        self.malformed: set[tuple[int, int]] = set()
        self.lettered: set[tuple[int, int]] = set()
        self.skipped: set[tuple[int, int]] = set()
        self.expected: Counter[tuple[int, int]] = Counter()
        self.hits: Counter[TopicPartition] = Counter()
        self.letter_fault_rate = 0.0
        self.config, self.handler = CONFIG, HANDLERS[mode]
        self.database = Database(self)
        self.broker = Broker(self, self.rng.randint(1, 3))
        self.processes: list[Process] = []
        self._names = 0
        self._left = self.rng.randint(4, 14)
        self._gap = self.rng.choice([20, 60, 150])
        self._over = False

    # The course of events.

    def run(self) -> None:
        """Run to the end; `problem` says what did not hold."""
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(lambda _, context: self.fail(repr(context.get("exception") or context)))
        director = self.loop.create_task(self._direct(), context=NEUTRAL.copy())
        director.add_done_callback(lambda _: None if self._over else self.loop.stop())
        try:
            self.loop.run_forever()
            if self.problem is None and director.exception() is not None:
                self.problem = repr(director.exception())
        except Stuck as stuck:
            self.problem = f"stuck: {stuck}"
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        self._over = True
        self.loop.at_step(10**9, lambda: None)
        self.loop.steps = 0
        self.loop.set_exception_handler(lambda *_: None)
        for process in self.processes:
            process.dead = False
            self.loop.thaw(process)
        tasks = asyncio.all_tasks(self.loop)
        for task in sorted(tasks, key=hash):
            task.cancel()
        with suppress(Stuck):
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        asyncio.set_event_loop(None)
        self.loop.close()

    async def _direct(self) -> None:
        rate = self.rng.choice([0.0, 0.01, 0.05]) if self.kind in {"faults", "all"} else 0.0
        self._fault_rates(rate)
        for _ in range(self.rng.randint(3, 8)):
            self._produce()
        for _ in range(self.rng.randint(1, 3)):
            self._start()
        self.loop.at_step(self.rng.randint(1, self._gap * 2), self._disturb)
        while self._left:  # noqa: ASYNC110 - virtual time: a sleep costs nothing
            await asyncio.sleep(1.0)
        await self._settle()
        if self.mode == "postgres" and self.rng.random() < 0.3:
            await self._operate()
            await self._settle()
        await self._stop()

    def _fault_rates(self, rate: float) -> None:
        self.database.fault_rate = rate
        self.broker.fault_rate = self.letter_fault_rate = rate

    async def _settle(self) -> None:
        """Disturb no more, and wait until everything is written."""
        self.log("calm")
        self._fault_rates(0.0)
        self.latency = 0.05
        for process in self.processes:
            if process.frozen:
                self._thaw(process)
        if not self._alive():
            self._start()
        end = CLOCK.now + PATIENCE
        while (left := self._unsettled()) and CLOCK.now < end and self.problem is None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(1.0)
        for process in self._alive():
            if process.member.progress.halted is not None or process.task.done():
                self.fail(f"{process.name} halted: {process.member.progress.halted}")
        if left:
            self.fail(f"after {PATIENCE:g} s: {left}")
        self._check_table()

    def _unsettled(self) -> str | None:
        """Say what is not written or not acknowledged yet."""
        for partition in self.broker.partitions:
            high = self.broker.high[partition]
            at = self.broker.committed.get(partition, (None, ""))[0]
            if self.mode == "postgres" and (row := self.database.rows.get(partition, Row())).next_offset != high:
                return f"checkpoint of {partition} is at {row.next_offset}, not {high}"
            if at != high and not (at is None and not high):
                return f"Kafka's offset of {partition} is at {at}, not {high}"
        for process in self._alive():
            if memory := process.member.memory():
                return f"{process.name} holds {memory} bytes"
        return None

    async def _stop(self) -> None:
        """Stop all processes, and look once more."""
        self.log("stop")
        alive = self._alive()
        unaware = {process for process in alive if process.thread is not None and process.thread.expelled}
        drained = await asyncio.gather(*(process.drain() for process in alive))
        for process, done in zip(alive, drained, strict=True):
            if process in unaware:
                continue  # what is another's by now cannot be drained
            if not done or process.member.progress.state not in {"stopped", "starting", "waiting"}:
                self.fail(f"{process.name} did not drain: {process.member.progress.state}")
            if process.member.memory():
                self.fail(f"{process.name} stopped and holds {process.member.memory()} bytes")
            if not all(conn.closed for conn in process.connections):
                self.fail(f"{process.name} stopped and left a connection open")
        if left := self._unsettled():
            self.fail(f"after the stop: {left}")
        self._check_table()
        self.processes = [process for process in self.processes if process not in alive]

    async def _operate(self) -> None:
        """Stop all, set an offset as kafka-consumer-groups does, and go on, perhaps through a crash."""
        await self._stop()
        for _ in range(self.rng.randint(0, 2)):
            self._produce()
        await asyncio.sleep(SESSION_TIMEOUT + 10)
        for partition in self.broker.partitions:
            old, high = self.database.rows[partition].next_offset or 0, self.broker.high[partition]
            new = self.rng.randint(0, high)
            self.log("reset", partition.partition, old, new)
            self.broker.committed[partition] = new, ""
            for message in self.broker.logs[partition]:
                if not self.is_poison(partition, message.at):
                    self.expected[partition.partition, message.at] += (new <= message.at) - (message.at >= old)
                elif old <= message.at < new:
                    self.skipped.add((partition.partition, message.at))
        self.database.take_snapshot()
        for _ in range(self.rng.randint(1, 2)):
            self._start()
        for _ in range(self.rng.randint(0, 3)):
            await asyncio.sleep(self.rng.random() * 1.5)
            self._crash()
            self._start()
        self._produce()

    # What happens.

    def _disturb(self) -> None:
        """Let something happen, between two callbacks."""
        if self._over or not self._left:
            return
        self._left -= 1
        actions = ACTIONS[self.kind]
        (action,) = self.rng.choices(list(actions), list(actions.values()))
        if self.mode == "kafka" and action in {"snapshot", "back"}:
            action = "produce"
        self.log("do", action)
        getattr(self, f"_{action}")()
        self.loop.at_step(self.rng.randint(1, self._gap * 2), self._disturb)

    def _alive(self) -> list[Process]:
        return [process for process in self.processes if not process.dead]

    def _start(self) -> None:
        self._names += 1
        self.processes.append(Process(self, f"p{self._names}"))

    def _crash(self) -> None:
        process = self.rng.choice(self._alive())
        self.log("crashed", process.name)
        process.dead = True
        process.frozen = False
        for conn in process.connections:
            conn.lose()
        if process.thread is not None:
            self.loop.call_later(SESSION_TIMEOUT, self.broker.expel, process.thread, context=NEUTRAL)
        if not self._alive() or self.rng.random() < 0.7:
            self._start()

    def _freeze(self) -> None:
        if running := [process for process in self._alive() if not process.frozen]:
            process = self.rng.choice(running)
            self.log("frozen", process.name)
            process.frozen = True
            self.loop.call_later(self.rng.random() * 3 * SESSION_TIMEOUT, self._thaw, process, context=NEUTRAL)
            self.loop.call_later(SESSION_TIMEOUT, self._time_out, process, context=NEUTRAL)
            if len(running) == 1:
                self._start()

    def _time_out(self, process: Process) -> None:
        if process.frozen and process.thread is not None:
            self.log("session over", process.name)
            self.broker.expel(process.thread)

    def _thaw(self, process: Process) -> None:
        if process.frozen:
            self.log("thawed", process.name)
            self.loop.thaw(process)

    def _move(self) -> None:
        if self.broker.members:
            self.broker.move(self.rng.choice(self.broker.partitions), self.rng.choice(self.broker.members))

    def _kick(self) -> None:
        if self.broker.members:
            self.broker.expel(self.rng.choice(self.broker.members))

    def _sever(self) -> None:
        """Break a connection between client and server."""
        if self.database.backends:
            self.database.end(self.rng.choice(list(self.database.backends.values())))

    def _restart(self) -> None:
        self.database.restart(self.rng.random() * 5)

    def _slow(self) -> None:
        self.latency = self.rng.choice([0.05, 0.5, 2.0])

    def _snapshot(self) -> None:
        rows = self.database.rows.values()
        if rows and all(row.next_offset is not None for row in rows):  # else a restore halts, and should
            self.database.take_snapshot()

    def _back(self) -> None:
        if self.database.snapshot[0]:
            self.database.restart(self.rng.random() * 5, back=True)
            for process in self.processes:
                process.given_back.clear()

    def _hole(self) -> None:
        """End a log with an offset that holds no message, as a transaction does."""
        self.broker.high[self.rng.choice(self.broker.partitions)] += 1
        self.broker.wake()

    def _produce(self) -> None:
        partition = self.rng.choice(self.broker.partitions)
        for _ in range(self.rng.randint(1, 8)):
            at, number = self.broker.high[partition], partition.partition
            fate = self.rng.random()
            text = b'{"partition": %d, "at": %d}' % (number, at)
            if fate < 0.04:
                self.refused.add((number, at))
            elif fate < 0.08:
                self.malformed.add((number, at))
                text = b"{"
            else:
                self.expected[number, at] = 1
            self.broker.append(partition, text)
        self.broker.wake()

    # What must hold.

    def log(self, *what: object) -> None:
        """Add to the trace."""
        if self.trace is not None:
            self.trace.append(f"{CLOCK.now:9.3f} {self.loop.steps:6} {' '.join(map(str, what))}")

    def fail(self, problem: str) -> None:
        """Note what does not hold, and end this world."""
        if self.problem is None and not self._over:
            self.log("PROBLEM", problem)
            self.problem = problem
            self.loop.stop()

    def hit(self, partition: TopicPartition) -> None:
        """Note what may repeat a batch of a partition at least once."""
        self.hits[partition] += 1

    def is_poison(self, partition: TopicPartition, offset: int) -> bool:
        """Whether a message belongs into the dead-letter topic."""
        return (partition.partition, offset) in self.refused or (partition.partition, offset) in self.malformed

    def on_revoked(self, process: Process, partitions: Sequence[TopicPartition], *, in_time: bool) -> None:
        """Note that partitions were given back: nothing of them is committed from now on."""
        self.log("given back", process.name, [p.partition for p in partitions], "in time" if in_time else "late")
        for writer in process.member._writers:
            for batch, _ in writer._doubt[1] if writer._doubt else ():  # its outcome stays unknown
                self.hit(batch.partition)
        for partition in partitions:
            self.hits[partition] += not in_time  # what was in flight was cut off, its outcome unknown
        if in_time:
            process.given_back.update({p: process.claimed.get(p, 0) for p in partitions})

    def on_claim(self, backend: Backend, partition: TopicPartition, row: Row) -> None:
        """Look at a claim: it does not land once its partition was given back."""
        process = backend.process
        self.log("claim", process.name, partition.partition, "epoch", row.epoch)
        process.claimed[partition] = row.epoch
        thread = process.thread
        if partition in process.given_back and not backend.left and thread and partition not in thread._owned:
            self.fail(f"a claim of {process.name} for {partition} landed after it was given back")

    def on_advance(self, backend: Backend, epochs: dict[TopicPartition, int]) -> None:
        """Look at a write that begins: there is one of a partition at a time, under one claim."""
        process = backend.process
        for conn in process.connections if not backend.left else ():
            other = conn.backend
            if other is backend or other.left or other.transaction is None:
                continue
            for partition, (epoch, _, _) in other.transaction.moves.items():
                if epochs.get(partition) == epoch:
                    self.fail(f"{process.name} has two writes of {partition} in flight")

    def on_commit_sent(self, backend: Backend) -> None:
        """Look at a COMMIT that is sent: none after the partition was given back."""
        if backend.transaction is None:
            return
        for partition, (epoch, _, _) in backend.transaction.moves.items():
            if epoch <= backend.process.given_back.get(partition, -1):
                self.fail(f"{backend.process.name} commits {partition} after it was given back")

    def on_commit(self, transaction: Transaction) -> None:
        """Look at a transaction that is committed: exactly the good messages between old and new checkpoint."""
        rows: dict[TopicPartition, list[int]] = {}
        for number, offset in transaction.rows:
            rows.setdefault(TopicPartition(TOPIC, number), []).append(offset)
        if self.mode == "kafka":
            self._check_at_least_once(rows)
            return
        for partition, (epoch, new, _) in transaction.moves.items():
            row = self.database.rows[partition]
            old = row.next_offset or 0
            self.log("commit", partition.partition, f"{old}..{new - 1}", "epoch", epoch)
            if epoch != row.epoch:
                self.fail(f"{partition} is written under epoch {epoch}, and is claimed under {row.epoch}")
            self._check_rows(partition, old, new, rows.pop(partition, []))
        if rows:
            self.fail(f"rows of {rows} without their checkpoint")

    def _check_rows(self, partition: TopicPartition, old: int, new: int, rows: list[int]) -> None:
        between = [message.at for message in self.broker.logs[partition] if old <= message.at < new]
        good = [offset for offset in between if not self.is_poison(partition, offset)]
        if rows != good:
            self.fail(f"{partition} {old}..{new - 1} is written with the rows {rows}, not {good}")
        if lost := [at for at in between if at not in good and (partition.partition, at) not in self.lettered]:
            self.fail(f"{partition} {old}..{new - 1} is written before the letters of {lost}")

    def _check_at_least_once(self, rows: dict[TopicPartition, list[int]]) -> None:
        """Look at what is written: what comes before it was committed to Kafka."""
        for partition, offsets in rows.items():
            committed = self.broker.committed.get(partition, (0, ""))[0]
            self.log("commit", partition.partition, offsets, "from", committed)
            if committed <= offsets[0]:
                self._check_rows(partition, committed, offsets[-1] + 1, offsets)

    def on_kafka_commit(self, process: Process, partition: TopicPartition, offset: int) -> None:
        """Look at a commit to Kafka: everything below it is in the table or dead-lettered."""
        self.log("kafka", process.name, partition.partition, offset)
        row = self.database.rows.get(partition, Row())
        if self.mode == "postgres" and self.kind not in {"back", "all"} and offset > (row.next_offset or 0):
            self.fail(f"{partition} is committed at {offset}, above its checkpoint {row.next_offset}")
        there = {at for number, at in self.database.table if number == partition.partition}
        for message in self.broker.logs[partition]:
            at = message.at
            done = at in there or (partition.partition, at) in self.lettered
            if at < offset and not done and self.mode == "kafka":
                self.fail(f"{partition} is committed at {offset}, and {at} is nowhere")

    def _check_table(self) -> None:
        """Look at the end: every good message is in the table once, every poison one in the dead-letter topic."""
        there = Counter(self.database.table)
        for key in sorted(there.keys() | self.expected.keys()):
            wanted, count = self.expected[key], there[key]
            if count < min(wanted, 1) or (self.mode == "postgres" and count != wanted):
                self.fail(f"message {key} is in the table {count} times, not {wanted}")
        for partition in self.broker.partitions:
            repeats = sum(max(0, count - 1) for (number, _), count in there.items() if number == partition.partition)
            if self.mode == "kafka" and repeats > BATCH * self.hits[partition]:
                self.fail(f"{repeats} rows of {partition} are repeated, by {self.hits[partition]} crashes and losses")
        if wrong := self.lettered - self.refused - self.malformed:
            self.fail(f"good messages were dead-lettered: {sorted(wrong)}")
        if lost := (self.refused | self.malformed) - self.lettered - self.skipped:
            self.fail(f"poison messages are nowhere: {sorted(lost)}")


class Letters:
    """The dead-letter topic, as the daemon sees it."""

    def __init__(self, *_: object) -> None:
        self._process: Process = OWNER.get()  # type: ignore[assignment]

    async def send(self, batch: Batch, _: int) -> None:
        """Take letters, one after the other; each is acknowledged in a while."""
        world = self._process.world
        for position in sorted(set(batch.refused) - batch.lettered):
            await asyncio.sleep(world.rng.random() * world.latency)
            if world.rng.random() < world.letter_fault_rate:
                raise Outage("dead_letter", "the dead-letter topic does not acknowledge")
            world.lettered.add((batch.partition.partition, batch.messages[position].offset()))
            batch.lettered.add(position)

    def close(self) -> None:
        """Need nothing."""


class Topics:
    """The topics, which stay what they are."""

    def __init__(self, *_: object) -> None:
        self._process: Process = OWNER.get()  # type: ignore[assignment]

    async def find(self, *_: object) -> dict[str, Topic]:
        """Return the one topic."""
        count = len(self._process.world.broker.partitions)
        return {TOPIC: Topic(name=TOPIC, partitions=count, topic_id="id")}

    async def ensure_dead_letter(self, *_: object) -> None:
        """Find it good."""

    async def watch(self, *_: object) -> None:
        """See no change."""
        await asyncio.get_running_loop().create_future()

    async def confirm(self, *_: object) -> None:
        """See no change, after a while now and then."""
        world = self._process.world
        if world.rng.random() < 0.2:
            await asyncio.sleep(world.rng.random() * world.latency)


def _handler(mode: str) -> HandlerConfig:
    return HandlerConfig.model_validate({
        "name": TOPIC,
        "path": Path("orders.toml"),
        "topics": [TOPIC],
        "table": {"name": "orders", "write": "append"},
        "checkpoint": mode,
        "max_connections": 2,
        "batch": {"max_messages": BATCH, "max_age": 0.05},
        "poison": {"max_ratio": 1.0, "min_messages": 1},
    })  # fmt: skip


HANDLERS = {mode: _handler(mode) for mode in ("postgres", "kafka")}
CONFIG = Config.model_validate({
    "path": Path("consumerd.toml"),
    "kafka": {"bootstrap_servers": "nowhere:9092"},
    "postgres": {"dsn": "postgresql://nowhere/db"},
    "handlers": tuple(HANDLERS.values())[:1],
})  # fmt: skip
assert REVOKE_TIMEOUT < SESSION_TIMEOUT  # else every slow revoke would be an expulsion
