"""JSON texts at random for columns of every type: what they take, what they do not, and what is nearly either."""

import base64
import json

from hypothesis import strategies as st

INTEGERS = st.one_of(
    st.integers(),
    st.builds(lambda power, near: 2**power + near, st.sampled_from([15, 31, 63, 64]), st.integers(-2, 2)),
    st.builds(lambda power, near: -(2**power) + near, st.sampled_from([15, 31, 63, 64]), st.integers(-2, 2)),
).map(str)
DECIMALS = st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
HUGE = st.from_regex(r"-?[1-9]([eE][+-]?[0-9]{1,11})", fullmatch=True)
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


def words(*some: str) -> st.SearchStrategy[str]:
    """Make JSON strings: one of some words that a type reads, or nearly so."""
    near = st.builds(
        lambda word, at, more: word[:at] + more + word[at:], st.sampled_from(some), st.integers(0, 9), CUTS
    )
    return quoted(st.sampled_from(some) | near)


CUTS = st.sampled_from(["", " ", "-", "1", ",", "\\", '"', "\t", "\n", "é", "{", "NULL", "\0"])
BY_TEXT: dict[str, st.SearchStrategy[str]] = {
    "interval": words("1 day", "-1 mon 02:03:04.5", "P1Y2M3DT4H", "1.5 years ago", "infinity", "-1 2:03", "10"),
    "interval(0)": words("00:00:00.5", "1 day 00:00:01.5"),
    "inet": words("192.168.0.1", "10.0.0.0/8", "::1", "2001:db8::/32", "1.2.3"),
    "cidr": words("192.168.0.0/24", "10", "::/0", "10.0.0.1/8"),
    "macaddr": words("08:00:2b:01:02:03", "08002b010203", "08:00"),
    "time with time zone": words("10:15:00+02", "10:15:00.1234567-15:59", "24:00:00Z", "10:15", "23:59:60+00"),
    "money": words("12.34", "-$1,000.00", "1e3") | NUMBERS,
    "oid": words("1", "4294967295", "4294967296") | NUMBERS,
    "bit(4)": words("1010", "10101", "xA", "101"),
    "bit varying(4)": words("", "10101", "1"),
    "point": words("(1,2)", "1,2", "[1,2]", "(NaN,1e300)"),
    "box": words("(1,2),(3,4)", "((1,2),(3,4))"),
    "int4range": words("[1,5)", "(,)", "empty", "[5,1]", "[1,2147483648)"),
    "tstzrange": words('["2020-01-01 00:00:00+00",)', "[01/02/2020,03/04/2020]", "[2020-01-01,2019-01-01]"),
    "int4multirange": words("{[1,3),[5,7)}", "{}", "{[3,1)}"),
    "tsvector": words("a:1 b:2A", "'it''s'", "a:", "\\"),
    "tsquery": words("a & b", "a &", "!(a | b)"),
    "regclass": words("pg_class", "nowhere", "1259", "no such"),
    "jsonpath": words("$.a[*] ? (@ > 1)", "$.", "strict $"),
    "pair": words("(1,a)", '(,"b c")', "(x,y)", "(1)"),
    "latency": words("1 day", "-1 day", "02:00"),
}
"""Types without a binary form of ours: what Postgres' own input functions make of words."""


def arrays(elements: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Make JSON arrays, some of arrays, most of those rectangular."""
    item = elements | elements | st.just("null")

    def many(of: st.SearchStrategy[str], least: int, most: int) -> st.SearchStrategy[str]:
        return st.lists(of, min_size=least, max_size=most).map(lambda them: f"[{', '.join(them)}]")

    rectangle = st.integers(1, 3).flatmap(lambda width: many(many(item, width, width), 1, 3))
    return st.one_of(many(item, 0, 4), many(item, 0, 4), rectangle, many(many(item, 0, 2), 0, 3), DEEP_ARRAYS)


DEEP_ARRAYS = st.integers(1, 8).map(lambda depth: "[" * depth + "null" + "]" * depth)
ELEMENTS = KINDS | BY_TEXT
KINDS |= BY_TEXT
KINDS |= {
    f"{name}[]": arrays(ELEMENTS[name])
    for name in (
        *("boolean", "smallint", "integer", "bigint", "real", "double precision", "numeric", "numeric(10,2)", "text"),
        *("character varying(4)", "character(4)", "bytea", "date", "time without time zone", "uuid", "jsonb", "json"),
        *("timestamp with time zone", "timestamp(3) without time zone", "mood", "whole", "short", "money_of_ours"),
        *("inet", "interval", "box", "int4range", "pair", "latency", "tsquery"),
    )
}
KINDS |= {"wholes": arrays(INTEGERS), "cards": arrays(STRINGS)}
TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'so so', '');
CREATE DOMAIN whole AS integer CHECK (value >= 0);
CREATE DOMAIN name_of_ours AS varchar(4);
CREATE DOMAIN short AS name_of_ours NOT NULL CHECK (value <> '');
CREATE DOMAIN money_of_ours AS numeric(6, 2);
CREATE TYPE pair AS (one integer, other text);
CREATE DOMAIN latency AS interval CHECK (value > interval '0');
CREATE DOMAIN wholes AS integer[] CHECK (cardinality(value) < 3);
CREATE DOMAIN few AS varchar(2)[];
CREATE DOMAIN cards AS few CHECK (value[1] <> 'x');
"""
"""An enum, a composite type, domains, domains over others and over arrays."""

ARRAY_DOMAINS = {"wholes": "integer[]", "cards": "character varying(2)[]"}
