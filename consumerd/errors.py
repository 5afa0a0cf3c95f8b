# ruff: noqa: N818 - the names say what happens next, which a suffix would not
"""Every error of the daemon, named by what happens next.

Whoever raises one has decided what to do about it; whoever catches one does exactly that. The map from a
Postgres SQLSTATE to one of these is `consumerd.sqlstate`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consumerd.ways_on import Way

HaltReason = Literal[
    "table",
    "topic",
    "dead_letter",
    "poison",
    "breaker",
    "gap",
    "checkpoint",
    "kafka",
    "database",
    "transform",
    "bug",
]

PoisonReason = Literal["malformed", "missing", "type", "range", "encoding", "unknown_field", "transform", "rejected"]
"""Why a message cannot become a row: the fixed values of the label `reason` of dead-letter metrics.

malformed: not JSON. missing: absent or null where a value is needed. type: of another type. range: outside the
column's range or length. encoding: text that is not UTF-8. unknown_field: one that no column reads, where that is
refused. transform: refused by the handler's transform. rejected: refused by the database itself.
"""

SkipReason = Literal["where", "tombstone", "exists", "operator", PoisonReason]
"""Why a message becomes neither row nor letter: the fixed values of the label `reason` of skip metrics.

where: the handler's `where` does not select it. tombstone: it has no value. exists: a row like it is in the table
already (skip-existing). transform: its transform returns nothing for it. operator: passed over by `consumerd resume
--skip`. Any other is poison's, where `[poison] action` is `skip`.
"""


_COMMAND = re.compile(
    r"\b(?:consumerd (?:resume|restart|reload|setup|offsets|replay|dlq)\b|kafka-[a-z-]+ ).*?(?=`|; |, |\. |\)| \(|;?$)"
    r'|\b(?:ALTER|CREATE|GRANT|DELETE) [A-Z](?:"[^"]*"|[^";])*;'
)
"""Of ours, of Kafka's tools, and SQL, as sentences name them."""
_WHOLE = re.compile("^(?!kafka-)|--bootstrap-server ")
"""One of Kafka's tools that is only mentioned is told by what it lacks."""


class ConsumerdError(Exception):
    """The root of all of them."""


class ConfigError(ConsumerdError):
    """Do not start: exit 78. `problems` has one sentence for each mistake."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UsageError(ConsumerdError):
    """What was typed cannot be: exit 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why one message is not a row. But for `words` it holds no value of the message: it may be told anywhere."""

    reason: PoisonReason
    stage: Literal["decode", "transform", "write"]
    error: str
    """Class of the exception that was raised, for example `psycopg.errors.UniqueViolation`."""
    message: str
    sqlstate: str | None = None
    column: str | None = None
    """Column, or path into the value."""
    words: str | None = field(default=None, repr=False)
    """What the database or the exception said itself, values included: told where `[poison] error_text` is set."""

    def told(self, *, words: bool) -> str:
        """Return the sentence, with their own words if that is wished."""
        return f"{self.message}: {self.words}" if words and self.words else self.message


class Poison(ConsumerdError):
    """Dead-letter the message."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Rejected(ConsumerdError):
    """The database refuses the data: isolate. `row` is the refused row's position in the write, if it is known."""

    def __init__(self, refusal: Refusal, row: int | None) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.row = row


Source = Literal["postgres", "kafka", "dead_letter", "transform"]


class Outage(ConsumerdError):
    """The broker, the database or a transform cannot do it now: retry with backoff, for ever."""

    def __init__(self, source: Source, message: str) -> None:
        super().__init__(message)
        self.source: Source = source


class Cancelled(Outage):
    """Postgres cancelled the statement, for its time above all: again, with fewer rows."""


class Blocked(Outage):
    """What one table or one partition alone waits for, a lock or its transform: again, and meanwhile others go on."""


class Fenced(ConsumerdError):
    """The checkpoint is not where this write expected it: drop the batch, read the checkpoint again."""


class TableChanged(ConsumerdError):
    """The table is not as it was when the encoder was made: load it again, encode again."""


class Halt(ConsumerdError):
    """Stop the handler with nothing skipped. The message says what happened and how to go on.

    `ways` are those that `consumerd resume` goes, which is added to the message where the handler's name is known.
    """

    def __init__(self, reason: HaltReason, message: str, *ways: Way) -> None:
        super().__init__(message)
        self.reason = reason
        self.ways = ways

    @property
    def commands(self) -> list[str]:
        """The lines to type that its message names, to be copied."""
        return [line for line in _COMMAND.findall(str(self)) if _WHOLE.search(line)]
