"""What one value of TOML may be: durations, sizes, names, topics, and the sentence for what is none.

A rule is a `ValueError` whose text is the sentence the user reads, going on from the key's name. It never repeats a
string value: that might be a password.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from consumerd import paths
from consumerd.credentials import Secret, parse_property, scalar_text

Property = str | Secret
"""A librdkafka property as text (numbers and true/false included), or the way to a secret."""

MAX_SECONDS = 365 * 86_400.0
"""The longest duration. Lock and queue timeouts overflow somewhere above; nobody waits a year."""
MAX_IDENTIFIER_BYTES = 63
"""Postgres cuts longer names off silently (NAMEDATALEN - 1)."""
MAX_PORT = 65_535

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_BYTES: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_TABLE_PART = re.compile(r'"(?:[^"]|"")+"|[^".]+')
_BOOLEAN_ON = re.compile(r"on|t(r(u(e)?)?)?|y(e(s)?)?|1", re.IGNORECASE)
"""What Postgres takes for true."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
TOPIC_PLACE: Final = "${topic}"
"""Where the topic's name stands in `table.name`."""
_TOPIC_RULE = "must be a Kafka topic name: 1 to 249 of A-Z a-z 0-9 . _ -"


class Unset(Enum):
    """The type of `UNSET`, which differs from every value that TOML can hold."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


def must(holds: Callable[[Any], bool], sentence: str) -> AfterValidator:
    """Make a rule of a condition and the sentence for when it does not hold."""

    def check(value: object) -> object:
        if not holds(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def between(low: int, high: int) -> AfterValidator:
    """Make a rule of the bounds of a number, both included."""
    return must(lambda number: low <= number <= high, f"must be from {low} to {high}")


def seconds(value: object, info: ValidationInfo) -> float:
    """Read a duration (`500ms 5s 1m 2h 1d`) into seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if info.context is not None:
            raise ValueError('a number alone has no unit: write "5s" (units: ms s m h d)')
        return float(value)
    return seconds_of(value)


def seconds_of(value: object) -> float:
    """Read a duration that has its unit."""
    match = re.fullmatch(r"([0-9]{1,15})(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be a whole number and a unit (ms s m h d): write "5s"')
    result = int(match[1]) * _SECONDS[match[2]]
    if not 0 < result <= MAX_SECONDS:
        raise ValueError("must be more than 0 and at most 365d")
    return result


def size(value: object, info: ValidationInfo) -> int:
    """Read a size (`512KiB 8MiB 1GiB`) into bytes."""
    if info.context is None and isinstance(value, int):
        return value
    match = re.fullmatch(r"([0-9]{1,9})(KiB|MiB|GiB)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be a whole number with KiB, MiB or GiB: write "8MiB"')
    if not int(match[1]):
        raise ValueError("must be more than 0")
    return int(match[1]) * _BYTES[match[2]]


def folder(info: ValidationInfo) -> Path | None:
    """Give the folder where relative paths of TOML start: the config file's."""
    return info.context["folder"] if info.context else None


def absolute(value: object, info: ValidationInfo) -> Path:
    """Read a path; a relative one starts at the config file's folder."""
    if not isinstance(value, str | Path):
        raise ValueError("must be a string, in quotes")  # noqa: TRY004 (pydantic takes ValueError)
    return (folder(info) or Path()) / value


def parse_named_property(value: tuple[str, object], info: ValidationInfo) -> Property:
    """Read a librdkafka property, handed over with its name."""
    return parse_property(*value, folder(info))


def parse_setting(value: tuple[str, object]) -> str:
    """Read a setting of Postgres's sessions, handed over with its name."""
    if value[0] == "application_name":
        raise ValueError("is set by the daemon: consumerd/<handler>")
    if value[0] == "client_encoding":
        raise ValueError("is always UTF8: JSON is, and so is what is written")
    text = scalar_text(value[1], "must be a string, a number, true or false; a name with dots is written in quotes")
    if value[0].lower().endswith("transaction_read_only") and _BOOLEAN_ON.fullmatch(text.strip()):
        raise ValueError("would let nothing be written: take it out")
    return text


def with_names(table: object) -> object:
    """Hand each value its name, so that one rule sees both and its error stands at that entry."""
    return {name: (name, value) for name, value in table.items()} if isinstance(table, dict) else table


def listen_address(value: str) -> str:
    """Check HOST:PORT."""
    host, _, port = value.rpartition(":")
    good_host = host.startswith("[") == host.endswith("]") and (":" not in host or host.startswith("["))
    if not (host.strip("[]") and good_host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= MAX_PORT):
        raise ValueError(f'must be "HOST:PORT" with a port from 0 to {MAX_PORT}, such as "127.0.0.1:9464"')
    return value


def topic_or_pattern(value: str) -> str:
    """Check the name of a topic, or a pattern for them."""
    if not value.startswith("^"):
        if not is_topic(value):
            raise ValueError(f"{_TOPIC_RULE}; a pattern starts with ^")
        return value
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return value


def is_topic(value: str) -> bool:
    """Tell a legal topic name (Kafka's `Topic.validate`)."""
    return _TOPIC.fullmatch(value) is not None and value not in {".", ".."}


def start_of(value: object) -> str | datetime:
    """Read where a handler begins without a checkpoint; TOML may write the time bare or in quotes."""
    if isinstance(value, str) and value in {"earliest", "latest"}:
        return value
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    if not isinstance(time, datetime):
        raise ValueError('must be "earliest", "latest" or a time such as 2026-01-31T00:00:00Z')  # noqa: TRY004
    if time.utcoffset() is None:
        raise ValueError("a time needs its zone: write 2026-01-31T00:00:00Z or …+01:00")
    if time < EPOCH:
        raise ValueError('must not be before 1970, from when Kafka counts time: write "earliest"')
    return time


def is_identifier(name: str) -> bool:
    """Tell a name that Postgres takes whole."""
    return 0 < len(name.encode(errors="replace")) <= MAX_IDENTIFIER_BYTES and "\0" not in name


def table_parts(name: str) -> list[str]:
    """Return "table" or "schema.table" in parts, with their quotes: a dot within these belongs to the name."""
    parts: list[str] = []
    position = 0
    while part := _TABLE_PART.match(name, position):
        parts.append(part[0])
        position = part.end() + 1
        if name[part.end() : position] != ".":
            break
    return parts if position == len(name) + 1 else []


def folded(part: str) -> str:
    """Return the name that Postgres takes a part of a table's name for: as it is within quotes, else in lower case."""
    return part[1:-1].replace('""', '"') if part.startswith('"') else part.lower()


def is_table(name: str) -> bool:
    """Tell "table" or "schema.table"; quoted parts may hold dots."""
    parts = table_parts(name)
    return len(parts) in {1, 2} and all(bool(part.strip()) and is_identifier(folded(part)) for part in parts)


def is_function(name: str) -> bool:
    """Tell "module:function"; a file's name is no module's."""
    module, _, function = name.partition(":")
    return not module.endswith(".py") and all(part.isidentifier() for part in [*module.split("."), function])


NO_REPEATS = must(lambda names: len(set(names)) == len(names), "names the same twice")


Duration = Annotated[float, BeforeValidator(seconds)]
Size = Annotated[int, BeforeValidator(size)]
Text = Annotated[str, must(lambda text: text.strip() and text.isprintable(), "must be one line of text, not empty")]
Topic = Annotated[str, must(is_topic, _TOPIC_RULE)]
Identifier = Annotated[str, must(is_identifier, f"must be a name of 1 to {MAX_IDENTIFIER_BYTES} bytes")]
Count = Annotated[int, must(lambda number: number > 0, "must be 1 or more")]
KeySource = Annotated[
    str,
    must(
        lambda source: paths.parse(source).place == "@key",
        'must be "@key", the message\'s key, or a path into it, such as "@key.id"',
    ),
]
