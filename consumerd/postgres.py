"""Connections to Postgres, the transaction that every write runs in, and the meaning of its errors.

A connection is in autocommit mode and says BEGIN itself, together with the settings that a value's meaning depends on:
a role's or a database's default would otherwise change what is stored. COMMIT is checked by its command tag, because
Postgres answers COMMIT of a failed transaction with ROLLBACK and no error.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection, sql
from psycopg.conninfo import conninfo_to_dict

from consumerd import tls
from consumerd.errors import (
    Blocked,
    Cancelled,
    ConfigError,
    ConsumerdError,
    Halt,
    Outage,
    Refusal,
    Rejected,
    TableChanged,
)
from consumerd.sqlstate import Next, next_step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from consumerd.config import PostgresConfig

CONNECTION_DEFAULTS: dict[str, str] = {
    "connect_timeout": "4",
    # A half-open connection was noticed after 11 s, or never; with these after 30 s at most.
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
    # After a failover one of several hosts is the primary; a write to a standby is refused.
    "target_session_attrs": "read-write",
}
"""libpq parameters where the DSN says nothing (PostgreSQL documentation, 32.1.2)."""

LOCK_TIMEOUT = """\
SELECT pg_catalog.set_config('lock_timeout', greatest(1, least(10000, nullif(setting::int, 0) / 2))::text, false)
FROM pg_catalog.pg_settings WHERE name = 'statement_timeout'"""
"""Where `[postgres.settings]` says nothing: a locked table is an outage that can be seen, not a hang, and not a write
that took too long."""

SETTINGS_TIMEOUT = 5.0
"""Seconds for what is said on a new connection, before anybody watches over it."""

LOCK_NOT_AVAILABLE = "55P03"

BEGIN = """\
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, MDY'; SET LOCAL IntervalStyle = 'postgres';
SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                                        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"""

Statement = tuple[LiteralString | sql.Composed, "Mapping[str, Any] | None"]
"""A statement and its values."""

busy_since: WeakKeyDictionary[AsyncConnection[Any], float] = WeakKeyDictionary()
"""Since when, monotonic, each connection that is in a transaction or a call has been in it (`consumerd.watch`)."""

pooled: WeakSet[AsyncConnection[Any]] = WeakSet()
"""Connections that a pooler shares out: the server knows them by another number than we do."""

OWN_WORDS = {"ProcessInterrupts", "DeadLockReport"}
"""Functions of the server whose messages (cancelled, timed out, deadlock) hold no value, whatever the context. Their
SQLSTATEs would not do: a trigger may raise those with words of its own."""

ROW_POLICIES = {"ExecWithCheckOptions"}
"""The server's function that holds a row against the policies of its table; its SQLSTATE is also that of a privilege
that is missing."""

RAISES = {"exec_stmt_raise", "PLy_elog_impl"}
"""Functions of PL/pgSQL and PL/Python that raise what a function of the database says: the names of constraint, column
and table are its words, too, and may be values."""

WORDS = {"42601", "42602", "42704", "42883", "42P01"}
"""SQLSTATEs by which some types' input functions (tsquery, ltree, regclass) refuse words. Of a statement they would say
that it is wrong; where COPY's context names a column, and no function before it, they speak of the value in that."""

WORDS_LENGTH = 1000
"""Characters of the server's own words that are kept of a refusal."""

_COPY_COLUMN = re.compile(r"COPY .*, line \d+, column ")
_COPY_LINE = re.compile(r"^COPY .*, line (\d+)", re.MULTILINE)


async def connect(config: PostgresConfig, application_name: str) -> AsyncConnection[Any]:
    """Open a connection, secrets read afresh; raises Outage with the server's sentence."""
    parameters = _parameters(config, application_name)
    try:
        conn = await AsyncConnection.connect("", autocommit=True, prepare_threshold=None, **parameters)
    except psycopg.Error as error:
        # Also a wrong database or role: they have no SQLSTATE here, and may come right without us.
        said = _one_line(error)
        why = await asyncio.to_thread(_certificate, said, parameters) if tls.FAILED in said else None
        way = why or f"{said}: correct [postgres] if it is not merely down"
        raise Outage("postgres", f"cannot connect to Postgres: {way}") from error
    name = ""
    timer = asyncio.get_running_loop().call_later(SETTINGS_TIMEOUT, cut, conn)
    try:
        cursor = await conn.execute("SELECT pg_catalog.pg_backend_pid()")
        if await cursor.fetchone() != (conn.info.backend_pid,):
            pooled.add(conn)
        for name, value in config.settings.items():
            await conn.execute("SELECT set_config(%s, %s, false)", [name, value])
        if "lock_timeout" not in config.settings:
            await conn.execute(LOCK_TIMEOUT)
    except psycopg.Error as error:
        await conn.close()
        if error.sqlstate is not None and next_step(error.sqlstate) in {Next.HALT, Next.ISOLATE}:
            raise Halt("database", f"[postgres.settings] {name}: {_one_line(error)}") from error
        raise translate(error, conn) from error
    except BaseException:
        await conn.close()
        raise
    finally:
        timer.cancel()
    return conn


def _certificate(sentence: str, parameters: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the server's certificate, found with libpq's own settings and defaults. Blocking."""
    default = Path.home() / ".postgresql" / "root.crt"
    trusted = parameters.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    trusted = trusted or (str(default) if default.exists() else "system")
    mode = parameters.get("sslmode") or os.environ.get("PGSSLMODE")
    named = mode == "verify-full" or trusted == "system"
    return tls.postgres(sentence, None if trusted == "system" else trusted, named=named)


def _parameters(config: PostgresConfig, application_name: str) -> dict[str, Any]:
    """Return libpq's parameters, secrets read afresh."""
    try:
        dsn = config.dsn if isinstance(config.dsn, str) else config.dsn.read()
        given = conninfo_to_dict(dsn)
        if config.password is not None:
            given["password"] = config.password.read()
    except ConfigError as error:
        raise Outage("postgres", str(error)) from error
    except psycopg.ProgrammingError as error:
        option = str(error).strip() if str(error).startswith("invalid connection option") else ""
        sentence = "postgres.dsn is not a connection string that libpq understands"
        raise Halt("database", f"{sentence}: {option}" if option else sentence) from error
    return {
        **CONNECTION_DEFAULTS,
        **given,
        "application_name": application_name,
        "client_encoding": "utf8",
    }


@asynccontextmanager
async def transaction(
    conn: AsyncConnection[Any], *opening: Statement, probe: bool = False
) -> AsyncIterator[list[list[tuple[Any, ...]]]]:
    """Run a transaction; psycopg's errors leave it translated. A probe ends with ROLLBACK.

    It begins with the statements given, in one round trip with BEGIN; their rows are what the block gets.

    After anything but an error of psycopg or of ours (a cancelled task, above all) the connection is closed: its state
    is unknown, and the server rolls back.
    """
    busy_since[conn] = time.monotonic()
    try:
        yield await _begin(conn, opening)
        end = "ROLLBACK" if probe else "COMMIT"
        cursor = await conn.execute(end)
        if cursor.statusmessage != end:
            raise Halt("bug", f"{end} was answered with {cursor.statusmessage}")  # noqa: TRY301 - rolls back like any
    except psycopg.Error as error:
        await _roll_back(conn)
        raise translate(error, conn) from error
    except ConsumerdError:
        await _roll_back(conn)
        raise
    except BaseException:
        await conn.close()
        raise
    finally:
        busy_since.pop(conn, None)


async def _begin(conn: AsyncConnection[Any], opening: Sequence[Statement]) -> list[list[tuple[Any, ...]]]:
    cursor = await conn.execute(together(conn, [(BEGIN, None), *opening]))
    answers = []
    more: bool | None = True
    while more:
        answers.append(await cursor.fetchall() if cursor.description else [])
        more = cursor.nextset()
    return answers[len(answers) - len(opening) :]


def together(conn: AsyncConnection[Any], statements: Sequence[Statement]) -> bytes:
    """Return statements as one text with their values in it, to be said in one round trip."""
    cursor = AsyncClientCursor(conn)
    return ";\n".join(cursor.mogrify(query, values) for query, values in statements).encode()


def cut(conn: AsyncConnection[Any]) -> None:
    """Break a connection under whatever waits for it, which gets an error and closes it.

    To close it from here would free its number for another socket, whose events the one that waits would get.
    """
    if not conn.closed:
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(conn.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)


class TransactionId(NamedTuple):
    """A transaction, and the history that its number belongs to: after a failover or a crash it may be another's."""

    number: str
    history: str


_HISTORY = """\
SELECT concat_ws(' ', pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8),
                 (SELECT system_identifier FROM pg_catalog.pg_control_system()),
                 pg_catalog.pg_postmaster_start_time(), (SELECT stats_reset FROM pg_catalog.pg_stat_archiver))"""
"""A server that crashed gives the numbers out again that had not come to its disk. It is a crash that the start of the
postmaster tells, or, where it outlived its backends, the statistics, which a crash resets."""


async def transaction_id(conn: AsyncConnection[Any]) -> TransactionId:
    """Return the id of the open transaction; to be called within one."""
    number = await (await conn.execute("SELECT pg_catalog.pg_current_xact_id()::text")).fetchone()
    history = await (await conn.execute(_HISTORY)).fetchone()
    return TransactionId(*(number or ()), *(history or ()))


async def was_committed(conn: AsyncConnection[Any], transaction: TransactionId) -> bool:
    """Tell whether a transaction is known to have been committed; raises Outage while it is in progress still."""
    history = await call(conn, _HISTORY)
    if history != [(transaction.history,)]:
        return False
    query = "SELECT pg_catalog.pg_xact_status(%(id)s::text::xid8)"
    ((status,),) = await call(conn, query, {"id": transaction.number})
    if status == "in progress":
        raise Outage("postgres", "a COMMIT was not answered, and its transaction has not ended yet")
    return bool(status == "committed")


@asynccontextmanager
async def errors_of(conn: AsyncConnection[Any]) -> AsyncIterator[None]:
    """Translate psycopg's errors of what runs outside a write: there nothing is read again from the catalog."""
    busy_since[conn] = time.monotonic()
    try:
        yield
    except psycopg.Error as error:
        meaning = translate(error, conn)
        if isinstance(meaning, TableChanged):
            raise Halt("database", f"{meaning}; `consumerd setup` makes the daemon's own tables") from error
        if isinstance(meaning, Rejected):
            raise Halt("database", f"Postgres refused a statement: {meaning} (SQLSTATE {error.sqlstate})") from error
        raise meaning from error
    finally:
        busy_since.pop(conn, None)


def translate(  # noqa: PLR0911 - one for each meaning
    error: psycopg.Error, conn: AsyncConnection[Any]
) -> ConsumerdError:
    """Return what an error of Postgres means to us, by its SQLSTATE."""
    state = error.sqlstate
    if state is None:
        if conn.closed or conn.broken:
            return Outage("postgres", f"the connection to Postgres was lost: {_one_line(error)}")
        return Halt("bug", f"psycopg: {_one_line(error)}")
    step = next_step(state)
    if state == "42501" and error.diag.source_function in ROW_POLICIES:
        return Rejected(_refusal(error, state), _row(error))
    if state in WORDS and _COPY_COLUMN.match(error.diag.context or ""):
        return Rejected(_refusal(error, state), _row(error))
    if state == "42501":
        return Halt("table", f"Postgres: {_one_line(error)} (SQLSTATE {state}): grant it to role {conn.info.user}")
    match step:
        case Next.ISOLATE:
            return Rejected(_refusal(error, state), _row(error))
        case Next.RELOAD:
            return TableChanged(f"Postgres refused the write: {_one_line(error)} (SQLSTATE {state})")
        case Next.HALT:
            return Halt("database", f"Postgres refuses: {_one_line(error)} (SQLSTATE {state}): mend its cause there")
        case Next.SMALLER:
            return Cancelled("postgres", f"Postgres: {_one_line(error)} (SQLSTATE {state})")
        case _:
            outage = Blocked if state == LOCK_NOT_AVAILABLE else Outage
            return outage("postgres", f"Postgres: {_one_line(error)} (SQLSTATE {state})")


def _refusal(error: psycopg.Error, state: str) -> Refusal:
    """Say why a row was refused, without the server's words: they hold values of the row."""
    name = type(error).__name__
    raised = error.diag.source_function in RAISES
    constraint, column = (None, None) if raised else (error.diag.constraint_name, error.diag.column_name)
    details = [f"{label} {value}" for label, value in (("constraint", constraint), ("column", column)) if value]
    if state == "23514" and constraint is None and error.diag.table_name and not raised:
        details = [f"no partition of {error.diag.schema_name}.{error.diag.table_name} takes it"]
    if state == "42501":
        details = ["by a row-level security policy"]
    return Refusal(
        reason="rejected",
        stage="write",
        error=f"psycopg.errors.{name}",
        message=", ".join([f"refused by Postgres: {name}", *details]),
        sqlstate=state,
        column=column,
        words="; ".join(filter(None, (error.diag.message_primary, error.diag.message_detail)))[:WORDS_LENGTH] or None,
    )


def _row(error: psycopg.Error) -> int | None:
    """Return the position, from 0, of the row that COPY's error context names. A translated one names none to us."""
    match = _COPY_LINE.search(error.diag.context or "")
    return int(match[1]) - 1 if match else None


def _one_line(error: psycopg.Error) -> str:
    """Return what may be told: DETAIL and CONTEXT hold values of rows, and so may a message that has a context.

    A context says that a row was being read, or that a function of the database's own raised the error.
    """
    if error.diag.context and error.diag.source_function not in OWN_WORDS:
        return type(error).__name__
    return error.diag.message_primary or " ".join(str(error).split())


async def _roll_back(conn: AsyncConnection[Any]) -> None:
    with suppress(psycopg.Error):
        await conn.execute("ROLLBACK")


async def call(
    conn: AsyncConnection[Any], query: sql.Composed | LiteralString, values: Mapping[str, Any] | None = None
) -> list[tuple[Any, ...]]:
    """Run one query outside the write path and return its rows; psycopg's errors leave it translated."""
    async with errors_of(conn):
        cursor = await conn.execute(query, values)
        return await cursor.fetchall() if cursor.description else []
