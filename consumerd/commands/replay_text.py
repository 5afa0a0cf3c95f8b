"""What `consumerd replay` tells: its progress, what it did or would do, and which replays there are."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from consumerd.commands.tables import aligned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from consumerd.commands.replay import Result
    from consumerd.commands.replay_plan import Prepared, Wish
    from consumerd.commands.replays import Record
    from consumerd.replay import Replay

log = logging.getLogger(__name__)

RATE_WINDOW = 10.0
"""Seconds over which the rate is told."""
LOG_INTERVAL = 10.0
"""Seconds between two lines of the log that tell of the progress."""
NAMED = 20
"""Refused messages that the text names; JSON names more."""
MINUTE, HOUR = 60, 3600
CLEAR_LINE = "\r\x1b[K"


class Teller:
    """Tells how far a replay is: on a terminal in one line that stays, elsewhere in a line of the log now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()
        if self._terminal:  # a line of the log does not go on behind ours
            for handler in logging.getLogger().handlers:
                handler.addFilter(self._clear)

    def __call__(self, replay: Replay) -> None:
        """Tell, if it is time to."""
        now = time.monotonic()
        passed, offsets = replay.passed, replay.plan.offsets
        self._seen.append((now, passed))
        while self._seen[0][0] < now - RATE_WINDOW:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = max(0.0, (passed - before) / (now - since)) if now > since else 0.0
        left = (offsets - passed) / rate if rate else None
        if self._terminal:
            share = f"{passed:,} of {offsets:,} offsets ({passed / offsets:.1%}), {rate:,.0f}/s"
            refused = f", {replay.counts.refused.total():,} refused" if replay.counts.refused else ""
            sys.stderr.write(f"{CLEAR_LINE}{share}{refused}{f', {duration(left)} left' if left is not None else ''}")
            sys.stderr.flush()
        elif now - self._told >= LOG_INTERVAL:
            self._told = now
            extra = {
                "handler": replay.handler.name,
                "passed": passed,
                "offsets": offsets,
                "per_second": round(rate),
                "seconds_left": None if left is None else round(left),
                "refused": replay.counts.refused.total(),
            }
            log.info("replaying", extra=extra)

    def over(self) -> None:
        """Clear the terminal's line."""
        if self._terminal:
            self._clear(None)

    @staticmethod
    def _clear(_: logging.LogRecord | None) -> bool:
        sys.stderr.write(CLEAR_LINE)
        return True


def duration(seconds: float) -> str:
    """Return a time that is left, in words."""
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{seconds // MINUTE:.0f} min {seconds % MINUTE:.0f} s"
    return f"{seconds // HOUR:.0f} h {seconds % HOUR // MINUTE:.0f} min"


def planned(prepared: Prepared) -> str:
    """Return what is to be replayed."""
    handler = prepared.handler
    lines = [f"{handler.name} into {', '.join(sorted(set(prepared.targets.values())))} ({handler.table.write})"]
    if record := prepared.goes_on:
        lines[0] = f"Replay {record.id}, begun {record.started:%Y-%m-%d %H:%M:%S %Z}, goes on: {lines[0]}"
    rows = [[str(p), str(of.start), str(of.end - 1), f"{of.end - of.start:,}"] for p, of in prepared.ranges.items()]
    lines += (
        aligned([["partition", "first", "last", "offsets"], *rows]) if rows else ["There is nothing in this range."]
    )
    lines += [f"Left out: {gap}." for gap in prepared.gaps]
    return "\n".join(lines)


def tried(prepared: Prepared, result: Result, wish: Wish) -> str:
    """Return what a dry run found."""
    offsets = sum(of.end - of.start for of in prepared.ranges.values())
    lines = []
    if offsets:
        lines.append(
            f"Of {offsets:,} offsets the first {result.passed:,} were tried, each batch written and rolled back: "
            f"{_counted(result)}."
        )
        lines += _named(result)
        if result.counts.refused and not wish.dead_letter:
            lines.append("Refused messages are counted and named, and get no other letter: --dead-letter sends one.")
        lines.append(
            "The table is not changed. Its triggers ran in those transactions, and sequences of its defaults may have "
            "moved on; rows that would collide with those of another batch are not found."
        )
    lines += [f"Not ended: {_line(record)}" for record in prepared.others]
    lines.append("Nothing was changed; --execute replays.")
    return "\n".join(lines)


def ended(number: int, result: Result, record: Record | None) -> str:
    """Return what became of a replay."""
    lines = _named(result)
    if record is not None:
        lines.append(f"Replay {number} has ended: {_totals(record)}.")
    else:
        lines.append(f"Replay {number} has not ended; this run: {_counted(result)}.")
    return "\n".join(lines)


def as_json(prepared: Prepared, result: Result, *, number: int | None = None, record: Record | None = None) -> str:
    """Return the same as one JSON object."""
    entry: dict[str, Any] = {
        "handler": prepared.handler.name,
        "targets": dict(prepared.targets),
        "replay": number,
        "goes_on": prepared.goes_on is not None,
        "ranges": [
            {"topic": p.topic, "partition": p.partition, "start": of.start, "end": of.end}
            for p, of in prepared.ranges.items()
        ],
        "gaps": list(prepared.gaps),
        "passed": result.passed,
        "offsets": result.offsets,
        "rows": result.counts.rows,
        "existing": result.counts.existing,
        "refused": dict(result.counts.refused),
        "skipped": dict(result.counts.skipped),
        "refusals": [
            {"topic": p.topic, "partition": p.partition, "offset": offset, **asdict(refusal)}
            for p, offset, refusal in result.counts.told
        ],
        "record": asdict(record) if record else None,
        "halt": result.halt,
        "stopped": result.stopped,
    }
    return msgspec.json.encode(entry).decode()


def listed(records: Sequence[Record]) -> str:
    """Return the replays that there are, a line each."""
    return "\n".join(map(_line, records)) or "There are no replays of this handler."


def record_json(record: Record) -> str:
    """Return one replay as a JSON object."""
    return msgspec.json.encode(asdict(record)).decode()


def _line(record: Record) -> str:
    if record.finished is not None:
        state = f"ended {record.finished:%Y-%m-%d %H:%M:%S %Z}"
    else:
        share = record.passed / record.offsets if record.offsets else 1.0
        state = f"stands at {share:.1%}, last seen {record.seen:%Y-%m-%d %H:%M:%S %Z}"
    failed = f"; it failed: {record.failed}" if record.failed else ""
    begun = f"begun {record.started:%Y-%m-%d %H:%M:%S %Z}"
    return f"{record.id}: {record.range} into {record.target}, {begun}, {state}: {_totals(record)}{failed}"


def _totals(record: Record) -> str:
    return f"{record.rows:,} rows, {record.refused:,} refused, {record.skipped:,} skipped"


def _counted(result: Result) -> str:
    counts = result.counts
    there = f" ({counts.existing:,} of them there already)" if counts.existing else ""
    refused, skipped = _of_reasons("refused", counts.refused), _of_reasons("skipped", counts.skipped)
    return f"{counts.rows:,} rows{there}, {refused}, {skipped}"


def _of_reasons(what: str, counts: Mapping[str, int]) -> str:
    """Return a count, with those of its parts behind it: `12 refused (missing 10, type 2)`."""
    parts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()) if count)
    return f"{sum(counts.values()):,} {what}{f' ({parts})' if parts else ''}"


def _named(result: Result) -> list[str]:
    counts = result.counts
    lines = []
    for partition, offset, refusal in sorted(counts.told, key=lambda each: each[:2])[:NAMED]:
        details = [f"column {refusal.column}"] if refusal.column else []
        details += [f"SQLSTATE {refusal.sqlstate}"] if refusal.sqlstate else []
        why = f"{refusal.reason}: {refusal.message}" + (f" ({', '.join(details)})" if details else "")
        lines.append(f"{partition}@{offset} is refused: {why}")
    if (more := counts.refused.total() - len(lines)) > 0:
        lines.append(f"and {more:,} more are refused")
    return lines
