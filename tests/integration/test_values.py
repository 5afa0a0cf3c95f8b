"""Binary COPY and INSERT with parameters store the same value, or both refuse it: for every type, values at random.

Each draw is a JSON text. It goes through the real path (catalog, decode, pack, binary COPY), and beside it the decoded
Python value by INSERT with a text parameter, which Postgres parses itself; and the JSON's own words by INSERT, so that
the decode changes nothing either. All runs in transactions that are rolled back. Draws are the same in each run.
"""

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import AsyncConnection

from consumerd import catalog, postgres
from consumerd.config import PostgresConfig
from consumerd.errors import Poison, Refusal, Rejected
from consumerd.formats.json import decoder
from consumerd.formats.values import Field, refusal
from consumerd.sinks.append import Append
from consumerd.sinks.copy import CopyData

EXAMPLES = 80
SAME = """\
SELECT c.{v} IS NOT DISTINCT FROM i.{v}, c.v::text IS NOT DISTINCT FROM i.v::text,
       c.{v} IS NOT DISTINCT FROM w.{v}, c.v::text IS NOT DISTINCT FROM w.v::text, c.v::text, i.v::text, w.v::text
FROM copied c, inserted i, worded w"""
STORED, REFUSED = "stored", "refused"

INTEGERS = st.one_of(
    st.integers(),
    st.builds(lambda power, near: 2**power + near, st.sampled_from([15, 31, 63, 64]), st.integers(-2, 2)),
    st.builds(lambda power, near: -(2**power) + near, st.sampled_from([15, 31, 63, 64]), st.integers(-2, 2)),
).map(str)
DECIMALS = st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
HUGE = st.from_regex(r"-?[0-9]([eE][+-]?[0-9]{1,11})", fullmatch=True)
FLOATS = st.floats(allow_nan=False, allow_infinity=False).map(repr)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text("a é\u0000😀", min_size=3, max_size=8),
    st.text("ab ", min_size=4, max_size=7),
)
DIGITS = st.text("0123456789.eE+- ", max_size=8)
SPECIAL = st.sampled_from(
    ["NaN", "-NaN", "sNaN", "Infinity", "-Infinity", "inf", "true", "null", "", " ", "\t1\n", "0x10"]
)
TIMES = st.builds(
    lambda day, clock, fraction, zone: f"{day}T{clock}{fraction}{zone}",
    st.one_of(st.dates().map(str), st.sampled_from(["0001-01-01", "9999-12-31", "0000-01-01", "10000-01-01"])),
    st.from_regex(r"([01][0-9]|2[0-4]):[0-5][0-9]:([0-5][0-9]|60)", fullmatch=True),
    st.from_regex(r"(\.[0-9]{1,6})?", fullmatch=True),
    # Postgres reads offsets up to 15:59 (test_offsets_of_a_day has the rest).
    st.sampled_from(["Z", "z", "+00:00", "-00:00", "+05:30", "-15:59", "+14:00", "", "+00"]),
)
DATES = st.one_of(
    st.dates().map(str), st.sampled_from(["0001-01-01", "0000-01-01", "2020-1-1", "2020-02-30", "infinity"])
)
CLOCKS = st.builds(
    lambda clock, fraction, zone: f"{clock}{fraction}{zone}",
    st.from_regex(r"([01][0-9]|2[0-4]):[0-5][0-9]:([0-5][0-9]|60)", fullmatch=True),
    st.from_regex(r"(\.[0-9]{1,6})?", fullmatch=True),
    st.sampled_from(["", "", "", "Z", "+01:00"]),
)
BASE64 = st.one_of(
    st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode()), st.text("AQ/+=_- ", max_size=6)
)
REALS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda real: repr(real * (1 + 2**-24))),
)
UUIDS = st.one_of(st.uuids().map(str), st.uuids().map(lambda u: u.hex), st.uuids().map(lambda u: f"{{{u}}}".upper()))
ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
JSON_TEXTS = st.one_of(
    ANY_JSON.map(json.dumps),
    ANY_JSON.map(lambda value: json.dumps(value, ensure_ascii=False, indent=1)),
    st.sampled_from(['{"a":1,"a":2}', "[1.50,1e2,-0,-0.0]", "[1e-16384]", "[1e131072]", '"\\ud83d\\ude00"', '"\\/"']),
    st.integers(1, 1200).map(lambda depth: "[" * depth + "]" * depth),
)


def quoted(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Make JSON strings of texts."""
    return st.one_of(texts.map(json.dumps), texts.map(lambda text: json.dumps(text, ensure_ascii=False)))


NUMBERS = st.one_of(INTEGERS, DECIMALS, HUGE, FLOATS)
NUMERICS = st.one_of(NUMBERS, DECIMALS, quoted(DECIMALS), quoted(DIGITS), quoted(SPECIAL))
STRINGS = quoted(TEXTS)
OTHER = st.one_of(JSON_TEXTS, NUMBERS, STRINGS, quoted(SPECIAL))

KINDS: dict[str, st.SearchStrategy[str]] = {
    "boolean": st.sampled_from(["true", "false", "null", '"true"', "0", "1"]),
    "smallint": NUMBERS,
    "integer": NUMBERS,
    "bigint": NUMBERS,
    "real": st.one_of(NUMBERS, REALS),
    "double precision": NUMBERS,
    "numeric": NUMERICS,
    "numeric(10,2)": NUMERICS,
    "numeric(2,5)": NUMERICS,
    "numeric(4,-2)": NUMERICS,
    "text": STRINGS,
    "character varying": STRINGS,
    "character varying(4)": STRINGS,
    "character(4)": STRINGS,
    "character": STRINGS,
    "bytea": quoted(BASE64),
    "date": quoted(DATES),
    "time without time zone": quoted(CLOCKS),
    "time(2) without time zone": quoted(CLOCKS),
    "timestamp without time zone": quoted(TIMES),
    "timestamp(3) without time zone": quoted(TIMES),
    "timestamp with time zone": quoted(TIMES),
    "timestamp(3) with time zone": quoted(TIMES),
    "timestamp(0) with time zone": quoted(TIMES),
    "uuid": quoted(UUIDS),
    "jsonb": JSON_TEXTS,
    "json": JSON_TEXTS,
    "mood": STRINGS | st.sampled_from(['"sad"', '"so so"', '"Sad"', '"sad "', '""']),
    "whole": INTEGERS,
    "short": STRINGS,
    "money_of_ours": DECIMALS | quoted(DECIMALS),
}
TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'so so', '');
CREATE DOMAIN whole AS integer CHECK (value >= 0);
CREATE DOMAIN name_of_ours AS varchar(4);
CREATE DOMAIN short AS name_of_ours NOT NULL CHECK (value <> '');
CREATE DOMAIN money_of_ours AS numeric(6, 2);
"""
"""An enum, domains, and a domain over another."""

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:?\d\d)")
LOCAL = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?")


def stricter(type_name: str, literal: str) -> str | None:
    """Return the rule by which the decode refuses a value that Postgres, reading the JSON's words, might take."""
    family = type_name.removesuffix(" with time zone").removesuffix(" without time zone").partition("(")[0]
    zoned = not type_name.endswith(" without time zone")
    value = json.loads(literal, parse_int=str, parse_float=str) if len(literal) < 500 else None
    string = value if literal.startswith('"') and isinstance(value, str) else None
    rules = {
        "only a string goes into text": family in {"text", "character varying", "character"} and string is None,
        "of a varchar(n)'s length trailing blanks count": family in {"character varying", "character", "short"}
        and (string or "").endswith(" "),
        "a string is no integer, float or boolean": family
        in {"smallint", "integer", "bigint", "real", "double precision", "boolean"}
        and string is not None,
        "a number with a point or an exponent is no integer": family in {"smallint", "integer", "bigint"}
        and re.search("[.eE]", literal) is not None,
        "only true and false are boolean": family == "boolean" and literal not in {"true", "false"},
        "a numeric is finite": family in {"numeric", "money_of_ours"}
        and re.search("nan|inf", string or "", re.IGNORECASE) is not None,
        "a numeric in a string has decimal digits": family in {"numeric", "money_of_ours"}
        and (string or "").startswith("0x"),
        "a timestamp is a string as in RFC 3339, with its offset": family == "timestamp"
        and (string is None or not (RFC_3339 if zoned else LOCAL).fullmatch(string)),
        "a timestamp's year is 1 to 9999, after rounding too": family == "timestamp"
        and (string or "")[:5] in {"0000-", "9999-", "10000"},
        "no leap second, no hour 24": family == "timestamp" and re.search(r":60|T24:", string or "") is not None,
        "a uuid has 32 digits, with hyphens or without, no braces": family == "uuid" and "{" in (string or "{"),
        "bytes are sent as base64": type_name == "bytea",
        "a date is YYYY-MM-DD": type_name == "date" and not re.fullmatch(r"\d{4}-\d\d-\d\d", string or ""),
        "the year is 1 to 9999": type_name == "date" and (string or "").startswith("0000"),
        "a time is HH:MM:SS, with a fraction, before midnight": family.startswith("time")
        and not re.fullmatch(r"([01]\d|2[0-3]):\d\d:[0-5]\d(\.\d+)?", string or ""),
        "a time is before midnight when it is rounded": family == "time"
        and (string or "").startswith("23:59:59.999999"),
        "only a string is an enum's label, or text of a domain": type_name in {"mood", "short"} and string is None,
        "a string is no integer of a domain": type_name == "whole"
        and (string is not None or "." in literal or "e" in literal.lower()),
        "JSON is nested less than 1,000 levels": literal.count("[") > 900 or literal.count("{") > 900,
    }
    return next((rule for rule, applies in rules.items() if applies), None)


class Bench:
    """A table of one column, and a connection to it."""

    def __init__(self, conn: AsyncConnection[Any], table: catalog.Table) -> None:
        self.conn = conn
        (self.column,) = table.columns
        self._decode = decoder((Field(column=self.column, path=("v",)),))
        self._sink = Append(table, table.columns)

    @classmethod
    async def open(cls, dsn: str, type_name: str) -> "Bench":
        """Make the tables: `copied` is written by COPY, the others by INSERT."""
        conn = await postgres.connect(PostgresConfig(dsn=dsn), "test")
        if await (await conn.execute("SELECT to_regtype('mood') IS NULL")).fetchone() == (True,):
            await conn.execute(TYPES)
        for name in ("copied", "inserted", "worded"):
            await conn.execute(f"DROP TABLE IF EXISTS {name}; CREATE TABLE {name} (v {type_name})")
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
        try:
            data = self._sink.pack([row], CopyData())
        except Rejected:
            return REFUSED
        try:
            async with self.conn.transaction():
                await self._sink.write(self.conn, data)
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
        return STORED

    def words(self, literal: str) -> str | None:
        """Return what one would write into an INSERT for a JSON value: a string's content, else the JSON itself."""
        if self.column.type_name in {"json", "jsonb"}:
            return literal
        if self.column.type_name == "bytea" and isinstance(value := json.loads(literal), str):
            try:
                return "\\x" + base64.b64decode(value, validate=True).hex()
            except ValueError:
                return None
        if literal in {"null", "-0"}:
            return {"null": None, "-0": "0"}[literal]  # a whole number's zero has no sign; -0.0 keeps it
        return str(json.loads(literal)) if literal.startswith('"') else literal

    async def difference(self, literal: str) -> str | None:
        """Hold the ways together for one JSON value; say how they differ."""
        async with postgres.transaction(self.conn, probe=True):
            return await self._difference(literal)

    async def _difference(self, literal: str) -> str | None:
        decoded = self.decode(literal)
        if self.column.type_name in {"json", "jsonb"} and literal == "null":
            return None if decoded == (None,) else "JSON's null is not SQL's"
        worded = await self.insert("worded", self.words(literal))
        if isinstance(decoded, Refusal):
            taken = worded == STORED and not stricter(self.column.type_name, literal)
            return f"decode refuses ({decoded.message}) what INSERT takes" if taken else None
        (value,) = decoded
        if self.column.type_name in {"json", "jsonb"} and value is not None:
            value = value.decode().removeprefix("\x01")
        ways = (await self.copy(decoded), await self.insert("inserted", value), worded)
        if len(set(ways)) > 1:
            return "COPY {}, INSERT {}, INSERT of the JSON's words {}".format(*ways)
        value = "v::text" if self.column.type_name == "json" else "v"  # json has no equality
        cursor = await self.conn.execute(SAME.format(v=value).encode())
        return next((str(row[4:]) for row in await cursor.fetchall() if not all(row[:4])), None)


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


def test_offsets_of_a_day(database: str) -> None:
    """A timestamp's offset of up to a day, which Postgres's own parser would refuse, gives the right instant."""
    with bench(database, "timestamp with time zone") as (runner, it):

        async def stored() -> list[str]:
            async with postgres.transaction(it.conn, probe=True):
                for literal in ('"2020-01-01T00:00:00+23:59"', '"2020-01-01T00:00:00-23:59"'):
                    decoded = it.decode(literal)
                    assert not isinstance(decoded, Refusal)
                    assert await it.copy(decoded) == STORED
                cursor = await it.conn.execute("SELECT v::text FROM copied ORDER BY v")
                return [text for (text,) in await cursor.fetchall()]

        assert runner.run(stored()) == ["2019-12-31 00:01:00+00", "2020-01-01 23:59:00+00"]
