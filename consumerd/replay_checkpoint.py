"""Where a replay stands: its record, and the checkpoints of its partitions, each with the range that it goes through.

A replay's checkpoints are rows like a handler's, moved by the same compare-and-set in the rows' transaction, but in a
table of their own: whoever reads the daemon's checkpoints (a claim, lag, a daemon of an older version) need not know
that there are replays. Their group is `<group_id>/replay/<id>`, and no id comes twice, so what a zombie
of a replay that was forgotten still writes finds no row, and is fenced. Each move counts what became of the messages
between, so the counts are as exact as the rows are.

A replay that must end at the handler's own checkpoint (it repeats old rows over newer ones, which the last of them then
are again) moves only while that checkpoint stands there, under the epoch that it had: once the handler has gone on,
every write is fenced.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from consumerd.checkpoint import Checkpoints, KafkaCheckpoints, Stand
from consumerd.postgres import call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from psycopg import AsyncConnection

    from consumerd.checkpoint import Lease, Move
    from consumerd.decide import Mode, Stored
    from consumerd.postgres import Statement
    from consumerd.topics import Topic
    from consumerd.types import TopicPartition

TABLE: Final = "replay_checkpoint"

SCHEMA: Final = """\
CREATE TABLE IF NOT EXISTS {schema}.replays (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    handler text NOT NULL,
    group_id text NOT NULL,
    range text NOT NULL,
    target text NOT NULL,
    runs integer NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    failed text
);
CREATE UNIQUE INDEX IF NOT EXISTS replays_open ON {schema}.replays (group_id, range, target) WHERE finished_at IS NULL;
CREATE TABLE IF NOT EXISTS {schema}.replay_checkpoint (
    LIKE {schema}.checkpoint INCLUDING ALL,
    first_offset bigint NOT NULL,
    end_offset bigint NOT NULL,
    live_epoch bigint,
    rows bigint NOT NULL DEFAULT 0,
    refused bigint NOT NULL DEFAULT 0,
    skipped bigint NOT NULL DEFAULT 0
);
"""
"""What `consumerd setup` makes for replays. One that has ended stays on record with its ranges, until it is forgotten:
the same messages are not to be appended to the same table once more. One that was seen long ago and has not ended was
interrupted."""

GRANTS: Final = """\
GRANT SELECT, INSERT, UPDATE, DELETE ON {schema}.replays, {schema}.replay_checkpoint TO {role};
"""

_ADVANCE: Final = """\
WITH expected AS (
    SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::int[], %(epochs)s::int8[], %(olds)s::int8[],
                         %(news)s::int8[], %(leaders)s::int[], %(judged)s::int8[], %(poison)s::int8[],
                         %(rows)s::int8[], %(refused)s::int8[], %(skipped)s::int8[])
        AS e (topic, partition, epoch, old_offset, new_offset, leader_epoch, judged, poison, rows, refused, skipped)
), live AS MATERIALIZED (
    SELECT topic, partition FROM {schema}.checkpoint l JOIN {checkpoint} c USING (topic, partition)
    WHERE c.group_id = %(group)s AND l.group_id = %(live)s AND l.epoch = c.live_epoch AND l.next_offset = c.end_offset
      AND (topic, partition) IN (SELECT e.topic, e.partition FROM expected e)
    ORDER BY topic, partition FOR SHARE OF l
), held AS (
    SELECT e.* FROM {checkpoint} c JOIN expected e USING (topic, partition)
    WHERE c.group_id = %(group)s AND c.epoch = e.epoch AND c.next_offset = e.old_offset
      AND (c.live_epoch IS NULL OR (topic, partition) IN (SELECT live.topic, live.partition FROM live))
    ORDER BY topic, partition FOR UPDATE OF c
)
UPDATE {checkpoint} c
SET next_offset = h.new_offset, max_offset = greatest(c.max_offset, h.new_offset),
    leader_epoch = coalesce(h.leader_epoch, c.leader_epoch), seen_at = now(),
    judged_messages = h.judged, judged_refused = h.poison, judged_at = now(),
    rows = c.rows + h.rows, refused = c.refused + h.refused, skipped = c.skipped + h.skipped
FROM held h WHERE c.group_id = %(group)s AND c.topic = h.topic AND c.partition = h.partition
RETURNING c.topic, c.partition"""

_MOVED_ON: Final = """\
SELECT c.topic, c.partition FROM {checkpoint} c
WHERE c.group_id = %(group)s AND c.live_epoch IS NOT NULL AND NOT EXISTS (
    SELECT FROM {schema}.checkpoint l WHERE l.group_id = %(live)s AND l.topic = c.topic AND l.partition = c.partition
      AND l.epoch = c.live_epoch AND l.next_offset = c.end_offset)
ORDER BY 1, 2 LIMIT 1"""


class Range(NamedTuple):
    """Offsets [start, end) of one partition."""

    start: int
    end: int


class ReplayCheckpoints(Checkpoints):
    """The checkpoints of one replay; its rows were made when it began."""

    def __init__(self, schema: str, group: str, target: Callable[[str], str], *, live: str) -> None:
        super().__init__(schema, group, target, table=TABLE)
        self._live = live
        """The handler's own group."""
        self._advance = self._sql(_ADVANCE)

    def advance(self, moves: Sequence[Move]) -> Statement:
        """Return what moves the checkpoints, and counts; none moves that waits for a handler which has gone on."""
        statement, values = super().advance(moves)
        return statement, {
            **(values or {}),
            "live": self._live,
            "poison": [move.tally.refused for move in moves],
            "rows": [move.rows for move in moves],
            "refused": [move.refused for move in moves],
            "skipped": [move.skipped for move in moves],
        }

    async def moved_on(self, conn: AsyncConnection[Any]) -> str | None:
        """Return a partition of which the handler has gone on since the replay was made to end at its checkpoint."""
        found = await call(conn, self._sql(_MOVED_ON), {"group": self.group, "live": self._live})
        return f"{found[0][0]}:{found[0][1]}" if found else None


class TrialCheckpoints(KafkaCheckpoints):
    """No checkpoints: of a trial, whose every write is rolled back, nothing stays. Each move succeeds."""

    mode: Mode = "postgres"

    def __init__(
        self,
        group: str,
        target: Callable[[str], str],
        ranges: Mapping[TopicPartition, Range],
        leases: Callable[[], Mapping[TopicPartition, Lease]],
    ) -> None:
        super().__init__(group, target)
        self._ranges = ranges
        self._leases = leases

    async def look(
        self,
        conn: AsyncConnection[Any],
        partitions: Sequence[TopicPartition],
        topics: Mapping[str, Topic],
    ) -> dict[TopicPartition, Stored]:
        """Return where each partition's range begins."""
        unseen = await super().look(conn, partitions, topics)
        return {p: replace(stored, next_offset=self._ranges[p].start) for p, stored in unseen.items()}

    async def read(
        self,
        conn: AsyncConnection[Any],  # noqa: ARG002
        partitions: Sequence[TopicPartition],
    ) -> dict[TopicPartition, Stand]:
        """Return what is expected: nobody else moves it."""
        leases = self._leases()
        return {p: Stand(leases[p].epoch, leases[p].next_offset) for p in partitions if p in leases}
