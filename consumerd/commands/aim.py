"""Where `consumerd offsets reset` is told to go, in the words and formats of kafka-consumer-groups (KIP-122). Pure."""

from __future__ import annotations

import csv
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RELATIVE = {"to-current", "shift-by"}
"""Ways that count from where the group stands."""
FIELDS = 3
"""Of a line of the CSV: topic, partition, offset."""
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """One way to say where. `number` is an offset, a shift, or a time in ms; `offsets` are those of a file."""

    way: str
    number: int = 0
    offsets: Mapping[TopicPartition, int] = field(default_factory=dict)


Scope = dict[str, "set[int] | None"]
"""By topic, its partitions; None: all of them. Empty: every topic."""


def aim(given: Mapping[str, Any], now: float | None = None) -> Aim:
    """Return the one way that is given; raises ValueError with a sentence."""
    ways = {way: value for way, value in given.items() if value is not None}
    if len(ways) != 1:
        names = ", ".join(f"--{way}" for way in given)
        what = f"not {' and '.join(f'--{way}' for way in ways)}" if ways else "none was given"
        raise ValueError(f"write exactly one of {names}; {what}")
    ((way, value),) = ways.items()
    match way:
        case "to-datetime":
            return Aim(way=way, number=_milliseconds(value))
        case "by-duration":
            seconds = (time.time() if now is None else now) - _duration(value)
            return Aim(way="to-datetime", number=int(seconds * 1000))
        case "from-file":
            return Aim(way=way, offsets=_read(value))
        case "to-offset" | "shift-by":
            return Aim(way=way, number=value)
        case _:
            return Aim(way=way)


def scope(topics: Sequence[str], *, all_topics: bool, aim: Aim) -> Scope:
    """Return what is to be set; raises ValueError with a sentence."""
    if aim.way == "from-file":
        if topics or all_topics:
            raise ValueError("--from-file says itself which partitions: leave --topic and --all-topics out")
        return {
            partition.topic: {p.partition for p in aim.offsets if p.topic == partition.topic}
            for partition in aim.offsets
        }
    if bool(topics) == all_topics:
        raise ValueError("write either --topic TOPIC, TOPIC:0,1 for some of its partitions, or --all-topics")
    chosen: Scope = {}
    for each in topics:
        name, colon, numbers = each.partition(":")
        if not name or (colon and not re.fullmatch(r"[0-9]+(,[0-9]+)*", numbers)):
            raise ValueError(f"--topic {each}: write TOPIC, or TOPIC:0,1 for some of its partitions")
        before = chosen.get(name, set())
        wanted = {int(number) for number in numbers.split(",")} if colon else None
        chosen[name] = None if wanted is None or before is None else before | wanted
    return chosen


def _milliseconds(text: str) -> int:
    """Read a time as Kafka's tool does: without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"--to-datetime {text}: write a time such as 2026-01-31T00:00:00.000, in UTC unless it has a zone"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _duration(text: str) -> float:
    """Read seconds, from ISO 8601 as Kafka's tool, or from a number and a unit as in TOML."""
    if match := re.fullmatch(r"([0-9]{1,15})(ms|s|m|h|d)", text):
        return int(match[1]) * _SECONDS[match[2]]
    try:
        seconds = msgspec.convert(text, timedelta).total_seconds()
    except msgspec.ValidationError:
        seconds = -1.0
    if seconds < 0:
        raise ValueError(f"--by-duration {text}: write PnDTnHnMnS, such as P1DT12H or PT30M, or 90s, 30m, 12h, 1d")
    return seconds


def _read(path: Path) -> dict[TopicPartition, int]:
    """Read the lines of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--from-file {path}: {why}") from None
    offsets = {}
    for number, row in enumerate(csv.reader(lines), 1):
        if not row:
            continue
        if len(row) != FIELDS or not row[1].strip().isdecimal() or not row[2].strip().isdecimal():
            raise ValueError(f"--from-file {path}, line {number}: write topic,partition,offset")
        offsets[TopicPartition(row[0].strip(), int(row[1]))] = int(row[2])
    if not offsets:
        raise ValueError(f"--from-file {path} has no line: write topic,partition,offset")
    return offsets
