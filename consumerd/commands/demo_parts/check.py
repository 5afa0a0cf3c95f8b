"""The check: what was produced against what is there, record by record. Pure.

Every record has one right outcome: a row with these values, or a letter with this reason that is the record byte for
byte. The outcome of an upsert is the newest row of each key alone (`newest`). A letter is identified by the partition
and offset it came from: a crash between its acknowledgement and the checkpoint may repeat it, so each crash allows one
more; nothing allows a second row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from consumerd.errors import PoisonReason

Row = tuple[Any, ...]
"""Values in the order of the table's columns; the first identifies the row."""


class Source(NamedTuple):
    """Where a record is in its topic."""

    partition: int
    offset: int

    def __str__(self) -> str:
        """As in `3@1207`."""
        return f"{self.partition}@{self.offset}"


class Message(NamedTuple):
    """What a letter must carry on unchanged; `timestamp` in ms."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp: int


class Produced(msgspec.Struct, frozen=True, kw_only=True):
    """One record and what must become of it: a row, a letter, or neither, when a later record has replaced it."""

    source: Source
    message: Message
    row: Row | None = None
    reason: PoisonReason | None = None


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter, taken apart: the original, and what our headers say of it."""

    source: Source
    message: Message
    reason: str


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What the check found: counts, and a sentence for each fault."""

    produced: int = 0
    written: int = 0
    expected_letters: Counter[str] = field(default_factory=Counter)
    found_letters: Counter[str] = field(default_factory=Counter)
    """By reason, each source once."""
    repeated: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Every fault."""
        return [*self.lost, *self.doubled, *self.wrong]


def newest(produced: Iterable[Produced]) -> list[Produced]:
    """Return the same records, with the row of the last one of each key alone: what an upsert leaves."""
    produced = list(produced)
    last = {record.row[0]: record.source for record in produced if record.row is not None}
    return [
        record
        if record.row is None or last[record.row[0]] == record.source
        else msgspec.structs.replace(record, row=None)
        for record in produced
    ]


def compare(produced: Sequence[Produced], rows: Iterable[Row], letters: Iterable[Letter], *, crashes: int) -> Verdict:
    """Compare the records with the table's rows and the dead-letter topic; `crashes` is how often each may repeat."""
    verdict = Verdict(produced=len(produced))
    by_source: dict[Source, list[Letter]] = {}
    for letter in letters:
        by_source.setdefault(letter.source, []).append(letter)
    _compare_rows(produced, rows, by_source, verdict)
    _compare_letters(produced, by_source, crashes, verdict)
    return verdict


def _compare_rows(
    produced: Sequence[Produced], rows: Iterable[Row], letters: dict[Source, list[Letter]], verdict: Verdict
) -> None:
    expected = {record.row[0]: record for record in produced if record.row is not None}
    seen = set()
    for row in rows:
        verdict.written += 1
        record = expected.get(row[0])
        if record is None:
            verdict.wrong.append(f"row {row[0]} is in the table, and should not be: {row}")
        elif row[0] in seen:
            verdict.doubled.append(f"row {row[0]} (record {record.source}) is in the table more than once")
        elif row != record.row:
            verdict.wrong.append(f"row {row[0]} (record {record.source}) is {row}, and should be {record.row}")
        seen.add(row[0])
    for key, record in expected.items():
        if key not in seen and record.source not in letters:
            verdict.lost.append(f"row {key} (record {record.source}) is missing")


def _compare_letters(
    produced: Sequence[Produced], letters: dict[Source, list[Letter]], crashes: int, verdict: Verdict
) -> None:
    expected = {record.source: record for record in produced if record.reason is not None}
    verdict.expected_letters = Counter(record.reason for record in expected.values() if record.reason is not None)
    verdict.found_letters = Counter(copies[0].reason for copies in letters.values())
    for source, record in expected.items():
        copies = letters.get(source, [])
        if not copies:
            verdict.lost.append(f"the letter of record {source} ({record.reason}) is missing")
        for letter in copies:
            if letter.reason != record.reason:
                verdict.wrong.append(f"the letter of record {source} says {letter.reason}, not {record.reason}")
            if letter.message != record.message:
                verdict.wrong.append(
                    f"the letter of record {source} is not the original: {letter.message}, not {record.message}"
                )
        verdict.repeated += max(0, len(copies) - 1)
        if len(copies) > 1 + crashes:
            verdict.doubled.append(f"the letter of record {source} is there {len(copies)} times")
    for source, copies in letters.items():
        if source not in expected:
            verdict.wrong.append(f"record {source} is dead-lettered ({copies[0].reason}), and should not be")
