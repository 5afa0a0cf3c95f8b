"""The upsert sink on a real Postgres: which row of a key is left, and that none goes missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from consumerd import catalog, postgres
from consumerd.config import HandlerConfig, PostgresConfig
from consumerd.encode import Encoder
from consumerd.errors import Halt
from consumerd.sinks import staged
from consumerd.sinks.copy import CopyData, CopyStatement, copy
from consumerd.sinks.upsert import Upsert

Row = tuple[Any, ...]


async def written(database: str, make: str, batches: Sequence[Sequence[Row]], key: str = "id") -> list[Row]:
    """Make the table `t`, write batches to it in one transaction, and return its rows."""
    conn = await postgres.connect(PostgresConfig(dsn=database), "test")
    try:
        await conn.execute(make.encode())
        table = await catalog.load(conn, "t", ("INSERT",))
        sink = Upsert(table, table.columns[:2], (key,))
        async with postgres.transaction(conn):
            await sink.prepare(conn)
            first = 0
            for rows in batches:
                await sink.write(conn, sink.pack(rows, CopyData(first=first if len(batches) > 1 else None)))
                first += len(rows)
        return await (await conn.execute("SELECT * FROM t ORDER BY 1, 2")).fetchall()
    finally:
        await conn.close()


async def test_the_last_of_a_key_wins(database: str) -> None:
    """Within a batch the last row of a key is left, and a later batch of the transaction wins over an earlier one."""
    batches = [[(1, "a"), (2, "b"), (1, "c")], [(2, "d"), (3, "e")]]
    rows = await written(database, "CREATE TABLE t (id bigint PRIMARY KEY, v text)", batches)
    assert rows == [(1, "c"), (2, "d"), (3, "e")]


async def test_new_keys_go_straight_into_the_table(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are all new are copied straight; one that is there, or twice, has its batch merged, and those after."""
    conn = await postgres.connect(PostgresConfig(dsn=database), "test")
    ways: list[str] = []

    async def seen(conn: psycopg.AsyncConnection[Any], statement: CopyStatement, data: CopyData) -> None:
        ways.append("staged" if "consumerd_staging" in statement.query.as_string(conn) else "straight")
        await copy(conn, statement, data)

    monkeypatch.setattr(staged, "copy", seen)
    monkeypatch.setattr(staged, "LEAST_DETOUR", 1)
    expected: dict[int, str] = {}

    async def write(*rows: tuple[int, str]) -> list[str]:
        ways.clear()
        async with postgres.transaction(conn):
            await sink.write(conn, sink.pack(rows, CopyData()))
        expected.update(rows)
        assert await (await conn.execute("SELECT * FROM t ORDER BY id")).fetchall() == sorted(expected.items())
        return ways

    try:
        await conn.execute("CREATE TABLE t (id bigint PRIMARY KEY, v text)")
        table = await catalog.load(conn, "t", ("INSERT",))
        sink = Upsert(table, table.columns, ("id",))
        await sink.prepare(conn)
        assert await write((1, "a"), (2, "b")) == ["straight"]
        assert await write((3, "c"), (1, "d")) == ["straight", "staged"]
        assert await write((4, "e")) == ["staged"]  # 1 write is the detour
        assert await write((5, "f"), (5, "g")) == ["straight", "staged"]
        assert await write((6, "h")) == ["staged"]
        assert await write((7, "i")) == ["staged"]  # 2 after the second failure
        assert await write((8, "j")) == ["straight"]
        assert await write((8, "k")) == ["straight", "staged"]
        assert await write((8, "l")) == ["staged"]
        assert await write((9, "m")) == ["straight"]  # 1 again, after what succeeded
    finally:
        await conn.close()


async def test_a_table_that_copy_cannot_write_to(database: str) -> None:
    """COPY refuses a table with row-level security; the merge writes to it."""
    owner = await postgres.connect(PostgresConfig(dsn=database), "test")
    await owner.execute(
        "CREATE TABLE t (id bigint PRIMARY KEY, v text); ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY all_rows ON t USING (true); GRANT ALL ON t TO pg_monitor"
    )
    table = await catalog.load(owner, "t", ("INSERT",))
    sink = Upsert(table, table.columns, ("id",))
    try:
        await owner.execute("SET ROLE pg_monitor; GRANT ALL ON t TO pg_monitor")
        await sink.prepare(owner)
        async with postgres.transaction(owner):
            await sink.write(owner, sink.pack([(1, "a"), (2, "b")], CopyData()))
        assert await (await owner.execute("SELECT * FROM t ORDER BY id")).fetchall() == [(1, "a"), (2, "b")]
    finally:
        await owner.close()


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (
            (
                "CREATE TABLE t (id bigint PRIMARY KEY, v text); CREATE TABLE log (id bigint);"
                "CREATE RULE r AS ON INSERT TO t DO ALSO INSERT INTO log VALUES (NEW.id)"
            ),
            "0A000",
        ),
        ("CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)", "428C9"),
    ],
    ids=["a rule", "an identity"],
)
async def test_what_a_copy_would_pass_by(database: str, make: str, state: str) -> None:
    """New keys too are merged where a COPY would do otherwise; what the merge cannot do halts before anything lands."""
    with pytest.raises(Halt, match=state):
        await written(database, make, [[(1, "a")]])


async def test_a_partitions_trigger_that_drops_rows_halts(database: str) -> None:
    """A trigger of one partition alone is seen too."""
    make = """
        CREATE TABLE t (id bigint PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (100);
        CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER gone BEFORE INSERT ON low FOR EACH ROW WHEN (NEW.id = 2) EXECUTE FUNCTION gone()"""
    with pytest.raises(Halt, match="stored 2 of 3 rows"):
        await written(database, make, [[(1, "a")], [(1, "a"), (2, "b"), (3, "c")]])


async def test_each_row_is_merged_once(database: str) -> None:
    """Batches of one transaction are merged once each, not again with those that follow."""
    make = """
        CREATE TABLE t (id bigint PRIMARY KEY, v text, touched int DEFAULT 0);
        CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.touched := OLD.touched + 1; RETURN NEW; END';
        CREATE TRIGGER touch BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION touch()"""
    rows = await written(database, make, [[(1, "a")], [(2, "b")], [(3, "c")]])
    assert rows == [(1, "a", 0), (2, "b", 0), (3, "c", 0)]


async def test_a_trigger_that_drops_rows_halts(database: str) -> None:
    """Rows that a trigger drops are not lost silently."""
    make = """
        CREATE TABLE t (id bigint PRIMARY KEY, v text);
        CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER gone BEFORE INSERT ON t FOR EACH ROW WHEN (NEW.id = 2) EXECUTE FUNCTION gone()"""
    with pytest.raises(Halt, match="stored 2 of 3 rows"):
        await written(database, make, [[(1, "a"), (2, "b"), (3, "c")]])


@pytest.mark.parametrize("name", ["a%", "a'b", 'a"b', "select", "{}", "%(first)s", "é b"])
async def test_hostile_names(database: str, name: str) -> None:
    """A column may have any name."""
    quoted = name.replace('"', '""')
    make = f'CREATE TABLE t ("{quoted}" bigint PRIMARY KEY, v text)'
    assert await written(database, make, [[(1, "a"), (1, "b")]], key=name) == [(1, "b")]


async def test_a_key_must_have_a_value(database: str) -> None:
    """A key column takes no null, though the table would: an index holds many of them, a batch would keep one."""
    conn = await postgres.connect(PostgresConfig(dsn=database), "test")
    try:
        await conn.execute("CREATE TABLE t (id bigint UNIQUE, v text)")
        table = await catalog.load(conn, "t", ("INSERT",))
    finally:
        await conn.close()
    handler = HandlerConfig.model_validate(
        {"name": "t", "path": Path("t.toml"), "topics": ["t"], "table": {"name": "t", "write": "upsert", "key": ["id"]}}
    )
    assert [column.not_null for column in Encoder(table, handler).columns] == [True, False]
