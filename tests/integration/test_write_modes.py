"""Upsert's and skip-existing's merges on a real Postgres: the table is as if each row had been written by itself."""

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest
import pytest_asyncio
from psycopg import AsyncConnection

from consumerd import catalog, postgres
from consumerd.config import PostgresConfig
from consumerd.errors import Halt, Rejected
from consumerd.isolate import isolate
from consumerd.sinks import staged
from consumerd.sinks.copy import CopyData
from consumerd.sinks.skip_existing import SkipExisting
from consumerd.sinks.staged import Staged
from consumerd.sinks.upsert import Upsert
from consumerd.writer import MOST_PREPARED, Writer

Row = tuple[Any, ...]
Table = dict[int, Row]

SEEDS = 40
KEYS = 5
FILL = """
INSERT INTO t VALUES
    (0, 'there', 'there', NULL, 'old'), (1, 'there', 'there', 5, 'old'), (2, 'there', 'there', 5, 'old')"""
TABLE = f"""
CREATE DOMAIN filled AS text NOT NULL;
CREATE TABLE t (
    id int PRIMARY KEY, v text NOT NULL CHECK (v <> 'checked'), kept filled, version int, extra text DEFAULT 'new'
);
{FILL}"""
THERE: Table = {
    0: (0, "there", "there", None, "old"),
    1: (1, "there", "there", 5, "old"),
    2: (2, "there", "there", 5, "old"),
}
MAPPED = 4
"""Columns that messages fill; the last is the table's own."""


@pytest_asyncio.fixture
async def conn(database: str) -> AsyncIterator[AsyncConnection[Any]]:
    """Make the table."""
    conn = await postgres.connect(PostgresConfig(dsn=database), "test")
    await conn.execute(TABLE.encode())
    yield conn
    await conn.close()


async def upsert(conn: AsyncConnection[Any], **how: Any) -> Upsert:  # noqa: ANN401 - the sink's
    """Make the sink and its staging table."""
    table = await catalog.load(conn, "t", ("INSERT",))
    sink = Upsert(table, table.columns[:MAPPED], ("id",), **how)
    await sink.prepare(conn)
    return sink


async def rows_of(conn: AsyncConnection[Any]) -> Table:
    """Return the table, by key."""
    found = await (await conn.execute("SELECT * FROM t ORDER BY id")).fetchall()
    assert len(found) == len({row[0] for row in found})
    return {row[0]: row for row in found}


async def write(conn: AsyncConnection[Any], sink: Staged, *batches: Sequence[Row]) -> list[int]:
    """Write batches in one transaction; return how many rows of each exist already."""
    existing, first = [], 0
    async with postgres.transaction(conn):
        for rows in batches:
            data = sink.pack(rows, CopyData(first=first if len(batches) > 1 else None))
            existing.append(await sink.write(conn, data))
            first += len(rows)
    return existing


def one_by_one(table: Table, rows: Iterable[Row], *, update: tuple[str, ...] | None, version: bool) -> Table:
    """Return what a table is after rows were written to it one after the other."""
    table = dict(table)
    for id_, v, kept, number, *deletes in rows:
        there = table.get(id_)
        if deletes == [True]:
            table.pop(id_, None)
        elif there is None:
            table[id_] = (id_, v, kept, number, "new")
        elif not version or there[3] is None or (number is not None and number >= there[3]):
            table[id_] = (id_, v, kept if update is None else there[2], number, there[4])
    return table


def draw(dice: random.Random, count: int, *, deletes: bool) -> list[Row]:
    """Return rows of a few keys, some of them deletions."""
    rows: list[Row] = []
    for _ in range(count):
        key = dice.randrange(KEYS)
        row: Row = (key, f"v{dice.random()}", f"k{dice.random()}", dice.choice([None, *range(3, 8)]))
        if deletes:
            row = (key, None, None, None, True) if dice.random() < 1 / 3 else (*row, False)
        rows.append(row)
    return rows


@pytest.mark.parametrize("deletes", [False, True], ids=["", "deletes"])
@pytest.mark.parametrize("version", [None, "version"], ids=["", "version"])
@pytest.mark.parametrize("update", [None, ("v", "version")], ids=["", "update"])
async def test_as_if_one_by_one(
    conn: AsyncConnection[Any], update: tuple[str, ...] | None, version: str | None, *, deletes: bool
) -> None:
    """Whatever comes in one batch, in several, or in pieces of one, the table is as if rows were written one by one."""
    sink = await upsert(conn, update=update, version=version, deletes=deletes)
    for seed in range(SEEDS):
        dice = random.Random(seed)
        await conn.execute(f"TRUNCATE t; {FILL}".encode())
        expected = THERE
        for _ in range(3):
            batches = [draw(dice, dice.randint(1, 8), deletes=deletes) for _ in range(dice.randint(1, 3))]
            await write(conn, sink, *batches)
            for rows in batches:
                expected = one_by_one(expected, rows, update=update, version=version is not None)
            assert await rows_of(conn) == expected, f"seed {seed}"


async def test_new_keys_with_a_version_go_straight(conn: AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys are copied straight with `version` and `update` too; the same key twice in a batch is merged."""
    merges = []
    merge = Upsert._merge

    async def seen(self: Upsert, conn: AsyncConnection[Any], first: int, rows: int) -> int:
        merges.append(rows)
        return await merge(self, conn, first, rows)

    monkeypatch.setattr(Upsert, "_merge", seen)
    sink = await upsert(conn, update=("v", "version"), version="version")
    await write(conn, sink, [(7, "a", "k", 1), (8, "b", "k", None)])
    assert merges == []
    await write(conn, sink, [(9, "a", "k", 2), (9, "b", "l", 1)])
    assert merges == [2]
    assert (await rows_of(conn))[9] == (9, "a", "k", 2, "new")


@pytest.mark.parametrize(("how", "codes"), [("NO ACTION", {"23503"}), ("RESTRICT", {"23503", "23001"})])
async def test_a_deletion_that_the_table_does_not_allow(conn: AsyncConnection[Any], how: str, codes: set[str]) -> None:
    """A deletion of a row that another table refers to is refused alone; the others and the rows land."""
    await conn.execute(f"CREATE TABLE child (t int REFERENCES t ON DELETE {how})".encode())
    await conn.execute("INSERT INTO child VALUES (1)")
    sink = await upsert(conn, deletes=True)
    rows: list[Row] = [(0, None, None, None, True), (1, None, None, None, True), (9, "a", "k", 1, False)]
    async with postgres.transaction(conn, probe=True):
        refused, settled = await isolate(conn, sink, rows)
    assert list(refused) == [1]
    assert refused[1].sqlstate in codes
    assert settled == len(rows)
    await write(conn, sink, [rows[0], rows[2]])
    assert sorted(await rows_of(conn)) == [1, 2, 9]


async def test_a_check_beside_deletions(conn: AsyncConnection[Any]) -> None:
    """Where rows may delete, COPY still names the row that breaks a constraint, and a deletion breaks none."""
    sink = await upsert(conn, deletes=True)
    rows: list[Row] = [(8, "a", "k", 1, False), (0, None, None, None, True), (9, "checked", "k", 1, False)]
    with pytest.raises(Rejected) as caught:
        await write(conn, sink, rows)
    assert (caught.value.row, caught.value.refusal.sqlstate) == (2, "23514")
    await write(conn, sink, rows[:2])
    assert sorted(await rows_of(conn)) == [1, 2, 8]


@pytest.mark.parametrize("bad", [(9, None, "k", 1, False), (9, "a", None, 1, False)], ids=["a column", "a domain"])
async def test_what_takes_no_null_beside_deletions(conn: AsyncConnection[Any], bad: Row) -> None:
    """A column or a domain that takes no null refuses the row that has one, and no deletion, which has but its key."""
    sink = await upsert(conn, deletes=True)
    rows: list[Row] = [(0, None, None, None, True), bad, (8, "a", "k", 1, False)]
    async with postgres.transaction(conn, probe=True):
        refused, _ = await isolate(conn, sink, rows)
    assert {position: refusal.sqlstate for position, refusal in refused.items()} == {1: "23502"}


DROPS = """
CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER gone BEFORE {} ON t FOR EACH ROW WHEN (NEW.v = 'gone') EXECUTE FUNCTION gone()"""


@pytest.mark.parametrize(("event", "key"), [("INSERT", 9), ("UPDATE", 1)])
async def test_a_trigger_that_drops_rows_with_a_version(conn: AsyncConnection[Any], event: str, key: int) -> None:
    """With a version, what is passed over for being lower is not taken for a row that a trigger drops, and that is."""
    await conn.execute(DROPS.format(event).encode())
    sink = await upsert(conn, version="version")
    await write(conn, sink, [(1, "lower", "k", 4), (2, "higher", "k", 6), (2, "lower", "k", 5), (3, "a", "k", None)])
    assert [row[1] for row in (await rows_of(conn)).values()] == ["there", "there", "higher", "a"]
    with pytest.raises(Halt, match="stored 1 of 2 rows"):
        await write(conn, sink, [(2, "lower", "k", 5), (3, "b", "k", 1), (key, "gone", "k", 9)])


async def test_hostile_names_of_every_role(conn: AsyncConnection[Any]) -> None:
    """Key, version and updated columns may have any name."""
    await conn.execute(
        'CREATE TABLE h ("a%" int PRIMARY KEY, "b\'c" int CHECK ("b\'c" > 0), "d""e" text NOT NULL, "{f}" text)'
    )
    table = await catalog.load(conn, "h", ("INSERT",))
    sink = Upsert(table, table.columns, ("a%",), update=("b'c", 'd"e'), version="b'c", deletes=True)
    await sink.prepare(conn)
    rows = [(1, 1, "x", "first", False), (1, 3, "y", "second", False), (1, 2, "z", "third", False)]
    await write(conn, sink, [*rows, (2, 1, "x", "x", False), (2, None, None, None, True)])
    assert await (await conn.execute("SELECT * FROM h")).fetchall() == [(1, 3, "y", "first")]


async def test_staging_tables_of_a_connection_are_bounded(conn: AsyncConnection[Any], database: str) -> None:
    """Rule 30: of many tables those used last keep their staging table; COMMIT truncates each that there is."""
    mappings = []
    for number in range(MOST_PREPARED + 2):
        await conn.execute(f"CREATE TABLE many{number} (id int PRIMARY KEY)".encode())
        table = await catalog.load(conn, f"many{number}", ("INSERT",))
        sink = Upsert(table, table.columns, ("id",), staging=f"{staged.STAGING}_{number}")
        mappings.append(cast("Any", SimpleNamespace(table=table, sink=sink)))
    member = SimpleNamespace(connect=lambda: postgres.connect(PostgresConfig(dsn=database), "writer"))
    writer = Writer(cast("Any", member), "writer")

    async def made() -> dict[str, int]:
        query = "SELECT relname, oid::int8 FROM pg_class WHERE relname LIKE 'consumerd_staging%' AND relkind = 'r'"
        return dict(await (await conn.execute(query)).fetchall())

    for mapping in mappings[:MOST_PREPARED]:
        await writer._connection(mapping)
    before = await made()
    for mapping in (mappings[0], *mappings[-2:], mappings[0]):
        await writer._connection(mapping)
    after = await made()
    await writer.abort()
    names = {f"{staged.STAGING}_{number}" for number in (0, *range(3, MOST_PREPARED + 2))}
    assert (MOST_PREPARED, names) == (len(before), set(after))
    assert before[f"{staged.STAGING}_0"] == after[f"{staged.STAGING}_0"]


# skip-existing.


async def skip_existing(conn: AsyncConnection[Any], table: str) -> SkipExisting:
    """Make a table and its sink."""
    await conn.execute(f"CREATE TABLE s {table}".encode())
    loaded = await catalog.load(conn, "s", ("INSERT",))
    sink = SkipExisting(loaded, loaded.columns)
    await sink.prepare(conn)
    return sink


async def test_existing_rows_are_left_as_they_are(conn: AsyncConnection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists stays, of equal rows the first is written, and what is left out is counted."""
    monkeypatch.setattr(staged, "LEAST_DETOUR", 1)
    sink = await skip_existing(conn, "(id int PRIMARY KEY, v text)")
    assert await write(conn, sink, [(1, "a"), (2, "b")]) == [0]
    assert await write(conn, sink, [(1, "x"), (3, "c"), (3, "y"), (4, "d")]) == [2]
    assert await write(conn, sink, [(4, "x"), (5, "e")], [(5, "x"), (6, "f"), (1, "x")]) == [1, 2]
    found = await (await conn.execute("SELECT * FROM s ORDER BY id")).fetchall()
    assert found == [(1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "e"), (6, "f")]


@pytest.mark.parametrize(
    ("table", "left"),
    [
        ("(a int UNIQUE, b int UNIQUE)", [(2, 1), (3, 3)]),
        ("(a int, b int); CREATE UNIQUE INDEX ON s (a) WHERE b > 0", [(2, 1), (1, 1), (3, 3)]),
        ("(a int, b int); CREATE UNIQUE INDEX ON s ((a % 2))", [(2, 1), (1, 1)]),
        ("(a int, b int, EXCLUDE (a WITH =))", [(2, 1), (1, 1), (3, 3)]),
    ],
    ids=["two indexes", "a partial one", "of an expression", "an exclusion"],
)
async def test_any_unique_index_counts(conn: AsyncConnection[Any], table: str, left: list[Row]) -> None:
    """Each unique index, and an exclusion, tells what exists; rows are looked at in the order of their offsets."""
    sink = await skip_existing(conn, table)
    await write(conn, sink, [(2, 1), (1, 1), (2, 2), (3, 3), (3, 4)])
    assert await (await conn.execute("SELECT * FROM s ORDER BY ctid")).fetchall() == left


async def test_what_is_refused_is_not_what_exists(conn: AsyncConnection[Any]) -> None:
    """A row that breaks another constraint is refused, with its code, and no row that exists is."""
    sink = await skip_existing(conn, "(id int PRIMARY KEY, v text CHECK (v <> 'checked'))")
    rows: list[Row] = [(1, "a"), (1, "b"), (2, "checked"), (3, "c")]
    async with postgres.transaction(conn, probe=True):
        refused, _ = await isolate(conn, sink, rows)
    assert {position: refusal.sqlstate for position, refusal in refused.items()} == {2: "23514"}


async def test_two_writers_of_the_same_new_row(conn: AsyncConnection[Any], database: str) -> None:
    """A row that another transaction inserts at the same time is waited for, and then exists."""
    sink = await skip_existing(conn, "(id int PRIMARY KEY, v text)")
    with psycopg.connect(database) as other:
        other.execute("INSERT INTO s VALUES (1, 'theirs')")
        async with postgres.transaction(conn):
            await conn.execute("SET LOCAL lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                async with conn.transaction():
                    await sink.write(conn, sink.pack([(1, "ours")], CopyData()))
        other.commit()
    assert await write(conn, sink, [(1, "ours"), (2, "ours")]) == [1]
