"""A simulated Postgres: checkpoint rows with locks, transactions, one table, and connections that fail in every way.

It knows the statements that the daemon says, by their text, and answers them as READ COMMITTED does: a row that is
locked is waited for and looked at again. A client that is gone is noticed only between two statements, as by a real
backend, so what was sent before may still take effect.

Over 400 lines, because locks, transactions and statements are one server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors as pg

from consumerd import checkpoint, postgres, watch
from consumerd.errors import Outage
from consumerd.types import TopicPartition
from tests.unit.simulation.loop import CLOCK, NEUTRAL

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from tests.unit.simulation.world import Process, World

LOCK_TIMEOUT = 10.0
FINGERPRINT, COPY = "fingerprint", "COPY"
Rows = list[tuple[Any, ...]]
Statement = "Generator[TopicPartition, None, Rows]"
FAULTS = ("before", "after", "deaf", "cancelled", "deadlock")
FAULT_WEIGHTS = (3, 4, 1, 2, 1)


@dataclass(slots=True)
class Row:
    """One row of the checkpoint table."""

    epoch: int = 0
    next_offset: int | None = None
    max_offset: int | None = None
    leader_epoch: int | None = None
    topic_id: str | None = None


@dataclass(slots=True)
class Transaction:
    """What an open transaction has done so far."""

    number: int
    moves: dict[TopicPartition, tuple[int, int, int | None]] = field(default_factory=dict)
    """Epoch, new offset and leader epoch."""
    rows: list[tuple[int, int]] = field(default_factory=list)
    savepoint: int = 0
    failed: bool = False


class Refused(pg.CheckViolation):
    """A row that the table's constraint refuses, with the line that COPY names, if it does."""

    def __init__(self, line: int | None) -> None:
        super().__init__("refused")
        self.line = line

    @property
    def diag(self) -> Any:  # noqa: ANN401
        """Say what Postgres says."""
        context = None if self.line is None else f"COPY orders, line {self.line}"
        return SimpleNamespace(
            source_function=None,
            constraint_name="good",
            column_name=None,
            context=context,
            message_primary="refused",
            message_detail=None,
            sqlstate="23514",
        )


@dataclass(frozen=True)
class Together:
    """Statements said in one round trip."""

    statements: tuple[tuple[Any, Any], ...]


class Cursor:
    """What a statement answers, or several one after the other."""

    description = True

    def __init__(self, rows: Rows, statusmessage: str, more: Sequence[Rows] = ()) -> None:
        self._rows = rows
        self._more = deque(more)
        self.statusmessage = statusmessage

    def nextset(self) -> bool | None:
        """Go on to the next statement's answer."""
        if not self._more:
            return None
        self._rows = self._more.popleft()
        return True

    async def fetchone(self) -> tuple[Any, ...] | None:
        """Return the first row."""
        return self._rows[0] if self._rows else None

    async def fetchall(self) -> Rows:
        """Return all rows."""
        return self._rows


class Backend:
    """The server's side of one connection."""

    def __init__(self, pid: int, process: Process) -> None:
        self.pid = pid
        self.process = process
        self.transaction: Transaction | None = None
        self.busy = False
        self.left = False
        """Whether the client is gone: noticed between two statements."""
        self.gone = False
        self.changed = 0.0
        self.waits_for: TopicPartition | None = None
        self.held: set[TopicPartition] = set()
        self.statement: Any = None
        self.answer: Callable[[Rows | psycopg.Error], None]


class Connection:
    """The client's side: what the daemon uses of psycopg's."""

    broken = False

    def __init__(self, database: Database, backend: Backend) -> None:
        self.closed = False
        self.info = SimpleNamespace(backend_pid=backend.pid)
        self.database = database
        self.backend = backend
        self.waiter: asyncio.Future[Cursor] | None = None
        self.was_cut = False

    def fileno(self) -> int:
        """Have no socket."""
        return -1

    async def execute(self, query: object, values: Any = None) -> Cursor:  # noqa: ANN401
        """Send one statement and wait for its answer."""
        if self.closed or self.was_cut:
            self.lose()
            raise psycopg.OperationalError("the connection is closed")
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            self.database.send(self, query, values, self.waiter)
            return await self.waiter
        finally:
            self.waiter = None

    async def close(self) -> None:
        """Leave; the server notices in a while."""
        self.lose()

    def cut(self) -> None:
        """Break the connection under whatever waits for it."""
        self.was_cut = True
        self.database.leave(self.backend)
        if self.waiter is not None:
            asyncio.get_running_loop().call_soon(self.fail, self.waiter)

    def fail(self, waiter: asyncio.Future[Cursor]) -> None:
        """Tell who waits that the connection is lost."""
        self.lose()
        if not waiter.done():
            waiter.set_exception(psycopg.OperationalError("server closed the connection unexpectedly"))

    def lose(self) -> None:
        """Be closed."""
        if not self.closed:
            self.closed = True
            self.database.leave(self.backend)


class Database:
    """The server. `fault_rate` is the share of statements that meet a fault."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.fault_rate = 0.0
        self.down_until = 0.0
        self.names_lines = self.rng.random() < 0.5
        self.rows: dict[TopicPartition, Row] = {}
        self.table: list[tuple[int, int]] = []
        self.backends: dict[int, Backend] = {}
        self.snapshot: tuple[dict[TopicPartition, Row], list[tuple[int, int]]] = ({}, [])
        self._pids = 0
        self._holders: dict[TopicPartition, Backend] = {}
        self._waiting: dict[TopicPartition, deque[Backend]] = {}
        self.outcomes: dict[str, str] = {}

    # What clients do.

    async def connect(self, process: Process) -> Connection:
        """Open a connection, or raise Outage."""
        await asyncio.sleep(self.rng.random() * 0.02)
        if CLOCK.now < self.down_until or self.rng.random() < self.fault_rate:
            raise Outage("postgres", "cannot connect to Postgres")
        self._pids += 1
        backend = self.backends[self._pids] = Backend(self._pids, process)
        process.connections.append(conn := Connection(self, backend))
        return conn

    def send(self, conn: Connection, query: object, values: Any, waiter: asyncio.Future[Cursor]) -> None:  # noqa: ANN401
        """Take a statement in, which arrives in a while."""
        backend = conn.backend
        backend.busy = True
        if query == "COMMIT":
            self.world.on_commit_sent(backend)
        fault = None
        if self.rng.random() < self.fault_rate:
            (fault,) = self.rng.choices(FAULTS, FAULT_WEIGHTS)
            self.world.log("fault", fault, backend.pid, str(query)[:20])
        self._later(self._arrive, conn, query, values, waiter, fault)

    def leave(self, backend: Backend) -> None:
        """Note that a client is gone, which its backend notices when it has nothing to do."""
        if not backend.left:
            backend.left = True
            if not backend.busy:
                self._later(self.end, backend)

    # What the server does.

    def end(self, backend: Backend) -> None:
        """End a backend: its transaction rolls back."""
        if not backend.gone:
            backend.gone = True
            del self.backends[backend.pid]
            if backend.waits_for is not None:
                self._waiting[backend.waits_for].remove(backend)
            self._finish(backend, "aborted")
            if backend.statement is not None:
                backend.statement = None
                backend.answer([])

    def restart(self, seconds: float, *, back: bool = False) -> None:
        """Go down, all transactions rolled back; come up some seconds later, perhaps as it was at the snapshot."""
        self.down_until = CLOCK.now + seconds
        for backend in list(self.backends.values()):
            self.end(backend)
        if back:
            rows, table = self.snapshot
            self.rows = {key: replace(row) for key, row in rows.items()}
            self.table = list(table)

    def take_snapshot(self) -> None:
        """Keep table and checkpoints as they are now."""
        self.snapshot = {key: replace(row) for key, row in self.rows.items()}, list(self.table)

    def _later(self, function: Callable[..., None], *values: object) -> None:
        self.world.loop.call_later(self.rng.random() * self.world.latency, function, *values, context=NEUTRAL)

    def _arrive(
        self,
        conn: Connection,
        query: object,
        values: Any,  # noqa: ANN401
        waiter: asyncio.Future[Cursor],
        fault: str | None,
    ) -> None:
        backend = conn.backend
        if fault == "before":
            self.end(backend)
        if backend.gone:
            self._later(conn.fail, waiter)
            return

        def answer(result: Rows | psycopg.Error) -> None:
            if fault == "after":
                self.end(backend)
            if fault == "after" or backend.gone:
                self._later(conn.fail, waiter)
            elif fault != "deaf":
                self._later(_deliver, waiter, result, query)

        backend.answer = answer
        errors: dict[str | None, psycopg.Error] = {"cancelled": pg.QueryCanceled(), "deadlock": pg.DeadlockDetected()}
        if fault in errors and query != "ROLLBACK":
            if isinstance(query, Together):  # it had begun
                self._simple(backend, *query.statements[0])
            self._done(backend, errors[fault])
        else:
            backend.statement = self._run(backend, query, values)
            self._resume(backend)

    def _resume(self, backend: Backend) -> None:
        """Go on with a statement until it is done, or waits for a lock."""
        while True:
            key = backend.waits_for
            try:
                if key is None:
                    key = next(backend.statement)
            except StopIteration as end:
                self._done(backend, end.value)
                return
            except psycopg.Error as error:
                self._done(backend, error)
                return
            backend.waits_for = None
            if self._holders.setdefault(key, backend) is not backend:
                backend.waits_for = key
                self._waiting.setdefault(key, deque()).append(backend)
                self.world.log("waits", backend.pid, key.partition, self._holders[key].pid)
                self.world.loop.call_later(LOCK_TIMEOUT, self._time_out, backend, backend.statement, context=NEUTRAL)
                return
            backend.held.add(key)

    def _time_out(self, backend: Backend, statement: object) -> None:
        if backend.statement is statement and backend.waits_for is not None:
            self._waiting[backend.waits_for].remove(backend)
            backend.waits_for = None
            self._done(backend, pg.LockNotAvailable())

    def _done(self, backend: Backend, result: Rows | psycopg.Error) -> None:
        backend.busy, backend.statement, backend.changed = False, None, CLOCK.now
        if backend.transaction is None:
            self._release(backend)
        elif isinstance(result, psycopg.Error):
            backend.transaction.failed = True
        backend.answer(result)
        if backend.left:
            self.end(backend)

    def _release(self, backend: Backend) -> None:
        for key in sorted(backend.held):
            if self._holders.get(key) is backend:
                del self._holders[key]
            if self._waiting.get(key):
                self.world.loop.call_soon(self._wake, key, context=NEUTRAL)
        backend.held.clear()

    def _wake(self, key: TopicPartition) -> None:
        """Hand a lock that was released to who has waited longest."""
        if key not in self._holders and (waiting := self._waiting[key]):
            self._resume(waiting.popleft())

    def _finish(self, backend: Backend, outcome: str) -> None:
        """End a transaction."""
        if backend.transaction is not None:
            self.outcomes[str(backend.transaction.number)] = outcome
            backend.transaction = None
        self._release(backend)

    # Statements.

    def _run(self, backend: Backend, query: Any, values: Any) -> Generator[TopicPartition, None, Rows]:  # noqa: ANN401
        """Run a statement; it yields the rows that it wants to lock."""
        transaction = backend.transaction
        if isinstance(query, Together):
            answers: Rows = []
            for one, its in query.statements:
                answer = yield from self._run(backend, one, its)
                answers.append((answer,))
            return answers
        if query in {"COMMIT", "ROLLBACK"}:
            if query == "COMMIT" and transaction is not None and not transaction.failed:
                self._commit(transaction)
                self._finish(backend, "committed")
                return [("COMMIT",)]
            self._finish(backend, "aborted")
            return [("ROLLBACK",)]
        if transaction is not None and transaction.failed and not str(query).startswith("ROLLBACK TO"):
            raise pg.InFailedSqlTransaction
        lockers = {checkpoint._ADVANCE: self._advance, checkpoint._CLAIM: self._claim, checkpoint._PLACE: self._place}
        if query in lockers:
            return (yield from lockers[query](backend, values))
        if transaction is not None and isinstance(query, str) and "SAVEPOINT" in query:
            if query.startswith("ROLLBACK TO"):
                del transaction.rows[transaction.savepoint :]
                transaction.failed = False
            elif query.startswith("SAVEPOINT"):
                transaction.savepoint = len(transaction.rows)
            return []
        return self._simple(backend, query, values)

    def _simple(self, backend: Backend, query: Any, values: Any) -> Rows:  # noqa: ANN401, C901, PLR0911, PLR0912
        if query == postgres.BEGIN:
            self._pids += 1
            backend.transaction = Transaction(self._pids)
            self.outcomes[str(self._pids)] = "in progress"
        elif query == COPY and backend.transaction is not None:
            self._copy(backend.transaction, values)
        elif query == FINGERPRINT:
            return [(FINGERPRINT,)]
        elif query == checkpoint._READ:
            return [
                (*key, self.rows[key].epoch, self.rows[key].next_offset) for key in _keys(values) if key in self.rows
            ]
        elif query == checkpoint._APPEAR:
            first = not self.rows
            for topic, count in zip(values["topics"], values["counts"], strict=True):
                for number in range(count):
                    self.rows.setdefault(TopicPartition(topic, number), Row(next_offset=None if first else -2))
        elif query == watch._STATE:
            return [self._state(self.backends[pid]) for pid in values["pids"] if pid in self.backends]
        elif query == watch._END_DEAF:
            if values["pid"] in self.backends:
                self.end(self.backends[values["pid"]])
        elif query == watch._END_BLOCKERS:
            return self._end_blockers(values["pid"], values["ours"])
        elif query == postgres._HISTORY:
            return [("00000001 1",)]
        elif query.startswith("SELECT generate_series"):
            return [(move,) for move in range(values["moves"])]
        elif "pg_current_xact_id" in query and backend.transaction is not None:
            return [(str(backend.transaction.number),)]
        elif "pg_xact_status" in query:
            return [(self.outcomes[values["id"]],)]
        elif not query.startswith(("SET lock_timeout", "LOCK TABLE", checkpoint._OTHER_GROUP)):
            raise AssertionError(f"the simulation does not know: {query}")
        return []

    def _claim(self, backend: Backend, values: Any) -> Generator[TopicPartition, None, Rows]:  # noqa: ANN401
        keys = [key for key in sorted(_keys(values)) if key in self.rows]
        for key in keys:
            yield key
        answer: Rows = []
        for key in keys:
            row = self.rows[key]
            row.epoch += "epoch + 1" in checkpoint._CLAIM
            self.world.on_claim(backend, key, row)
            fields = (row.topic_id, row.next_offset, row.max_offset, row.epoch, "orders", row.leader_epoch)
            answer.append((*key, *fields, 0, 0, 0.0))
        return answer

    def _advance(self, backend: Backend, values: Any) -> Generator[TopicPartition, None, Rows]:  # noqa: ANN401
        names = ("topics", "partitions", "epochs", "olds", "news", "leaders")
        moves = sorted(zip(*(values[name] for name in names), strict=True))
        self.world.on_advance(backend, {TopicPartition(*move[:2]): move[2] for move in moves})
        moved: Rows = []
        for topic, number, epoch, old, new, leader in moves:
            key = TopicPartition(topic, number)
            if not self._stands(key, epoch, old):
                continue
            yield key
            if self._stands(key, epoch, old):  # looked at again with the lock held
                moved.append(key)
                if backend.transaction is not None:
                    backend.transaction.moves[key] = epoch, new, leader
        return moved

    def _stands(self, key: TopicPartition, epoch: int, old: int) -> bool:
        """Whether a checkpoint is where a write expects it, as far as the statement asks for that."""
        row = self.rows.get(key, Row(epoch=-1))
        return ("c.epoch = e.epoch" not in checkpoint._ADVANCE or row.epoch == epoch) and (
            "c.next_offset = e.old_offset" not in checkpoint._ADVANCE or row.next_offset == old
        )

    def _place(self, backend: Backend, values: Any) -> Generator[TopicPartition, None, Rows]:  # noqa: ANN401
        key = TopicPartition(values["topic"], values["partition"])
        if key not in self.rows or self.rows[key].epoch != values["epoch"]:
            return []
        yield key
        row = self.rows[key]
        if row.epoch != values["epoch"]:
            return []
        self.world.log("place", backend.process.name, key.partition, row.next_offset, values["offset"])
        row.next_offset, row.topic_id, row.leader_epoch = values["offset"], values["topic_id"], None
        row.max_offset = values["offset"] if row.max_offset is None else row.max_offset
        return [(1,)]

    def _copy(self, transaction: Transaction, rows: Sequence[tuple[int, int]]) -> None:
        for line, row in enumerate(rows, 1):
            if row in self.world.refused:
                raise Refused(line if self.names_lines else None)
        transaction.rows += rows

    def _commit(self, transaction: Transaction) -> None:
        self.world.on_commit(transaction)
        for key, (_, new, leader) in transaction.moves.items():
            row = self.rows[key]
            row.next_offset, row.leader_epoch = new, leader
            row.max_offset = max(row.max_offset or 0, new)
        self.table += transaction.rows

    def _state(self, backend: Backend) -> tuple[Any, ...]:
        if backend.waits_for is not None:
            state, event = "active", "tuple"
        else:
            state, event = "idle" if backend.transaction is None else "idle in transaction", "ClientRead"
        return (backend.pid, state, event, str(backend.changed), None)

    def _end_blockers(self, pid: int, ours: list[int]) -> Rows:
        backend = self.backends.get(pid)
        if backend is None or backend.waits_for is None:
            return []
        blocker = self._holders.get(backend.waits_for)
        if blocker is None or blocker.pid in ours:
            return []
        self.world.log("terminated", blocker.pid, "by", backend.process.name)
        self.end(blocker)
        return [(blocker.pid, True)]


def _keys(values: Any) -> list[TopicPartition]:  # noqa: ANN401
    return [TopicPartition(*key) for key in zip(values["topics"], values["partitions"], strict=True)]


def _deliver(waiter: asyncio.Future[Cursor], result: Rows | psycopg.Error, query: object) -> None:
    if waiter.done():
        return
    if isinstance(result, psycopg.Error):
        waiter.set_exception(result)
    elif isinstance(query, Together):
        first, *others = [answer for (answer,) in result]
        waiter.set_result(Cursor(first, "", others))
    else:
        waiter.set_result(Cursor(result, result[0][0] if query in {"COMMIT", "ROLLBACK"} else ""))
