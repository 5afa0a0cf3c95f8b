"""What became of letters, in the schema of the daemon: a row for each that was touched (redriven or discarded).

A letter is its message: group, source topic (and its id, where that is known), partition, offset. Letters that were
written twice for one message are one. The daemon writes no row here: a letter without one is open.

A row moves by compare-and-set on its status and attempts, as the first statement of the transaction that does what it
says: of two redrives at once one finds that its letters were taken, and a transaction whose COMMIT was not answered is
known by its run. A letter that the handler may read again (its checkpoint is not behind it: the handler crashed between
letter and checkpoint) is not taken.

A letter whose message the handler has read again since (it halted or crashed between letter and checkpoint, or an
operator has set the offsets back) is passed over, once the checkpoint is past it: if the message failed again there is
another letter of it, if not it is a row. From where each epoch read is in `claims` (`consumerd.checkpoint`).

A letter that was written after its row moved is open again: an operator has set the offsets back, and the message
failed once more. Letters carry the epoch under which they were written, a row that of the checkpoint as it moved. By
time alone the late letter of a member that was stopped, and has long lost its partition, would be a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, LiteralString, NamedTuple

from psycopg import sql

from consumerd import postgres
from consumerd.errors import Halt
from consumerd.postgres import call

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.errors import Refusal
    from consumerd.postgres import Statement

Status = Literal["open", "failed", "redriven", "discarded"]

LETTERS = """\
CREATE TABLE IF NOT EXISTS {schema}.letters (
    group_id text NOT NULL,
    topic text NOT NULL,
    topic_id text NOT NULL DEFAULT '',
    partition integer NOT NULL,
    source_offset bigint NOT NULL,
    status text NOT NULL CHECK (status IN ('failed', 'redriven', 'discarded')),
    attempts integer NOT NULL,
    epoch bigint NOT NULL,
    failed_at timestamptz NOT NULL,
    reason text,
    error text,
    message text,
    sqlstate text,
    column_name text,
    target text,
    run uuid NOT NULL,
    changed_by text NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (group_id, topic, topic_id, partition, source_offset)
);
"""
"""What `consumerd setup` makes; a schema made before it gets it from that, or from the first command that needs it."""

GRANTS = "GRANT SELECT, INSERT, UPDATE ON {schema}.letters TO {role};\n"

_THERE = """\
SELECT 1 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = 'letters'"""

_READ = """\
SELECT topic, topic_id, partition, source_offset, status, attempts, epoch, failed_at, reason, error, message, sqlstate,
    column_name, target, run::text, changed_by, changed_at
FROM {schema}.letters WHERE group_id = %(group)s"""

_CHECKPOINTS = """\
SELECT topic, partition, topic_id, next_offset FROM {schema}.checkpoint WHERE group_id = %(group)s"""

_MOVE = """\
INSERT INTO {schema}.letters AS l (group_id, topic, topic_id, partition, source_offset, status, attempts, epoch,
    failed_at, reason, error, message, sqlstate, column_name, target, run, changed_by)
SELECT %(group)s, w.topic, w.topic_id, w.partition, w.source_offset, w.status, w.attempts, greatest(w.epoch, {epoch}),
    w.failed_at, w.reason, w.error, w.message, w.sqlstate, w.column_name, %(target)s, %(run)s, %(who)s
FROM unnest(%(topics)s::text[], %(ids)s::text[], %(partitions)s::int[], %(offsets)s::int8[], %(statuses)s::text[],
            %(attempts)s::int[], %(epochs)s::int8[], %(failed_at)s::timestamptz[], %(reasons)s::text[],
            %(errors)s::text[], %(messages)s::text[], %(sqlstates)s::text[], %(columns)s::text[])
         AS w (topic, topic_id, partition, source_offset, status, attempts, epoch, failed_at, reason, error, message,
               sqlstate, column_name)
WHERE {settled}
ORDER BY w.topic, w.topic_id, w.partition, w.source_offset
ON CONFLICT (group_id, topic, topic_id, partition, source_offset) DO UPDATE
SET status = excluded.status, attempts = excluded.attempts, epoch = excluded.epoch, failed_at = excluded.failed_at,
    reason = excluded.reason, error = excluded.error, message = excluded.message, sqlstate = excluded.sqlstate,
    column_name = excluded.column_name, target = excluded.target, run = excluded.run,
    changed_by = excluded.changed_by, changed_at = now()
WHERE (l.topic, l.topic_id, l.partition, l.source_offset, l.status, l.attempts) IN (
    SELECT * FROM unnest(%(topics)s::text[], %(ids)s::text[], %(partitions)s::int[], %(offsets)s::int8[],
                         %(was)s::text[], %(tried)s::int[]))
RETURNING topic, topic_id, partition, source_offset"""

_EPOCH = """\
coalesce((SELECT c.epoch FROM {schema}.checkpoint c
          WHERE c.group_id = %(group)s AND c.topic = w.topic AND c.partition = w.partition), 0)"""

_SETTLED = """\
EXISTS (SELECT FROM {schema}.checkpoint c
        WHERE c.group_id = %(group)s AND c.topic = w.topic AND c.partition = w.partition
          AND (c.next_offset > w.source_offset OR (w.topic_id <> '' AND c.topic_id <> w.topic_id)))
AND NOT EXISTS (SELECT FROM {schema}.claims k
        WHERE k.group_id = %(group)s AND k.topic = w.topic AND k.partition = w.partition AND k.epoch > w.epoch
          AND k.next_offset <= w.source_offset AND (w.topic_id = '' OR coalesce(k.topic_id = w.topic_id, true)))"""
"""The handler does not read the message again: it is behind its checkpoint, or its topic was made again since. And it
has not read it again since: what became of the message then is another letter, or a row."""

_CLAIMS = """\
SELECT topic, partition, topic_id, epoch, next_offset FROM {schema}.claims WHERE group_id = %(group)s"""


class Place(NamedTuple):
    """A partition that letters come from; `topic_id` is empty where it is not known."""

    topic: str
    topic_id: str
    partition: int


class Claim(NamedTuple):
    """From where the messages of a partition were read under an epoch."""

    topic_id: str | None
    epoch: int
    next_offset: int


class State(NamedTuple):
    """The row of a letter."""

    status: Status
    attempts: int
    """Times that its message was tried, by the handler and since."""
    epoch: int
    """The checkpoint's, when the row moved."""
    failed_at: dt.datetime
    reason: str | None
    """Why it failed again; that, and what follows, of a letter that did."""
    error: str | None
    message: str | None
    sqlstate: str | None
    column: str | None
    target: str | None
    """The table or topic that it was redriven into."""
    run: str
    changed_by: str
    changed_at: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One letter, and what becomes of it; `refusal` for one that failed again."""

    place: Place
    offset: int
    was: Status
    """The status of its row, as it was read; `open` where it had none."""
    tried: int
    """Times that its message was tried by then."""
    status: Status
    epoch: int
    """Under which the letter was written. A database that was restored may have an older one."""
    failed_at: dt.datetime
    refusal: Refusal | None = None

    @property
    def attempts(self) -> int:
        """Times that it was tried with this: to discard is no try."""
        return self.tried + (self.status != "discarded")


class Letters:
    """The rows of one group's letters, as one run of a command reads and moves them."""

    def __init__(self, schema: str, group: str, *, run: str, who: str, guarded: bool) -> None:
        self._schema_name = schema
        self._schema = sql.Identifier(schema)
        self._group = group
        self.run = run
        self._who = who
        # Whether there are checkpoints in Postgres that tell what the handler has behind it.
        settled, epoch = (_SETTLED, _EPOCH) if guarded else ("true", "0")
        names = {"schema": self._schema, "epoch": sql.SQL(epoch).format(schema=self._schema)}
        self._move = sql.SQL(_MOVE).format(**names, settled=sql.SQL(settled).format(schema=self._schema))
        self._discard = sql.SQL(_MOVE).format(**names, settled=sql.SQL("true"))

    async def read(self, conn: AsyncConnection[Any]) -> dict[Place, dict[int, State]]:
        """Return the rows that there are."""
        if not await call(conn, _THERE, {"schema": self._schema_name}):
            return {}
        states: dict[Place, dict[int, State]] = {}
        for topic, topic_id, partition, offset, *state in await self._call(conn, _READ):
            states.setdefault(Place(topic, topic_id, partition), {})[offset] = State(*state)
        return states

    async def checkpoints(self, conn: AsyncConnection[Any]) -> dict[tuple[str, int], tuple[str | None, int]]:
        """Return topic id and offset of the group's checkpoints."""
        return {
            (topic, partition): (topic_id, next_offset or 0)
            for topic, partition, topic_id, next_offset in await self._call(conn, _CHECKPOINTS)
        }

    async def claims(self, conn: AsyncConnection[Any]) -> dict[tuple[str, int], list[Claim]]:
        """Return the claims of the group's partitions."""
        claims: dict[tuple[str, int], list[Claim]] = {}
        for topic, partition, *claim in await self._call(conn, _CLAIMS):
            claims.setdefault((topic, partition), []).append(Claim(*claim))
        return claims

    def move(self, changes: Sequence[Change], target: str | None) -> Statement:
        """Return what moves letters, in the order of their keys; it answers with a row for each that stood as read.

        To discard a letter takes no checkpoint behind it.
        """
        refusals = [change.refusal for change in changes]
        discards = all(change.status == "discarded" for change in changes)
        return self._discard if discards else self._move, {
            "group": self._group,
            "topics": [change.place.topic for change in changes],
            "ids": [change.place.topic_id for change in changes],
            "partitions": [change.place.partition for change in changes],
            "offsets": [change.offset for change in changes],
            "statuses": [change.status for change in changes],
            "attempts": [change.attempts for change in changes],
            "epochs": [change.epoch for change in changes],
            "failed_at": [change.failed_at for change in changes],
            "reasons": [refusal and refusal.reason for refusal in refusals],
            "errors": [refusal and refusal.error for refusal in refusals],
            "messages": [refusal and refusal.message for refusal in refusals],
            "sqlstates": [refusal and refusal.sqlstate for refusal in refusals],
            "columns": [refusal and refusal.column for refusal in refusals],
            "was": [change.was for change in changes],
            "tried": [change.tried for change in changes],
            "target": target,
            "run": self.run,
            "who": self._who,
        }

    async def _call(self, conn: AsyncConnection[Any], text: LiteralString) -> list[tuple[Any, ...]]:
        return await call(conn, sql.SQL(text).format(schema=self._schema), {"group": self._group})


async def ensure_letters(conn: AsyncConnection[Any], schema: str) -> None:
    """Make the table in a schema that has none; raises Halt with what to type."""
    if await call(conn, _THERE, {"schema": schema}):
        return
    name = sql.Identifier(schema)
    try:
        async with postgres.transaction(conn):
            await conn.execute("SELECT pg_advisory_xact_lock(hashtext('consumerd setup'))")
            there = await conn.execute("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = %s", [schema])
            if not there.rowcount:  # of a handler that keeps no checkpoint there; else its owner alone may say this
                await conn.execute(sql.SQL("CREATE SCHEMA {}").format(name))
            await conn.execute(sql.SQL(LETTERS).format(schema=name))
    except Halt as halt:
        raise Halt(
            "database",
            f"cannot make table {schema}.letters: {halt}; let an owner run what `consumerd setup --sql` prints",
        ) from halt
