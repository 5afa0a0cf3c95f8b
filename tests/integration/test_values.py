"""COPY and INSERT with parameters store the same value, or both refuse it: for every type, values at random.

Each draw is a JSON text. It goes through the real path (catalog, decode, pack, COPY: binary where the type has such a
form, and once more beside a column that makes all of its table go by text), and beside it the decoded Python value by
INSERT with a text parameter, which Postgres parses itself; and the JSON's own words by INSERT, so that the decode
changes nothing either. All runs in transactions that are rolled back. Draws are the same in each run.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from consumerd import catalog, postgres
from consumerd.catalog import Column
from consumerd.config import PostgresConfig
from consumerd.errors import Poison, Refusal, Rejected
from consumerd.formats.json import decoder
from consumerd.formats.values import Field, refusal
from consumerd.sinks.append import Append
from consumerd.sinks.copy import CopyData
from tests.integration.draws import KINDS, OTHER, TYPES
from tests.integration.words import array_of, stricter, words_of
from tests.servers.sql import execute

EXAMPLES = 80
INTERVAL = 1186
SAME = """\
SELECT c.{v} IS NOT DISTINCT FROM i.{v} AND c.v::text IS NOT DISTINCT FROM i.v::text
   AND c.{v} IS NOT DISTINCT FROM w.{v} AND c.v::text IS NOT DISTINCT FROM w.v::text
   AND c.{v} IS NOT DISTINCT FROM t.{v} AND c.v::text IS NOT DISTINCT FROM t.v::text,
   c.v::text, t.v::text, i.v::text, w.v::text
FROM copied c, texted t, inserted i, worded w"""
NO_EQUALITY = {"json", "json[]", "jsonpath", "point", "box", "box[]"}
"""Types of which Postgres compares no two as a whole."""
STORED, REFUSED = "stored", "refused"
Copy = Callable[["Bench", tuple[Any, ...]], Awaitable[str]]


class Bench:
    """A table of one column, and a connection to it."""

    def __init__(self, conn: AsyncConnection[Any], table: catalog.Table) -> None:
        self.conn = conn
        (self.column,) = table.columns
        self._decode = decoder((Field(column=self.column, path=("v",)),))
        self._sink = Append(table, table.columns)
        by_text = Column(name="beside", oid=INTERVAL, typmod=-1, type_name="interval", not_null=False, automatic=False)
        self._text_sink = Append(replace(table, identifier="texted"), (*table.columns, by_text))

    @classmethod
    async def open(cls, dsn: str, type_name: str) -> "Bench":
        """Make the tables: `copied` is written by COPY, the others by INSERT."""
        conn = await postgres.connect(PostgresConfig(dsn=dsn), "test")
        if await (await conn.execute("SELECT to_regtype('mood') IS NULL")).fetchone() == (True,):
            await conn.execute(TYPES)
        for name in ("copied", "texted", "inserted", "worded"):
            await conn.execute(f"DROP TABLE IF EXISTS {name}; CREATE TABLE {name} (v {type_name})")
        await conn.execute("ALTER TABLE texted ADD beside interval")
        return cls(conn, await catalog.load(conn, "copied", ("INSERT",)))

    def decode(self, literal: str) -> tuple[Any, ...] | Refusal:
        """Decode, as the encoder does."""
        try:
            (row,) = self._decode([f'{{"v": {literal}}}'.encode()])
        except (ValueError, RecursionError, Poison) as error:
            return refusal(error)
        return row

    async def copy(self, row: tuple[Any, ...]) -> str:
        """COPY a row under a savepoint; the only error allowed is a refusal of the row."""
        return await self._copy(self._sink, row)

    async def copy_by_text(self, row: tuple[Any, ...]) -> str:
        """COPY a row in text form."""
        return await self._copy(self._text_sink, (*row, None))

    async def _copy(self, sink: Append, row: tuple[Any, ...]) -> str:
        try:
            data = sink.pack([row], CopyData())
        except Rejected:
            return REFUSED
        try:
            async with self.conn.transaction():
                await sink.write(self.conn, data)
        except psycopg.Error as error:
            meaning = postgres.translate(error, self.conn)
            assert isinstance(meaning, Rejected), meaning
            return REFUSED
        return STORED

    async def insert(self, table: str, value: object) -> str:
        """INSERT with a parameter in text form under a savepoint."""
        try:
            async with self.conn.transaction():
                await self.conn.execute(f"INSERT INTO {table} VALUES (%t)", [value])
        except (psycopg.errors.DataError, psycopg.errors.ProgramLimitExceeded, psycopg.errors.IntegrityError):
            return REFUSED
        except (psycopg.errors.SyntaxError, psycopg.errors.InvalidName, psycopg.errors.UndefinedTable):
            assert self.column.by_text  # as tsquery and regclass say of words that they do not read
            return REFUSED
        return STORED

    def words(self, literal: str) -> str | None:
        """Return what one would write into an INSERT for a JSON value: a string's content, else the JSON itself."""
        if self.column.element is not None and literal.startswith("["):
            return array_of(self.column.element, self.column.delimiter, literal)
        return words_of(self.column, literal)

    async def difference(self, literal: str) -> str | None:
        """Hold the ways together for one JSON value; say how they differ."""
        async with postgres.transaction(self.conn, probe=True):
            return await self._difference(literal)

    async def _difference(self, literal: str) -> str | None:
        decoded = self.decode(literal)
        if literal == "null":
            return None if decoded == (None,) else "JSON's null is not SQL's"
        worded = await self.insert("worded", self.words(literal))
        if isinstance(decoded, Refusal):
            taken = worded == STORED and not stricter(self.column.type_name, literal)
            return f"decode refuses ({decoded.message}) what INSERT takes" if taken else None
        (value,) = decoded
        if self.column.type_name.removesuffix("[]") in {"json", "jsonb"}:
            value = as_json(value)
        if self.column.delimiter != ",":
            value = self.words(literal)  # psycopg does not know of it
        ways = (
            await self.copy(decoded),
            await self.copy_by_text(decoded),
            await self.insert("inserted", value),
            worded,
        )
        if ways == (REFUSED, REFUSED, REFUSED, STORED) and stricter(self.column.type_name, literal):
            return None
        if len(set(ways)) > 1:
            return "COPY {}, COPY by text {}, INSERT {}, INSERT of the JSON's words {}".format(*ways)
        same = SAME.format(v="v::text" if self.column.type_name in NO_EQUALITY else "v")
        cursor = await self.conn.execute(same.encode())
        return next((str(row[1:]) for row in await cursor.fetchall() if not row[0]), None)


def as_json(value: Any) -> Any:  # noqa: ANN401 - text, or a list of it
    """Return JSON's text of its binary form, each element's of a list."""
    if isinstance(value, list):
        return [None if each is None else as_json(each) for each in value]
    return value.decode().removeprefix("\x01")


@contextmanager
def bench(dsn: str, type_name: str) -> Iterator[tuple[asyncio.Runner, Bench]]:
    """Open a bench and the loop that it runs in."""
    with asyncio.Runner() as runner:
        it = runner.run(Bench.open(dsn, type_name))
        try:
            yield runner, it
        finally:
            runner.run(it.conn.close())


def test_every_type_is_here(database: str) -> None:
    """No type is supported that the property does not hold for."""
    with psycopg.connect(database) as conn:
        conn.execute(TYPES)
        oids = [conn.execute("SELECT %s::regtype::oid::int8", [name]).fetchone() for name in KINDS]
    assert {oid for (oid,) in filter(None, oids)} >= set(catalog.SUPPORTED)


@pytest.mark.parametrize("type_name", KINDS)
def test_copy_is_insert(database: str, type_name: str) -> None:
    """Whatever JSON value comes, COPY stores what INSERT stores, or the value is refused on both ways or by a rule."""
    with bench(database, type_name) as (runner, it):

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(literal=st.one_of(KINDS[type_name], KINDS[type_name], KINDS[type_name], OTHER))
        def check(literal: str) -> None:
            difference = runner.run(it.difference(literal))
            assert difference is None

        check()


BOUNDS = {
    "smallint": ["-32768", "32767", "-32769", "32768"],
    "integer": ["-2147483648", "2147483647", "-2147483649", "2147483648"],
    "bigint": [str(-(2**63)), str(2**63 - 1), str(-(2**63) - 1), str(2**63), str(2**64), "9" * 400],
    "real": [
        "3.4028234663852886e38",  # the largest
        "3.4028235677973362e38",  # below the middle between it and infinity
        "3.4028235677973366e38",
        "1.4e-45",
        "7.006492321624085e-46",  # the middle between the smallest and 0
        "7.0064923216240862e-46",
        "1.00000005960464477539062500001",  # above the middle of two reals by less than a double can tell
        "1.00000005960464477539062499999",
        "1.000000178813934326171875",
        "-0.0",
        "1e-400",
    ],
    "time without time zone": ['"23:59:59.9999999"', '"23:59:59.9999994"', '"00:00:00.0000001"', '"00:00:00"'],
    "time(2) without time zone": ['"10:00:00.005"', '"10:00:00.015"', '"10:00:00.025"'],
    "timestamp without time zone": ['"2020-01-01T00:00:00.1234566"', '"2020-01-01T00:00:59.9999996"'],
    "character(4)": ['"abcd "', '"abcde"', '"é😀é😀"', '"ab"', '"\\u0000"'],
    "bytea": ['""', '"AA=="', '"AAE"', '"-_8="', '"\\\\x00"'],
    "double precision": ["1.7976931348623157e308", "5e-324", "-0.0", "9007199254740993", "1e309", "9" * 310, "1e-400"],
    "numeric": ["1e131071", "1e131072", "1e-16383", "1e-16384", "0e999999999", "1e-999999999", "1e999999999", "-0.0"],
    "numeric(10,2)": ["99999999.99", "99999999.994", "99999999.995", "100000000", "0.005", "-0.005", "1e-16384"],
    "character varying(4)": ['"é😀é😀"', '"abcde"', '"abcd "', '"\\u0000"'],
    "timestamp with time zone": [
        f'"2020-01-01T00:00:{seconds}Z"'  # finer than a microsecond: rounded to the nearest
        for seconds in ("00.1234564", "00.1234566", "00.9999999", "00.000000499999999", "59.9999996")
    ],
    "timestamp(0) with time zone": [
        '"9999-12-31T23:59:59.5Z"',
        '"0001-01-01T00:00:00+14:00"',
        '"1999-12-31T23:59:59.5Z"',
    ],
    "jsonb": ["1e131071", "1e131072", "1e-16384", '"\\u0000"', '"' + "x" * 300_000 + '"', "[" * 900 + "]" * 900],
}


def test_bounds(database: str) -> None:
    """At the bounds of each type, and just beyond, COPY is INSERT or both refuse."""
    differences = []
    for type_name, literals in BOUNDS.items():
        with bench(database, type_name) as (runner, it):
            for literal in literals:
                difference = runner.run(it.difference(literal))
                differences += [(type_name, literal[:100], difference)] if difference else []
    assert differences == []


@pytest.mark.parametrize("copy", [Bench.copy, Bench.copy_by_text], ids=["binary", "text"])
def test_offsets_of_a_day(database: str, copy: Copy) -> None:
    """A timestamp's offset of up to a day, which Postgres's own parser would refuse, gives the right instant."""
    with bench(database, "timestamp with time zone") as (runner, it):

        async def stored() -> list[str]:
            async with postgres.transaction(it.conn, probe=True):
                for literal in ('"2020-01-01T00:00:00+23:59"', '"2020-01-01T00:00:00-23:59"'):
                    decoded = it.decode(literal)
                    assert not isinstance(decoded, Refusal)
                    assert await copy(it, decoded) == STORED
                table = "copied" if copy is Bench.copy else "texted"
                cursor = await it.conn.execute(f"SELECT v::text FROM {table} ORDER BY v")
                return [text for (text,) in await cursor.fetchall()]

        assert runner.run(stored()) == ["2019-12-31 00:01:00+00", "2020-01-01 23:59:00+00"]


@pytest.mark.parametrize(
    ("type_name", "literal", "expected"),
    [
        ("interval", '"-1 day 02:03:04"', "-1 days +02:03:04"),
        ("daterange", '"[01/02/2020,03/04/2020]"', "[2020-01-02,2020-03-05)"),
        ("tstzrange", '"[2020-01-01 00:00,)"', '["2020-01-01 00:00:00+00",)'),
    ],
)
def test_a_databases_defaults_change_no_value(database: str, type_name: str, literal: str, expected: str) -> None:
    """Words mean what they mean in Postgres as it comes, whatever styles a database or a role has for its own."""
    for style in ("IntervalStyle = 'sql_standard'", "DateStyle = 'SQL, DMY'", "TimeZone = 'Asia/Tokyo'"):
        execute(database, f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} SET {style}")
    with bench(database, type_name) as (runner, it):

        async def stored() -> list[tuple[Any, ...]]:
            async with postgres.transaction(it.conn, probe=True):
                decoded = it.decode(literal)
                assert not isinstance(decoded, Refusal)
                assert await it.copy(decoded) == STORED
                return await (await it.conn.execute("SELECT v::text FROM copied")).fetchall()

        assert runner.run(stored()) == [(expected,)]
