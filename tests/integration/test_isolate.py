"""Isolation finds exactly the rows that Postgres refuses, in O(k log n) statements, and takes no outage for a row."""

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio
from psycopg import AsyncConnection

from consumerd import catalog, postgres
from consumerd.config import PostgresConfig
from consumerd.errors import Outage, Refusal, TableChanged
from consumerd.isolate import isolate
from consumerd.sinks.append import Append
from consumerd.sinks.base import Sink
from consumerd.sinks.copy import CopyData
from consumerd.sinks.upsert import Upsert

Row = tuple[Any, ...]
Connection = AsyncConnection[Any]

TABLE = """
CREATE TABLE t (
    id int PRIMARY KEY, v text NOT NULL CHECK (v <> 'checked'), u int UNIQUE,
    d int UNIQUE DEFERRABLE INITIALLY DEFERRED, parent int REFERENCES t DEFERRABLE
);
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.v = 'raise' THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION refuse();
INSERT INTO t VALUES (-1, 'there', -1, -1);
"""
STATEMENTS = 5
"""Of one piece: savepoint, COPY, merge, a count because the table has a trigger, release or roll back."""


class Counted:
    """A sink that counts what is written, and does something before a write."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.writes = 0
        self.before: Callable[[], Awaitable[object]] | None = None

    async def prepare(self, conn: Connection) -> None:
        """Prepare."""
        await self._sink.prepare(conn)

    async def forget(self, conn: Connection) -> None:
        """Forget."""
        await self._sink.forget(conn)

    def pack(self, rows: Sequence[Row], data: CopyData) -> CopyData:
        """Pack."""
        return self._sink.pack(rows, data)

    async def write(self, conn: Connection, data: CopyData) -> int:
        """Write, and count."""
        self.writes += 1
        if self.before is not None:
            await self.before()
        return await self._sink.write(conn, data)


class Bench:
    """A table, a connection to it, and both sinks."""

    def __init__(self, conn: Connection, table: catalog.Table) -> None:
        self.conn = conn
        self.sinks = {
            "append": Counted(Append(table, table.columns)),
            "upsert": Counted(Upsert(table, table.columns, ("id",))),
        }
        self.statements = 0
        self._execute = conn.execute
        conn.execute = self._count  # type: ignore[assignment]

    async def _count(self, *arguments: Any, **options: Any) -> object:  # noqa: ANN401 - as execute's own
        self.statements += 1
        return await self._execute(*arguments, **options)

    async def isolate(self, write: str, rows: Sequence[Row]) -> dict[int, Refusal]:
        """Isolate as the writer does, and count the statements."""
        sink = self.sinks[write]
        await sink.prepare(self.conn)
        async with postgres.transaction(self.conn, probe=True):
            before = self.statements - sink.writes
            try:
                refused, settled = await isolate(self.conn, sink, rows)
                assert settled == len(rows)
                return refused
            finally:
                self.statements = self.statements - before

    async def refused(self, write: str, rows: Sequence[Row]) -> dict[int, str | None]:
        """Isolate; give the refused rows' codes, once the others were seen to land."""
        await self.conn.execute("DELETE FROM t WHERE id >= 0")
        found = await self.isolate(write, rows)
        rest = [row for position, row in enumerate(rows) if position not in found]
        sink = self.sinks[write]
        async with postgres.transaction(self.conn):
            await sink.write(self.conn, sink.pack(rest, CopyData()))
        cursor = await self.conn.execute("SELECT count(*) FROM t WHERE id >= 0")
        landed = await cursor.fetchone()
        assert landed == (len({row[0] for row in rest}),)
        return {position: refusal.sqlstate for position, refusal in found.items()}


@pytest_asyncio.fixture
async def bench(database: str) -> AsyncIterator[Bench]:
    """Make the table."""
    conn = await postgres.connect(PostgresConfig(dsn=database), "test")
    await conn.execute(TABLE)
    yield Bench(conn, await catalog.load(conn, "t", ("INSERT",)))
    await conn.close()


def good(count: int) -> list[Row]:
    """Make rows that Postgres takes."""
    return [(i, "x", i, i, None) for i in range(count)]


SPOILED: dict[str, tuple[Callable[[Row], Row], str]] = {
    "NOT NULL": (lambda row: (row[0], None, *row[2:]), "23502"),
    "CHECK": (lambda row: (row[0], "checked", *row[2:]), "23514"),
    "foreign key": (lambda row: (*row[:4], 999), "23503"),
    "unique index other than the key": (lambda row: (*row[:2], -1, *row[3:]), "23505"),
    "deferred unique constraint": (lambda row: (*row[:3], -1, row[4]), "23505"),
    "trigger that raises": (lambda row: (row[0], "raise", *row[2:]), "P0001"),
    "NUL in text": (lambda row: (row[0], "a\0b", *row[2:]), "22021"),
}


@pytest.mark.parametrize("write", ["append", "upsert"])
@pytest.mark.parametrize("what", SPOILED)
async def test_exactly_the_bad_rows(bench: Bench, write: str, what: str) -> None:
    """Bad rows are found wherever they are, first and last too, with their code; the others land."""
    spoil, code = SPOILED[what]
    for at in ((0,), (99,), (50,), (0, 99), (3, 4, 5, 77)):
        rows = good(100)
        for position in at:
            rows[position] = spoil(rows[position])
        assert await bench.refused(write, rows) == dict.fromkeys(at, code)


@pytest.mark.parametrize("write", ["append", "upsert"])
@pytest.mark.parametrize("what", ["NOT NULL", "deferred unique constraint", "unique index other than the key"])
async def test_statements(bench: Bench, write: str, what: str) -> None:
    """Isolation takes O(k log n) statements, whether the server names the row or not."""
    for bad in (0, 1, 5, 30):
        rows = good(1000)
        at = random.Random(bad).sample(range(1000), bad)
        for position in at:
            rows[position] = SPOILED[what][0](rows[position])
        assert sorted(await bench.isolate(write, rows)) == sorted(at)
        assert bench.statements <= STATEMENTS * (1 + 2 * bad * (math.log2(1000) + 1))


@pytest.mark.parametrize(("write", "what"), [("append", "NOT NULL"), ("upsert", "NOT NULL"), ("upsert", "CHECK")])
async def test_statements_of_named_rows(bench: Bench, write: str, what: str) -> None:
    """Where COPY names the row, in the staging table too, each bad one costs a handful of statements."""
    rows = good(1000)
    for position in range(0, 1000, 100):
        rows[position] = SPOILED[what][0](rows[position])
    assert len(await bench.isolate(write, rows)) == 10
    assert bench.statements <= STATEMENTS * (1 + 4 * 10)


@pytest.mark.parametrize("write", ["append", "upsert"])
@pytest.mark.parametrize("what", ["NOT NULL", "trigger that raises"])
async def test_all_bad(bench: Bench, write: str, what: str) -> None:
    """When every row is bad each is found, in O(n) statements."""
    rows = [SPOILED[what][0](row) for row in good(100)]
    assert sorted(await bench.isolate(write, rows)) == list(range(100))
    assert bench.statements <= STATEMENTS * 3 * 100


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_none_bad(bench: Bench, write: str) -> None:
    """When no row is bad one piece is tried."""
    assert await bench.isolate(write, good(1000)) == {}
    assert bench.statements <= STATEMENTS


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_any_mixture(bench: Bench, write: str) -> None:
    """Bad rows of any kinds anywhere are found, each with its own code."""
    for seed in range(6):
        chance = random.Random(seed)
        rows = good(80)
        expected = {}
        for position in chance.sample(range(80), chance.randint(1, 12)):
            spoil, expected[position] = SPOILED[chance.choice(list(SPOILED))]
            rows[position] = spoil(rows[position])
        assert await bench.refused(write, rows) == expected


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_no_binary_form(bench: Bench, write: str) -> None:
    """A row that cannot be packed is found without asking the server."""
    rows = good(50)
    rows[7] = (7, object(), 7, 7, None)
    found = await bench.isolate(write, rows)
    assert {position: refusal.reason for position, refusal in found.items()} == {7: "range"}


async def test_duplicates_within_the_batch(bench: Bench) -> None:
    """In append, of rows with one key the first by offset lands and the later ones are refused."""
    rows = good(40)
    rows[20] = (3, "x", 100, 100, None)
    rows[39] = (3, "x", 101, 101, None)
    rows[0] = (-1, "x", 102, 102, None)
    assert await bench.refused("append", rows) == {0: "23505", 20: "23505", 39: "23505"}


async def test_deferred_duplicates_within_the_batch(bench: Bench) -> None:
    """Of rows that a deferred constraint finds equal, which no COPY names, the first by offset lands."""
    rows = good(40)
    rows[30] = (30, "x", 30, 3, None)
    assert await bench.refused("append", rows) == {30: "23505"}


async def test_earlier_row_of_a_refused_one(bench: Bench) -> None:
    """In upsert, when a key's newest row is refused its newest good one lands (rule 26)."""
    rows: list[Row] = [
        (1, "older", 1, 1, None),
        (2, "x", 2, 2, None),
        (1, "newer", 1, 1, None),
        (1, "checked", 1, 1, None),
    ]
    assert await bench.refused("upsert", rows) == {3: "23514"}
    cursor = await bench.conn.execute("SELECT v FROM t WHERE id = 1")
    assert await cursor.fetchone() == ("newer",)


async def test_a_row_that_a_later_one_of_its_key_replaces(bench: Bench) -> None:
    """In upsert, a row that refers to nothing is not refused when a good row of its key follows (rules 21, 26)."""
    rows: list[Row] = [(1, "older", 1, 1, 77), (2, None, 2, 2, None), (1, "newer", 1, 1, None)]
    assert list(await bench.isolate("upsert", rows)) == [1]


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_rows_that_need_earlier_ones(bench: Bench, write: str) -> None:
    """A row that needs an earlier one of its batch is not refused when the batch is cut between them (rule 21)."""
    rows: list[Row] = [(i, "x", i, i, max(i - 1, 0)) for i in range(64)]
    rows[10] = (10, None, 10, 10, 9)
    found = await bench.isolate(write, rows)
    assert min(found) == 10
    rows[11] = (11, "x", 11, 11, 9)
    assert list(await bench.isolate(write, rows)) == [10]


async def test_nothing_is_left(bench: Bench) -> None:
    """Isolation itself leaves nothing in the table."""
    rows = good(20)
    rows[5] = SPOILED["NOT NULL"][0](rows[5])
    await bench.isolate("append", rows)
    cursor = await bench.conn.execute("SELECT count(*) FROM t WHERE id >= 0")
    assert await cursor.fetchone() == (0,)


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_table_gone(bench: Bench, write: str) -> None:
    """A table that went away is read again from the catalog; no row is refused for it."""
    sink = bench.sinks[write]
    rows = good(20)
    rows[5] = SPOILED["NOT NULL"][0](rows[5])
    sink.before = lambda: bench.conn.execute("DROP TABLE t CASCADE")
    with pytest.raises(TableChanged):
        await bench.isolate(write, rows)


@pytest.mark.parametrize("write", ["append", "upsert"])
@pytest.mark.parametrize("at", [1, 2, 4])
async def test_connection_gone(bench: Bench, database: str, write: str, at: int) -> None:
    """A connection that ends on the way is an outage; no row is refused for it."""
    other = await postgres.connect(PostgresConfig(dsn=database), "other")
    sink = bench.sinks[write]
    rows = good(20)
    rows[5] = SPOILED["NOT NULL"][0](rows[5])

    async def end() -> None:
        if sink.writes == at:
            await other.execute("SELECT pg_terminate_backend(%s, 5000)", [bench.conn.info.backend_pid])

    sink.before = end
    with pytest.raises(Outage):
        await bench.isolate(write, rows)
    await other.close()


async def test_time_out(bench: Bench) -> None:
    """A statement that is cancelled is an outage; no row is refused for it."""
    bench.sinks["append"].before = lambda: bench.conn.execute(
        "SET LOCAL statement_timeout = '1ms'; SELECT pg_sleep(60)"
    )
    with pytest.raises(Outage):
        await bench.isolate("append", good(20))


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_rows_that_need_later_ones(bench: Bench, write: str) -> None:
    """A row that needs a later one of its batch is not refused because another row of the batch is bad (rule 21)."""
    rows: list[Row] = [(i, "x", i, i, min(i + 1, 63)) for i in range(64)]
    rows[10] = (10, None, 10, 10, 9)
    rows[9] = (9, "x", 9, 9, 9)
    assert list(await bench.isolate(write, rows)) == [10]


async def test_budget(bench: Bench) -> None:
    """When the budget is spent, what is settled is a prefix that holds at least as many rows as were asked for."""
    rows = [SPOILED["NOT NULL"][0](row) for row in good(4000)]
    sink = bench.sinks["append"]
    clock = iter(range(10**6))
    async with postgres.transaction(bench.conn, probe=True):
        refused, settled = await isolate(bench.conn, sink, rows, now=lambda: next(clock) / 10)
    assert 0 < settled < 100
    assert list(refused) == list(range(settled))
    async with postgres.transaction(bench.conn, probe=True):
        refused, settled = await isolate(bench.conn, sink, rows)
    assert 0 < settled < 1000
    assert list(refused) == list(range(settled))
    async with postgres.transaction(bench.conn, probe=True):
        refused, settled = await isolate(bench.conn, sink, rows, at_least=1500)
    assert 1500 < settled < 1510


@pytest.mark.parametrize("write", ["append", "upsert"])
async def test_rows_of_one_message_stay_together(bench: Bench, write: str) -> None:
    """Where messages have several rows, one that is refused refuses its message's, and messages are what is counted."""
    rows = good(1000)
    starts = [start for start in range(1000) if start % 10 in {0, 1, 4}]  # one row, three and six, by turns
    for bad in (4, 9, 500, 501, 999):
        rows[bad] = (bad, "checked", bad, bad, None)
    sink = bench.sinks[write]
    await sink.prepare(bench.conn)
    async with postgres.transaction(bench.conn, probe=True):
        refused, settled = await isolate(bench.conn, sink, rows, starts=starts)
    assert ([2, 150, 151, 299], 300) == (sorted(refused), settled)
