"""Errors that a real server raises mean what sqlstate.py says: row refused, wait and try again, or halt."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio
from psycopg import AsyncConnection

from consumerd import postgres
from consumerd.catalog import Column
from consumerd.config import PostgresConfig
from consumerd.errors import Cancelled, ConsumerdError, Halt, Outage, Rejected, TableChanged
from consumerd.sinks.copy import SIGNATURE, TRAILER, CopyData, Packer
from tests.servers.process import free_port

SECRET = "Swordfish"
SCHEMA = """
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE t (
    id int PRIMARY KEY, small smallint, short varchar(12), num numeric(4, 2), doc jsonb, at timestamptz,
    parent int REFERENCES parent, checked text CHECK (checked <> 'Swordfish!'), needed text NOT NULL DEFAULT '',
    span int4range, EXCLUDE USING gist (span WITH &&)
);
CREATE TABLE parted (v text) PARTITION BY LIST (v);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN ('here');
CREATE DOMAIN even AS int CHECK (value % 2 = 0);
CREATE TABLE domained (v even);
CREATE TABLE long (v text PRIMARY KEY);
CREATE TABLE raising (v text, code text);
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'refused %', NEW.v USING ERRCODE = NEW.code; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON raising FOR EACH ROW EXECUTE FUNCTION refuse();
CREATE SEQUENCE spent MAXVALUE 2 START 2;
SELECT nextval('spent');
INSERT INTO t (id, span) VALUES (1, '[1,5)');
"""


@dataclass(frozen=True)
class Case:
    """A statement, the code that it fails with, and what that means."""

    code: str
    means: type[ConsumerdError]
    statement: str


CASES = {
    "NUL in text": Case("22021", Rejected, "INSERT INTO t (id, short) VALUES (2, convert_from('\\x5300', 'UTF8'))"),
    "invalid UTF-8": Case("22021", Rejected, "INSERT INTO t (id, short) VALUES (2, convert_from('\\xff', 'UTF8'))"),
    "NUL in jsonb": Case("22P05", Rejected, """INSERT INTO t (id, doc) VALUES (2, '"Swordfish\\u0000"')"""),
    "no JSON": Case("22P02", Rejected, "INSERT INTO t (id, doc) VALUES (2, 'Swordfish')"),
    "nested deeply": Case("54001", Rejected, "INSERT INTO t (id, doc) VALUES (2, repeat('[', 100000)::jsonb)"),
    "integer too large": Case("22003", Rejected, "INSERT INTO t (id, small) VALUES (2, 40000)"),
    "numeric too large": Case("22003", Rejected, "INSERT INTO t (id, num) VALUES (2, 100)"),
    "text too long": Case("22001", Rejected, "INSERT INTO t (id, short) VALUES (2, 'SwordfishSwordfish')"),
    "timestamp out of range": Case("22008", Rejected, "INSERT INTO t (id, at) VALUES (2, '2020-02-30T00:00:00Z')"),
    "division by zero": Case("22012", Rejected, "INSERT INTO t (id) VALUES (1 / (SELECT 0))"),
    "NOT NULL": Case("23502", Rejected, "INSERT INTO t (id, short, needed) VALUES (2, 'Swordfish', NULL)"),
    "foreign key": Case("23503", Rejected, "INSERT INTO t (id, short, parent) VALUES (2, 'Swordfish', 7)"),
    "unique": Case("23505", Rejected, "INSERT INTO t (id, short) VALUES (1, 'Swordfish')"),
    "check": Case("23514", Rejected, "INSERT INTO t (id, checked) VALUES (2, 'Swordfish!')"),
    "check of a domain": Case("23514", Rejected, "INSERT INTO domained VALUES (3)"),
    "no partition for the row": Case("23514", Rejected, "INSERT INTO parted VALUES ('Swordfish')"),
    "exclusion": Case("23P01", Rejected, "INSERT INTO t (id, span) VALUES (2, '[2,3)')"),
    "index row too large": Case(
        "54000",
        Rejected,
        "INSERT INTO long SELECT string_agg(sha512(i::text::bytea)::text, '') FROM generate_series(1, 200) AS i",
    ),
    "one key twice": Case(
        "21000",
        Rejected,
        "INSERT INTO t (id) VALUES (7), (7) ON CONFLICT (id) DO UPDATE SET short = 'Swordfish'",
    ),
    "a trigger's RAISE": Case("P0001", Rejected, "INSERT INTO raising VALUES ('Swordfish', 'P0001')"),
    "a trigger's RAISE of a check": Case("23514", Rejected, "INSERT INTO raising VALUES ('Swordfish', '23514')"),
    "a trigger's own cancellation": Case("57014", Cancelled, "INSERT INTO raising VALUES ('Swordfish', '57014')"),
    "a trigger's own code": Case("U1234", Halt, "INSERT INTO raising VALUES ('x', 'U1234')"),
    "no table": Case("42P01", TableChanged, "INSERT INTO nowhere VALUES (1)"),
    "no column": Case("42703", TableChanged, "INSERT INTO t (nothing) VALUES (1)"),
    "no privilege": Case("42501", Halt, "SET LOCAL ROLE pg_monitor; INSERT INTO t (id) VALUES (2)"),
    "sequence exhausted": Case("2200H", Halt, "INSERT INTO t (id) VALUES (nextval('spent'))"),
    "statement_timeout": Case("57014", Cancelled, "SET LOCAL statement_timeout = '1ms'; SELECT pg_sleep(60)"),
    "read only": Case("25006", Outage, "SET LOCAL transaction_read_only = on; INSERT INTO t (id) VALUES (2)"),
}


async def connected(dsn: str) -> AsyncConnection[object]:
    """Connect as the package does."""
    return await postgres.connect(PostgresConfig(dsn=dsn), "test")


@pytest_asyncio.fixture
async def conn(database: str) -> AsyncIterator[AsyncConnection[object]]:
    """Connect to a database with the tables."""
    conn = await connected(database)
    await conn.execute(SCHEMA)
    yield conn
    await conn.close()


@pytest_asyncio.fixture
async def other(database: str) -> AsyncIterator[AsyncConnection[object]]:
    """Connect a second time."""
    conn = await connected(database)
    yield conn
    await conn.close()


def code_of(error: BaseException) -> str | None:
    """Return the SQLSTATE behind one of our errors."""
    assert isinstance(error.__cause__, psycopg.Error)
    return error.__cause__.sqlstate


async def run(conn: AsyncConnection[object], *statements: str) -> None:
    """Run statements in a transaction of the package."""
    async with postgres.transaction(conn):
        for statement in statements:
            await conn.execute(statement)


def packed(oids: Sequence[int], rows: Sequence[tuple[object, ...]]) -> bytes:
    """Return rows as the data of a COPY."""
    columns = [Column(name="", oid=oid, typmod=-1, type_name="", not_null=False, automatic=False) for oid in oids]
    return bytes(SIGNATURE + Packer(columns).add(CopyData(), rows).packed + TRAILER)


async def copy(conn: AsyncConnection[object], columns: str, data: bytes | bytearray) -> None:
    """Run a COPY in a transaction of the package."""
    async with postgres.transaction(conn), conn.cursor() as cursor:
        statement = f"COPY t ({columns}) FROM STDIN (FORMAT binary)"
        async with cursor.copy(statement) as copying:
            await copying.write(data)


async def test_meaning(conn: AsyncConnection[object]) -> None:
    """Each code of a real server has its own meaning, and what we say of it holds no value of the row."""
    found = {}
    for name, case in CASES.items():
        with pytest.raises(ConsumerdError) as caught:
            await run(conn, case.statement)
        error = caught.value
        found[name] = (code_of(error), type(error))
        assert SECRET not in f"{error} {error.refusal if isinstance(error, Rejected) else None}"
        assert not isinstance(error, Rejected) or (error.refusal.sqlstate, error.refusal.reason) == (
            case.code,
            "rejected",
        )
    assert found == {name: (case.code, case.means) for name, case in CASES.items()}


async def test_terminated(conn: AsyncConnection[object]) -> None:
    """A statement under which the server ends the connection is an outage."""
    with pytest.raises(Outage) as caught:
        await run(conn, "SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(60)")
    assert code_of(caught.value) == "57P01"
    assert conn.closed


async def test_refusal_names_constraint_and_column(conn: AsyncConnection[object]) -> None:
    """What says why a row was refused names the constraint, and the column where the server does."""
    found = []
    for values in ("(1, '')", "(2, NULL)"):
        with pytest.raises(Rejected) as caught:
            await run(conn, f"INSERT INTO t (id, needed) VALUES {values}")
        refusal = caught.value.refusal
        found.append((refusal.error, refusal.message, refusal.column))
    assert found == [
        ("psycopg.errors.UniqueViolation", "refused by Postgres: UniqueViolation, constraint t_pkey", None),
        ("psycopg.errors.NotNullViolation", "refused by Postgres: NotNullViolation, column needed", "needed"),
    ]


async def test_the_servers_words_are_kept_apart(conn: AsyncConnection[object]) -> None:
    """What Postgres says of a row, with its values, is in `words` alone, and no longer than a header may be."""
    with pytest.raises(Rejected) as caught:
        await run(conn, f"INSERT INTO t (id, checked) VALUES (7, '{SECRET}!')")
    refusal = caught.value.refusal
    assert refusal.words is not None
    assert refusal.words.startswith('new row for relation "t" violates check constraint "t_checked_check"; Failing row')
    assert SECRET in refusal.words
    assert SECRET not in f"{refusal!r} {caught.value} {refusal.told(words=False)}"
    with pytest.raises(Rejected) as caught:
        await run(conn, f"SELECT '{'x' * 5000}'::int")
    assert len(caught.value.refusal.words or "") == postgres.WORDS_LENGTH


async def test_copy_names_the_row(conn: AsyncConnection[object]) -> None:
    """A row that COPY refuses is named by its position from 0."""
    for bad in (0, 1, 4):
        rows = [(10 + i, "x") for i in range(5)]
        rows[bad] = (1, "x")
        with pytest.raises(Rejected) as caught:
            await copy(conn, "id, short", packed([23, 1043], rows))
        assert caught.value.row == bad


async def test_wrong_binary_halts(conn: AsyncConnection[object]) -> None:
    """COPY data that is no form of its columns halts: our encoding is wrong, not the row (rule 20)."""
    found = []
    for data in (packed([20], [(7,)]), b"no COPY data at all"):  # the first: int8 where int4 is
        with pytest.raises(Halt) as caught:
            await copy(conn, "id", data)
        found.append(code_of(caught.value))
    assert found == ["22P03", "22P04"]


@pytest.mark.parametrize("wait", ["SELECT FROM t FOR UPDATE NOWAIT", "SET LOCAL lock_timeout = '1ms'; LOCK TABLE t"])
async def test_lock_not_available(conn: AsyncConnection[object], other: AsyncConnection[object], wait: str) -> None:
    """A lock that somebody else holds is an outage."""
    await other.execute("BEGIN; SELECT FROM t FOR UPDATE")
    with pytest.raises(Outage) as caught:
        await run(conn, wait)
    assert code_of(caught.value) == "55P03"


async def test_deadlock(conn: AsyncConnection[object], other: AsyncConnection[object], database: str) -> None:
    """A deadlock is an outage for the one that loses it, and the connection goes on."""
    watcher = await connected(database)
    await conn.execute("INSERT INTO parent VALUES (1), (2)")
    await other.execute("SET deadlock_timeout = '1min'; SET lock_timeout = '1min'")
    await other.execute("BEGIN; SELECT FROM parent WHERE id = 2 FOR UPDATE")
    waits: asyncio.Task[object] | None = None

    async def ours() -> None:
        nonlocal waits
        async with postgres.transaction(conn):
            await conn.execute("SET LOCAL deadlock_timeout = '1ms'; SELECT FROM parent WHERE id = 1 FOR UPDATE")
            waits = asyncio.create_task(other.execute("SELECT FROM parent WHERE id = 1 FOR UPDATE"), name="waits")
            query = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
            while (await watcher.execute(query, [other.info.backend_pid])).rowcount == 0:
                pass
            await conn.execute("SELECT FROM parent WHERE id = 2 FOR UPDATE")

    with pytest.raises(Outage) as caught:
        await ours()
    assert code_of(caught.value) == "40P01"
    assert waits is not None
    await waits
    await conn.execute("SELECT 1")
    await watcher.close()


async def test_terminated_from_outside(conn: AsyncConnection[object], other: AsyncConnection[object]) -> None:
    """A connection that was ended between two statements is an outage."""

    async def ended() -> None:
        async with postgres.transaction(conn):
            await other.execute("SELECT pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])
            await conn.execute("INSERT INTO t (id) VALUES (2)")

    with pytest.raises(Outage):
        await ended()
    assert conn.closed


async def test_closed_by_us(conn: AsyncConnection[object]) -> None:
    """A connection that we closed under a write is an outage, not a mistake of ours."""

    async def closed() -> None:
        async with postgres.transaction(conn):
            await conn.close()
            await conn.execute("INSERT INTO t (id) VALUES (2)")

    with pytest.raises(Outage):
        await closed()


@pytest.mark.parametrize("dsn", ["host=127.0.0.1 port={port} dbname=x", "host={folder} dbname=x", "host=no.invalid"])
async def test_connection_refused(dsn: str, tmp_path: Path) -> None:
    """A server that is not there is an outage, with the sentence that libpq has for it."""
    with pytest.raises(Outage, match=r"cannot connect to Postgres: .+: correct \[postgres\] if it is not merely down"):
        await connected(dsn.format(port=free_port(), folder=tmp_path))


async def test_no_such_database(database: str) -> None:
    """A database that is not there may come: an outage, with the server's sentence."""
    with pytest.raises(Outage, match="does not exist: correct"):
        await connected(psycopg.conninfo.make_conninfo(database, dbname="nowhere"))


async def test_failed_commit_is_no_success(conn: AsyncConnection[object]) -> None:
    """COMMIT of a failed transaction is answered with ROLLBACK and no error: that is no success."""

    async def failing() -> None:
        async with postgres.transaction(conn):
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("SELECT 1 / 0")

    with pytest.raises(Halt, match="answered with ROLLBACK"):
        await failing()


async def test_wrong_setting(database: str) -> None:
    """A setting that Postgres refuses halts, and is named."""
    with pytest.raises(Halt, match="statement_timeout"):
        await postgres.connect(PostgresConfig(dsn=database, settings={"statement_timeout": "soon"}), "test")
