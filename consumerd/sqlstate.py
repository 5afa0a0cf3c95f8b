"""The map from SQLSTATE to what happens next: data, and one look-up.

Classified by code alone, never by the class of the exception (psycopg's OperationalError also covers 54000 and 55000)
and never by the text of a message (it is translated). A code that is not listed halts: to guess "poison" loses data
to the dead-letter topic, to guess "outage" waits for ever. Source of the codes: PostgreSQL documentation, appendix A.
"""

from __future__ import annotations

from enum import Enum, auto


class Next(Enum):
    """What happens after an error of Postgres."""

    RECONNECT = auto()
    """The connection is gone, or is worth nothing: open another, try again."""
    RETRY = auto()
    """The transaction lost against another one: again, with jitter."""
    SMALLER = auto()
    """The statement was cancelled, perhaps for its time: again, with fewer rows."""
    WAIT = auto()
    """The server lacks something (disk, memory, connections): again, with long pauses."""
    ISOLATE = auto()
    """The data of a row is at fault."""
    RELOAD = auto()
    """A table or column is not there: read the catalog again, and halt if that explains nothing."""
    HALT = auto()
    """The schema, the configuration or this program is at fault."""


CODES: dict[str, Next] = {
    # The connection or the server went away.
    "08000": Next.RECONNECT,
    "08001": Next.RECONNECT,
    "08003": Next.RECONNECT,
    "08004": Next.RECONNECT,
    "08006": Next.RECONNECT,
    "08007": Next.RECONNECT,
    "25P03": Next.RECONNECT,  # idle_in_transaction_session_timeout
    "57P01": Next.RECONNECT,
    "57P02": Next.RECONNECT,
    "57P03": Next.RECONNECT,
    "57P05": Next.RECONNECT,
    "25006": Next.RECONNECT,  # read-only: a demoted primary; the next connection finds the new one
    "28P01": Next.RECONNECT,  # a rotated password: the secret is read again
    "26000": Next.RECONNECT,  # a prepared statement of another session: a pooler in between
    "42P05": Next.RECONNECT,
    # Lost against another transaction.
    "40001": Next.RETRY,
    "40P01": Next.RETRY,
    "55P03": Next.RETRY,
    "57014": Next.SMALLER,
    "25P04": Next.SMALLER,  # transaction_timeout; the connection is gone, too
    # The data of a row.
    "22000": Next.ISOLATE,
    "22001": Next.ISOLATE,
    "22003": Next.ISOLATE,
    "22004": Next.ISOLATE,
    "22007": Next.ISOLATE,
    "22008": Next.ISOLATE,
    "22009": Next.ISOLATE,
    "22012": Next.ISOLATE,
    "22015": Next.ISOLATE,
    "22018": Next.ISOLATE,
    "22019": Next.ISOLATE,
    "22021": Next.ISOLATE,
    "22023": Next.ISOLATE,
    "22025": Next.ISOLATE,
    "22026": Next.ISOLATE,
    "2201B": Next.ISOLATE,
    "2201E": Next.ISOLATE,
    "2201F": Next.ISOLATE,
    "2202E": Next.ISOLATE,
    "2200M": Next.ISOLATE,
    "2200N": Next.ISOLATE,
    "2200S": Next.ISOLATE,
    "2200T": Next.ISOLATE,
    "22030": Next.ISOLATE,
    "22031": Next.ISOLATE,
    "22032": Next.ISOLATE,
    "22P01": Next.ISOLATE,
    "22P02": Next.ISOLATE,
    "22P05": Next.ISOLATE,
    "23001": Next.ISOLATE,  # a deletion, ON DELETE RESTRICT: 23503 before Postgres 18
    "23502": Next.ISOLATE,
    "23503": Next.ISOLATE,
    "23505": Next.ISOLATE,
    "23514": Next.ISOLATE,
    "23P01": Next.ISOLATE,
    "21000": Next.ISOLATE,  # two rows of one key after our own dedupe: a collation finds them equal
    "54000": Next.ISOLATE,  # an index row too large
    "54001": Next.ISOLATE,  # JSON nested too deeply
    "P0001": Next.ISOLATE,  # a trigger's RAISE
    # The table is not as it was.
    "3F000": Next.RELOAD,
    "42703": Next.RELOAD,
    "42P01": Next.RELOAD,
    # Listed only to say that the rest of their class does not apply to them.
    "2200H": Next.HALT,  # a sequence is exhausted
    "22P03": Next.HALT,  # our binary encoding is wrong
    "22P04": Next.HALT,
}

CLASSES: dict[str, Next] = {
    "53": Next.WAIT,  # disk full, out of memory, too many connections
    "58": Next.WAIT,  # an I/O error of the server
}


def next_step(sqlstate: str) -> Next:
    """Return what to do after an error with this code; what is not listed halts."""
    return CODES.get(sqlstate) or CLASSES.get(sqlstate[:2]) or Next.HALT
