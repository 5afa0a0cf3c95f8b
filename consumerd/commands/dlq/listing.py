"""`consumerd dlq list`: letters in groups of one reason, class of error and status, with the first and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from consumerd.commands.tables import aligned

if TYPE_CHECKING:
    from collections.abc import Iterable

    from consumerd.commands.dlq.survey import Standing, Survey

HEAD = ("status", "reason", "error", "letters", "first failed", "source", "last failed", "source")


@dataclass(slots=True)
class Group:
    """Letters of one status, reason and class of error."""

    status: str
    reason: str
    error: str
    first: Standing
    last: Standing
    count: int = 0

    def add(self, letter: Standing) -> None:
        """Count a letter."""
        self.count += 1
        if letter.failed_at < self.first.failed_at:
            self.first = letter
        if letter.failed_at >= self.last.failed_at:
            self.last = letter

    def line(self) -> str:
        """Return it as JSON."""
        ends = {"first": _end(self.first), "last": _end(self.last)}
        return msgspec.json.encode(
            {"status": self.status, "reason": self.reason, "error": self.error, "letters": self.count, **ends}
        ).decode()

    def row(self) -> list[str]:
        """Return it as a row of the table."""
        ends = [part for letter in (self.first, self.last) for part in (clock(letter), str(letter))]
        return [self.status, self.reason, self.error, str(self.count), *ends]


def groups(letters: Iterable[Standing]) -> list[Group]:
    """Return the groups, the largest first."""
    found: dict[tuple[str, str, str], Group] = {}
    for letter in letters:
        key = (letter.status, letter.reason, letter.error)
        if key not in found:
            found[key] = Group(*key, first=letter, last=letter)
        found[key].add(letter)
    return sorted(found.values(), key=lambda group: (-group.count, group.status, group.reason, group.error))


def text(found: list[Group], survey: Survey) -> str:
    """Return a table for people, and what the letters come to."""
    lines = [*aligned([HEAD, *(group.row() for group in found)]), ""] if found else []
    counts = dict.fromkeys(("open", "failed", "redriven", "discarded"), 0)
    for group in found:
        counts[group.status] += group.count
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines.append(f"{sum(counts.values())} letters{f': {told}' if told else ''}.")
    if survey.others:
        lines.append(f"The topic holds {survey.others} messages besides that are no letters of this handler.")
    if survey.outlived:
        lines.append(
            f"{survey.outlived} more are of messages that the handler has read again since: rows, or new letters."
        )
    return "\n".join(lines)


def clock(letter: Standing) -> str:
    """Return when a letter was written, to the second."""
    return letter.failed_at.isoformat(timespec="seconds").replace("+00:00", "Z")


def _end(letter: Standing) -> dict[str, Any]:
    place = letter.place
    return {
        "failed_at": letter.failed_at,
        "topic": place.topic,
        "partition": place.partition,
        "offset": letter.offset,
    }
