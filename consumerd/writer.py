"""The path of a batch: one loop for each connection, read from top to bottom.

`Writer.run` takes batches that are due, `_write` tries until each is settled, and `_attempt` is one try: transform,
pack, judge, dead-letter, then one transaction with checkpoint and rows. Whatever goes wrong leaves it as one of our
errors, whose class says what happens next (`consumerd.errors`).

Over 400 lines, because the order of these steps is what exactly-once hangs on, and it is read in one place.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from consumerd import postgres
from consumerd.catalog import fingerprint_query
from consumerd.checkpoint import Lease, Move
from consumerd.errors import Blocked, Cancelled, Fenced, Halt, Outage, Rejected, TableChanged
from consumerd.isolate import ORPHANS, isolate
from consumerd.sinks.copy import CopyData
from consumerd.ways_on import Skip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.accumulator import Batch
    from consumerd.errors import Refusal
    from consumerd.live_table import Mapping
    from consumerd.member import Member
    from consumerd.packed import Packed
    from consumerd.postgres import Statement, TransactionId

Work = list[tuple["Batch", Lease]]
"""Batches of one write, all for one table, each with the lease that its partition had when it was taken."""

FRUITLESS_ISOLATIONS = 5
"""Times that one message's row may be refused by a write and not in isolation, before that is a halt."""
MOST_PREPARED = 16
"""Staging tables of one connection: each COMMIT truncates all of them (19 ms for 50, 224 ms for 200), and to make one
again costs as much as to truncate some twenty (measured)."""
ORPHAN_PATIENCE = 3.0
"""Seconds that rows with a foreign key to nothing are tried again: what they refer to may be on its way."""


class Writer:
    """One connection to Postgres, and what is written through it."""

    def __init__(self, member: Member, name: str) -> None:
        self._member = member
        self._name = name
        self._conn: AsyncConnection[Any] | None = None
        self._prepared: dict[str, Mapping] = {}
        """For which mapping of each table the connection is ready, the one used last at the end."""
        self.work: Work = []
        """What is being written now."""
        self.writing = False
        """Whether a transaction that writes is open."""
        self._began = 0.0
        """When the last try began, monotonic."""
        self._doubt: tuple[TransactionId, Work] | None = None
        """The transaction whose COMMIT was not answered, where no checkpoint tells what became of it."""

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        try:
            while True:
                self.work = []
                self.work = await self._member.next_work()
                await self._write(self.work)
        finally:
            self.work = []
            await self.abort()

    async def abort(self) -> None:
        """Close this writer's connection; the server rolls back."""
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await conn.close()

    def cut(self) -> None:
        """Break the connection under a transaction, which gets an error and closes it."""
        if self._conn is not None and self._conn in postgres.busy_since:
            postgres.cut(self._conn)

    async def _write(self, work: Work) -> None:
        """Try until each batch is written or its partition is no longer held."""
        try:
            await self._member.retry(self._name, self._settle, work)
        except Halt as halt:
            if await self._member.held_up.hold(work, halt):
                self._member.recovered(self._name)
                return
            where = ", ".join(f"{b.partition} offsets {b.first_offset}..{b.next_offset - 1}" for b, _ in work)
            ways = halt.ways or _messages_of(work, halt)
            raise Halt(halt.reason, f"{halt} (at {where}; nothing of it was skipped)", *ways) from halt
        self._member.recovered(self._name)

    async def _settle(self, work: Work) -> None:
        """Write all, or give back what waits for something that concerns no other."""
        try:
            await self._until_settled(work)
        except Blocked as blocked:
            if self._doubt is not None or not (blocked.source == "transform" or self._member.tables.by_topic):
                raise  # only here it is known which COMMIT was not answered; or all wait for the one table
            seconds = time.monotonic() - self._began
            for batch, lease in work:
                if self._member.holds(batch, lease):
                    self._member.give_back(batch, blocked, seconds)

    async def _until_settled(self, work: Work) -> None:
        while work := [(batch, lease) for batch, lease in work if self._member.holds(batch, lease)]:
            table = self._member.tables.of(work[0][0].partition.topic)
            mapping = table.mapping
            try:
                if self._doubt is not None:
                    await self._settle_doubt(*self._doubt)
                elif self._member.committed(work):
                    await self._step(work, mapping)
                else:
                    await self._member.wait_for_commits(work)
            except TableChanged as changed:
                _forget_refusals(work)
                await table.follow(mapping, changed)
            except Fenced:
                await self._member.reconciler.fenced(work)
            except Outage as outage:
                await self._meet(outage, work)
                if any(self._member.holds(batch, lease) for batch, lease in work):
                    raise

    async def _meet(self, outage: Outage, work: Work) -> None:
        """Let go of the connection, and do what can be done now: fewer rows next, or what owes no letters."""
        if outage.source == "transform":
            return
        await self.abort()
        if isinstance(outage, Cancelled):
            self._member.cancelled(work, time.monotonic() - self._began)
        elif outage.source == "dead_letter":
            free = [(batch, lease) for batch, lease in work if not batch.owes_letters]
            if len(free) < len(work):
                await self._until_settled(free)

    async def _step(self, work: Work, mapping: Mapping) -> None:
        """Write, or learn which of it is refused: a write of several batches goes again one by one."""
        self._began = time.monotonic()
        if sum(len(batch.messages) for batch, _ in work) > self._member.limit:
            if len(work) > 1:
                await self._one_by_one(work)
                return
            if not work[0][0].on_their_way and not work[0][0].in_doubt:
                self._member.split(work[0][0], self._member.limit)
        try:
            await self._attempt(work, mapping)
        except Rejected as rejected:
            named = rejected.row
        else:
            return
        # Outside of the `except`, whose traceback holds what was encoded.
        if len(work) == 1:
            await self._isolate(*work[0], mapping, named)
        else:
            await self._one_by_one(work)

    async def _one_by_one(self, work: Work) -> None:
        blocked = None
        for one in work:
            try:
                await self._until_settled([one])
            except Blocked as it:
                if it.source != "transform":
                    raise  # they have one table
                blocked = it
        if blocked is not None:
            raise blocked

    async def _attempt(self, work: Work, mapping: Mapping) -> None:
        """One write, from raw messages to the checkpoint. Letters are acknowledged before any offset moves."""
        member = self._member
        work = await self._transformed(work)
        if not work:
            return
        await member.confirm_topics(max(batch.arrived for batch, _ in work))
        async with member.packing:
            data = await _packed(work, mapping)
        if not all(member.holds(batch, lease) for batch, lease in work):
            return  # given up while some of it was packed again
        if any(batch.owes_letters for batch, _ in work) and member.handler.poison.action != "skip":
            await self._confirm(mapping)  # what is passed over is confirmed by the write's own transaction
        for batch, lease in work:
            if not await self._settle_poison(batch, lease):
                return  # it is a smaller batch now
        started = time.monotonic()
        conn = await self._connection(mapping)
        if not all(member.holds(batch, lease) for batch, lease in work):
            return  # given up while the letters were under way
        self.writing = True
        existing = 0
        try:
            async with postgres.transaction(conn, *self._opening(work, mapping), probe=member.on_trial) as answers:
                _check(answers, work, mapping)
                _be_in_doubt(work, doubt=False)  # the checkpoints are where they were before
                if data.rows:
                    existing = await mapping.sink.write(conn, data)
                if member.checkpoints.mode == "kafka":
                    self._doubt = await postgres.transaction_id(conn), work
                _be_in_doubt(work, doubt=True)
            self._doubt = None
        except (Rejected, TableChanged, Blocked, Cancelled, Halt):
            self._doubt = None  # Postgres has answered
            _be_in_doubt(work, doubt=False)
            raise
        finally:
            self.writing = False
            member.settled()
        member.written(work, time.monotonic() - started, existing)
        member.recovered(self._name, "postgres", "dead_letter")

    async def _transformed(self, work: Work) -> Work:
        """Return the batches that are transformed now and fit into memory together; the others go again.

        Raises Outage when it cannot be done now for any.
        """
        transformer = self._member.transformer
        if transformer is None:
            return work
        done: Work = []
        size = 0
        outage: Outage | None = None
        for batch, lease in work:
            try:
                size += await transformer.complete(batch)
            except Outage as error:
                outage = error
                continue
            if len(batch.outcomes) < len(batch.messages):
                self._member.split(batch, len(batch.outcomes))
            done.append((batch, lease))
            if size > self._member.budget.batch.max_bytes:
                break
        if not done and outage is not None:
            raise outage
        return [(batch, lease) for batch, lease in done if self._member.holds(batch, lease)]

    async def _confirm(self, mapping: Mapping) -> None:
        """Raise TableChanged when the table is not as it was read: what was refused for it may fit it now."""
        conn = await self._connection(mapping)
        async with postgres.transaction(conn, (fingerprint_query(mapping.table.name), None), probe=True) as (found,):
            pass
        if found != [(mapping.table.fingerprint,)]:
            raise TableChanged(f"table {mapping.table.name} is not as it was read from the catalog")

    async def _settle_doubt(self, transaction: TransactionId, work: Work) -> None:
        """Ask what became of a COMMIT that was not answered; raises Outage while the server does not know."""
        conn = await self._connection(self._member.tables.of(work[0][0].partition.topic).mapping)
        if await postgres.was_committed(conn, transaction):
            self._member.written([(batch, lease) for batch, lease in work if self._member.holds(batch, lease)], 0.0)
        self._doubt = None
        _be_in_doubt(work, doubt=False)

    def _opening(self, work: Work, mapping: Mapping) -> list[Statement]:
        """Return what moves the checkpoints, first of all, and what tells whether the table is as it was."""
        moves = [
            Move(
                partition=batch.partition,
                lease=lease,
                new=batch.next_offset,
                leader_epoch=batch.leader_epoch,
                tally=self._member.breaker.tally(batch.partition),
                rows=batch.rows,
                refused=len(batch.refused),
                skipped=batch.skipped.total(),
            )
            for batch, lease in work
        ]
        table = mapping.table
        return [self._member.checkpoints.advance(moves), (table.lock, None), (fingerprint_query(table.name), None)]

    async def _isolate(self, batch: Batch, lease: Lease, mapping: Mapping, named: int | None) -> None:
        """Find the rows that Postgres refuses and add them to the batch's refusals; write nothing."""
        member = self._member
        rows = mapping.rows(batch.messages, batch.refused, batch.outcomes)
        starts = [at for at, position in enumerate(rows.positions) if at == 0 or rows.positions[at - 1] != position]
        conn = await self._connection(mapping)
        work = [(batch, lease)]
        async with postgres.transaction(conn, *self._opening(work, mapping), probe=True) as answers:
            _check(answers, work, mapping)
            refused, settled = await isolate(
                conn,
                mapping.sink,
                rows.rows,
                named,
                starts=starts,
                at_least=member.breaker.lacks(batch),
                now=time.monotonic,
            )
        if any(refusal.sqlstate in ORPHANS for refusal in refused.values()):
            _be_patient(batch)
        positions = [rows.positions[start] for start in starts]
        if settled < len(positions):
            member.split(batch, positions[settled])
        batch.refused |= {positions[message]: refusal for message, refusal in refused.items()}
        member.isolated(batch, refused)
        if not refused and settled == len(positions):
            self._cut_or_halt(batch)
        if member.handler.table.write != "upsert":
            _refuse_repeats(batch, lease)

    def _cut_or_halt(self, batch: Batch) -> None:
        """Make smaller what is refused as a whole and in none of its rows.

        They are valid one after the other, and not in the order of an upsert's statement: a unique value moved from one
        key to another, say. Or they are valid now.
        """
        if len(batch.messages) > 1 and not batch.on_their_way:
            self._member.split(batch, len(batch.messages) // 2)
            return
        batch.fruitless += 1
        if batch.fruitless >= FRUITLESS_ISOLATIONS:
            raise Halt("database", "Postgres refuses a message's row, and then it does not, again and again")
        raise Outage("postgres", "Postgres refused a row, and then it did not")

    async def _settle_poison(self, batch: Batch, lease: Lease) -> bool:
        """Judge a batch, good ones too, and do with its poison what the handler says: send the letters it has, say.

        False when what lies before its first poison was made a batch of its own, which is written first.
        """
        member, action = self._member, self._member.handler.poison.action
        if action == "halt" and batch.refused:
            if first := min(batch.refused):
                member.split(batch, first)
                return False
            raise _poisoned(batch, member)
        member.breaker.judge(batch, time.monotonic())
        if action == "dead-letter":
            await member.letters.send(batch, member.epoch_of_letters(batch.partition, lease))
        return True

    async def _connection(self, mapping: Mapping) -> AsyncConnection[Any]:
        """Return the open connection, made ready for the sink."""
        if self._conn is None or self._conn.closed:
            self._conn = await self._member.connect()
            self._prepared = {}
        name = mapping.table.name
        known = self._prepared.pop(name, None)
        if known is not mapping:
            async with postgres.transaction(self._conn):
                while len(self._prepared) >= MOST_PREPARED:
                    await self._prepared.pop(next(iter(self._prepared))).sink.forget(self._conn)
                await mapping.sink.prepare(self._conn)
        self._prepared[name] = mapping  # the last one used
        return self._conn


def _be_in_doubt(work: Work, *, doubt: bool) -> None:
    for batch, _ in work:
        batch.in_doubt = doubt


def _forget_refusals(work: Work) -> None:
    """Forget what was refused for the table as it was, by a transform too (`outcomes` has it), but for what is told."""
    for batch, _ in work:
        told = batch.lettered | batch.on_their_way
        batch.refused = {at: why for at, why in batch.refused.items() if at in told}


async def _packed(work: Work, mapping: Mapping) -> CopyData:
    """Put together what came packed, and pack what did not, was made for another table, or has been refused since.

    What the pieces refuse is noted in their batches.
    """
    data = CopyData()
    for batch, _ in work:
        start, before = 0, data.rows
        batch.skipped, batch.extra = Counter(), 0
        for piece in batch.packed:
            known = _within(batch.refused, start, piece.messages)
            if piece.mapping is not mapping or not known.keys() <= piece.refused.keys():
                span = slice(start, start + piece.messages)
                piece = await _packed_again(batch, span, known, mapping, data.rows)  # noqa: PLW2901
            data.packed += piece.data
            data.rows += piece.rows
            batch.refused |= {start + position: why for position, why in piece.refused.items()}
            batch.skipped += piece.skipped
            batch.extra += piece.extra
            start += piece.messages
        became, skipped = data.rows - before - batch.extra, batch.skipped.total()
        if not start == became + len(batch.refused) + skipped == len(batch.messages):
            others = f"{len(batch.refused)} were refused and {skipped} skipped"
            raise Halt("bug", f"{became} messages became rows, {others}, of {len(batch.messages)}")
    return data


async def _packed_again(batch: Batch, span: slice, refused: dict[int, Refusal], mapping: Mapping, rows: int) -> Packed:
    await asyncio.sleep(0)  # who waits for an answer of Postgres has a turn between two pieces
    try:
        return mapping.pack(batch.messages[span], refused, batch.outcomes[span])
    except Rejected as rejected:
        raise Rejected(rejected.refusal, None if rejected.row is None else rows + rejected.row) from rejected


def _within(refused: dict[int, Refusal], start: int, messages: int) -> dict[int, Refusal]:
    """Return those refused of a piece of a batch, by their positions in the piece."""
    if not refused:
        return {}
    return {position - start: why for position, why in refused.items() if start <= position < start + messages}


def _check(answers: Sequence[Sequence[tuple[Any, ...]]], work: Work, mapping: Mapping) -> None:
    """Look at what the opening statements of a write said; raises Fenced, TableChanged."""
    moved, _, fingerprint = answers
    if len(moved) < len(work):
        raise Fenced
    if fingerprint != [(mapping.table.fingerprint,)]:
        raise TableChanged(f"table {mapping.table.name} is not as it was read from the catalog")


def _poisoned(batch: Batch, member: Member) -> Halt:
    """Say which message a handler that passes none over cannot write: the first of a batch."""
    partition, refusal, offset = batch.partition, batch.refused[0], batch.messages[0].offset()
    column = f" in {refusal.column}" if refusal.column else ""
    bootstrap, group = member.config.kafka.bootstrap_servers, member.handler.group_id
    return Halt(
        "poison",
        f"topic {partition.topic} partition {partition.partition} offset {offset} cannot become a row: "
        f"{refusal.message}{column} ({refusal.reason}), and [poison] action is halt; mend the table or the mapping; or "
        f"write another action under [poison]; Kafka's own tool passes over this one message as well: "
        f"kafka-consumer-groups --bootstrap-server {bootstrap} --group {shlex.quote(group)} "
        f"--reset-offsets --topic {partition} "
        f"--to-offset {offset + 1} --execute",
        Skip(partition=partition, first=offset, end=offset + 1),
    )


def _messages_of(work: Work, halt: Halt) -> list[Skip]:
    """Return the messages of a write one of which may be passed over: it may be one's fault, and somebody knows whose.

    Where it is the table's, it is no message's.
    """
    if halt.reason == "table":
        return []
    return [Skip(partition=b.partition, first=b.messages[0].offset(), end=b.next_offset) for b, _ in work if b.messages]


def _be_patient(batch: Batch) -> None:
    """Have a batch tried again for a while: what its rows refer to may be written by somebody else in a moment."""
    now = time.monotonic()
    batch.orphaned_since = batch.orphaned_since or now
    if now - batch.orphaned_since < ORPHAN_PATIENCE:
        raise Outage(
            "postgres",
            f"rows of {batch.partition} refer to rows that are not there (yet), or delete rows that others refer to",
        )


def _refuse_repeats(batch: Batch, lease: Lease) -> None:
    """Halt when an append's duplicate is a message below the highest offset ever written: it is no poison."""
    for position, refusal in batch.refused.items():
        offset = batch.messages[position].offset()
        if refusal.sqlstate == "23505" and offset < lease.max_offset:
            raise Halt(
                "checkpoint",
                f"{batch.partition} was set back to before {lease.max_offset}, and its rows are in the table already "
                f"(a unique index refuses offset {offset}); delete those rows, or set the offset forward again with "
                f"kafka-consumer-groups --reset-offsets",
                Skip(partition=batch.partition, first=offset, end=offset + 1),
            )
