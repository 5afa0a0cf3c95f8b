"""Finds the rows of a batch that Postgres refuses, in O(k log n) statements for k of n.

Rows are tried in offset order, each piece on top of those accepted before it, so rows that are valid only together
stay together. COPY's error context names the row: the rows before it, the row alone, and what follows are tried again,
the rest in halves, so that many bad rows do not send the whole rest again for each. Where no row is named (an upsert's
merge, a deferred constraint) the piece is halved. A row whose foreign key refers to nothing is tried once more on top
of all the others: what it refers to may come after it in the batch.

The search has a budget. When it is spent, the rows before the first piece that is left are settled: any prefix of a
batch is a batch, and the caller goes on with that one.

Runs inside a transaction that holds the checkpoint and that the caller rolls back: nothing found here counts unless the
checkpoint stood where it was expected.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg

from consumerd.errors import Refusal, Rejected
from consumerd.postgres import translate
from consumerd.sinks.copy import CopyData

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import AsyncConnection

    from consumerd.sinks.base import Sink

BUDGET_TRIES = 1_000
"""Pieces tried in one search: about a second on a quiet server."""
BUDGET_SECONDS = 5.0
"""Seconds of one search: it holds the checkpoint's lock, and a stop waits for it."""
LONGEST_SECONDS = 30.0
"""Seconds more after which a search ends though fewer rows are settled than were asked for."""
ORPHANS = {"23503", "23001"}
"""foreign_key_violation and restrict_violation: what a row refers to, or is referred to by, may change in a moment."""


async def isolate(
    conn: AsyncConnection[Any],
    sink: Sink,
    rows: Sequence[tuple[Any, ...]],
    named: int | None = None,
    *,
    starts: Sequence[int] | None = None,
    at_least: int = 0,
    now: Callable[[], float] = lambda: 0.0,
) -> tuple[dict[int, Refusal], int]:
    """Return why each refused row is refused, by its position, and how many rows are settled, from the first on.

    `named` is the row that the failed write's error named, if it did: what comes before it is not tried with it again.
    Where messages have several rows, `starts` has the first row of each: they are tried together, and it is messages
    that are counted in what is returned. The budget does not end the search before `at_least` are settled, and never
    before the first. Raises Outage or Halt for any other trouble.
    """
    refused: dict[int, Refusal] = {}
    borders = range(len(rows) + 1) if starts is None else [*starts, len(rows)]
    count = len(borders) - 1
    pieces = [(0, count)] if named is None else _pieces(0, count, bisect_right(borders, named) - 1)
    tries, until = BUDGET_TRIES, now() + BUDGET_SECONDS
    while pieces:
        start, end = pieces.pop()
        spent = tries <= 0 or now() > until
        if start > 0 and ((spent and start > at_least) or now() > until + LONGEST_SECONDS):
            return refused, start
        tries -= 1
        first, last = borders[start], borders[end]
        rejected = await _try(conn, sink, rows[first:last], first)
        if rejected is None:
            continue
        if end - start == 1:
            refused[start] = rejected.refusal
            continue
        row = None if rejected.row is None else bisect_right(borders, first + rejected.row) - 1 - start
        pieces += _pieces(start, end, row)
    for position in sorted((p for p, refusal in refused.items() if refusal.sqlstate in ORPHANS), reverse=True):
        first, last = borders[position], borders[position + 1]
        if await _try(conn, sink, rows[first:last], first) is None:
            del refused[position]
    return refused, count


def _pieces(start: int, end: int, row: int | None) -> list[tuple[int, int]]:
    """Cut a refused piece, the first part last; `row` counts from its start."""
    if row is None or not 0 <= row < end - start:
        cuts = [start, (start + end) // 2, end]
    else:
        bad = start + row
        cuts = [start, bad, bad + 1, (bad + 1 + end) // 2, end]
    return [(a, b) for a, b in reversed(list(pairwise(cuts))) if a < b]


async def _try(conn: AsyncConnection[Any], sink: Sink, rows: Sequence[tuple[Any, ...]], first: int) -> Rejected | None:
    """Write rows under a savepoint; return the refusal, if it is one, with nothing of these rows left written."""
    try:
        data = sink.pack(rows, CopyData(first=first))
    except Rejected as rejected:
        return rejected
    try:
        await conn.execute("SAVEPOINT consumerd")
        await sink.write(conn, data)
        # A deferred constraint would fail at COMMIT, never under a savepoint.
        await conn.execute("SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED; RELEASE SAVEPOINT consumerd")
    except psycopg.Error as error:
        meaning = translate(error, conn)
        if not isinstance(meaning, Rejected):
            raise meaning from error
        await conn.execute("ROLLBACK TO SAVEPOINT consumerd; RELEASE SAVEPOINT consumerd")
        return meaning
    return None
