"""What a JSON value is in words that Postgres reads, and where the decode is stricter than Postgres by a rule."""

import base64
import json
import re

import msgspec

from consumerd.catalog import Column
from tests.integration.draws import ARRAY_DOMAINS, BY_TEXT

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:?\d\d)")
LOCAL = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?")

DEEP = "[" * 100


def stricter(type_name: str, literal: str) -> str | None:
    """Return the rule by which the decode refuses a value that Postgres, reading the JSON's words, might take."""
    type_name = ARRAY_DOMAINS.get(type_name, type_name)
    if type_name.endswith("[]"):
        return stricter_array(type_name.removesuffix("[]"), literal)
    if type_name in BY_TEXT:
        return "an object or an array is no word" if literal[0] in "[{" else None
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
        "a numeric has up to 16,383 digits behind the point, before it is rounded": family
        in {"numeric", "money_of_ours"}
        and re.search("[eE]-[0-9]{5,}", literal) is not None,
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


def stricter_array(element: str, literal: str) -> str | None:
    """Return such a rule of an array: its own, or that of one of its elements."""
    if not literal.startswith("["):
        return "an array is sent as one"
    if literal.startswith(DEEP):
        return "JSON is nested less than 1,000 levels, and an array has 6 dimensions"
    rules = (
        "an array within an array is not empty"
        if each == "[]" and element not in {"json", "jsonb"}
        else None
        if each == "null"
        else stricter_array(element, each)
        if each.startswith("[") and element not in {"json", "jsonb"}
        else stricter(element, each)
        for each in split(literal)
    )
    return next(filter(None, rules), None)


def split(literal: str) -> list[str]:
    """Return the elements of a JSON array as they were sent."""
    return [bytes(each).decode() for each in msgspec.json.decode(literal, type=list[msgspec.Raw])]


def words_of(column: Column, literal: str) -> str | None:
    """Return the words of one value."""
    if column.type_name in {"json", "jsonb"}:
        return literal
    if column.type_name == "bytea" and isinstance(value := json.loads(literal), str):
        try:
            return "\\x" + base64.b64decode(value, validate=True).hex()
        except ValueError:
            return None
    if literal == "null":
        return None
    if literal == "-0" and not column.by_text:
        return "0"  # a whole number's zero has no sign; -0.0 keeps it
    return str(json.loads(literal)) if literal.startswith('"') else literal


def array_of(element: Column, delimiter: str, literal: str) -> str:
    """Return the words of an array: each element's in quotes, with those in it escaped."""
    nested = element.type_name not in {"json", "jsonb"}
    if nested and literal.startswith(DEEP):
        return "{" * len(DEEP)  # too deep for anybody

    def of(each: str) -> str:
        if each.startswith("[") and nested:
            return array_of(element, delimiter, each)
        it = None if each == "null" else words_of(element, each)
        return "NULL" if it is None else '"' + re.sub(r'(["\\])', r"\\\1", it) + '"'

    return f"{{{delimiter.join(map(of, split(literal)))}}}"
