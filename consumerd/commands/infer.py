"""What a sample of JSON messages holds: its fields, the columns that they fit, the table that would hold them. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from uuid import UUID

from consumerd import paths
from consumerd.scalars import MAX_IDENTIFIER_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from consumerd.catalog import Column
    from consumerd.paths import Path, Unit

Kind = Literal[
    "null", "boolean", "integer", "large", "number", "text", "time", "local time", "date", "uuid", "list", "object"
]
"""What a value is; `large` is a whole number beyond bigint, `local time` one without a zone."""

MAX_DEPTH: Final = 8
"""Objects within objects that are looked into."""
MAX_FIELDS: Final = 2000
"""Fields of one sample: an object with keys of its own for each message has no end of them."""

WORDS: Final[set[Kind]] = {"text", "time", "local time", "date", "uuid"}
TAKES: Final[dict[int, set[Kind]]] = {
    16: {"boolean"},
    20: {"integer"},
    21: {"integer"},
    23: {"integer"},
    700: {"integer", "large", "number"},
    701: {"integer", "large", "number"},
    1700: {"integer", "large", "number"},
    1082: {"date"},
    1114: {"local time"},
    1184: {"time"},
    2950: {"uuid"},
}
"""What columns take, by the oid of their type; JSON takes everything, and any other type words."""
NEW_TYPES: Final[Sequence[tuple[set[Kind], str]]] = (
    ({"boolean"}, "boolean"),
    ({"integer"}, "bigint"),
    ({"integer", "large", "number"}, "numeric"),
    ({"time"}, "timestamptz"),
    ({"local time"}, "timestamp"),
    ({"date"}, "date"),
    ({"uuid"}, "uuid"),
    (WORDS, "text"),
    (set(get_args(Kind)), "jsonb"),
)
"""What a column of a new table takes, the narrowest first."""
JSON_TYPES: Final = {114, 3802}
EPOCHS: Final = {1082, 1114, 1184}
"""Types that take numbers since 1970, with a unit."""
UNITS: Final[Sequence[tuple[float, Unit]]] = ((1e11, "s"), (1e14, "ms"), (1e17, "us"), (float("inf"), "ns"))
"""Up to which number, by its size for a time of these decades, the unit is which."""

_ESCAPED = re.compile(r'[\x00-\x1f\x7f"\\]')
"""What JSON must escape in a name, which the mapping cannot read, and what would end a comment of TOML."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?(?P<zone>[Zz]|[+-]\d\d:\d\d)?")


@dataclass(slots=True)
class Seen:
    """What was seen of one field."""

    kinds: Counter[Kind] = field(default_factory=Counter)
    largest: int = 0

    @property
    def values(self) -> set[Kind]:
        """What it is where it is not null."""
        return set(self.kinds) - {"null"}


@dataclass(slots=True)
class Sample:
    """The fields of messages, in the order in which they first came."""

    objects: int = 0
    others: int = 0
    """Messages that are no JSON object."""
    fields: dict[Path, Seen] = field(default_factory=dict)
    unnamed: set[Path] = field(default_factory=set)
    """Those whose names `[columns]` cannot have."""

    def always(self, path: Path) -> bool:
        """Whether a field has a value in every message."""
        kinds = self.fields[path].kinds
        return kinds.total() == self.objects and not kinds["null"]


def observe(values: Iterable[bytes | None]) -> Sample:
    """Look at messages' values."""
    sample = Sample()
    for value in values:
        try:
            found = json.loads(value or b"")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            sample.others += 1
            continue
        sample.objects += 1
        for path, inner in _walk((), found):
            if path not in sample.fields:
                if len(sample.fields) + len(sample.unnamed) >= MAX_FIELDS:
                    continue
                if not _can_be_named(path):
                    sample.unnamed.add(path)
                    continue
            seen = sample.fields.setdefault(path, Seen())
            seen.kinds[kind_of(inner)] += 1
            if isinstance(inner, int):
                seen.largest = max(seen.largest, abs(inner))
    return sample


def _walk(path: Path, value: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    for name, inner in value.items():
        yield (*path, name), inner
        if isinstance(inner, dict) and len(path) < MAX_DEPTH:
            yield from _walk((*path, name), inner)


def kind_of(value: object) -> Kind:  # noqa: PLR0911 - one for each kind
    """Tell what a value is."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer" if -(2**63) <= value < 2**63 else "large"
        case float():
            return "number"
        case str():
            return _word(value)
        case list():
            return "list"
        case _:
            return "object"


def _word(text: str) -> Kind:
    try:
        if time := _TIME.fullmatch(text):
            datetime.fromisoformat(text.upper())
            return "time" if time["zone"] else "local time"
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            date.fromisoformat(text)
            return "date"
        if re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text):
            UUID(text)
            return "uuid"
    except ValueError:
        pass
    return "text"


def written(path: Path) -> str:
    """Write a path as `[columns]` does."""
    steps = ""
    for step in map(str, path):
        plain = re.fullmatch(r"""[^.\[\]"']+""", step) and not (step.startswith("@") and not steps)
        quote = "'" if '"' in step else '"'
        steps += f".{step}" if plain else f"[{quote}{step}{quote}]"
    return steps.removeprefix(".")


def _can_be_named(path: Path) -> bool:
    """Whether TOML and the mapping can have a path: a name that JSON must escape, or a dollar, is left out."""
    if any(_ESCAPED.search(str(step)) for step in path):
        return False
    try:
        return "$" not in written(path) and paths.parse(written(path)) == ("field", path)
    except ValueError:
        return False


def sql_type(seen: Seen) -> str:
    """Return the type of a column that takes all that was seen of a field."""
    kinds = seen.values
    return next(name for takes, name in NEW_TYPES if kinds <= takes) if kinds else "jsonb"


def new_columns(sample: Sample) -> dict[str, tuple[Path, str]]:
    """Name a column for each field at the top of messages, with its path and its type."""
    columns: dict[str, tuple[Path, str]] = {}
    for path in sample.fields:
        if len(path) > 1:
            continue
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(path[0])).lower()
        name = re.sub(r"[^a-z0-9_]+", "_", name).strip("_")[:MAX_IDENTIFIER_BYTES] or "field"
        if name[0].isdigit():
            name = f"_{name}"[:MAX_IDENTIFIER_BYTES]
        number, base = 2, name[: MAX_IDENTIFIER_BYTES - 4]
        while name in columns:
            name, number = f"{base}_{number}", number + 1
        columns[name] = (path, sql_type(sample.fields[path]))
    return columns


def match(columns: Sequence[Column], sample: Sample) -> dict[str, tuple[Path, Unit | None]]:
    """Find the field of each column: by its name, by its name in other writing, then within objects."""
    found: dict[str, tuple[Path, Unit | None]] = {}
    for column in columns:
        if column.automatic:
            continue
        for path in _candidates(column.name, sample.fields):
            fits, unit = _fits(column, sample.fields[path])
            if fits:
                found[column.name] = (path, unit)
                break
    return found


def _candidates(name: str, fields: Mapping[Path, Seen]) -> list[Path]:
    """Return the fields that may be a column's, the likeliest first."""
    plain = _plain(name)
    lasts = [path for path in fields if len(path) > 1 and _plain(str(path[-1])) == plain]
    return [
        *((name,) for _ in range(1) if (name,) in fields),
        *(path for path in fields if len(path) == 1 and path != (name,) and _plain(str(path[0])) == plain),
        *(path for path in fields if len(path) > 1 and _plain("".join(map(str, path))) == plain),
        *(lasts if len(lasts) == 1 else ()),
    ]


def _plain(name: str) -> str:
    """Return a name without what snake_case, camelCase and kebab-case differ in."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _fits(column: Column, seen: Seen) -> tuple[bool, Unit | None]:
    """Whether a column takes what was seen of a field, and the unit that numbers in it have."""
    kinds = seen.values
    if column.element is not None:
        return kinds <= {"list"}, None
    if column.oid in JSON_TYPES or kinds <= TAKES.get(column.oid, WORDS):
        return True, None
    if column.oid in EPOCHS and kinds == {"integer"}:
        return True, next(unit for limit, unit in UNITS if seen.largest < limit)
    return False, None
