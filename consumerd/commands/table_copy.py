"""A copy of a table for `consumerd tune`: written to in place of the real one, and dropped.

It is a table of the daemon's own schema, logged as the real one is, and made by `LIKE ... INCLUDING ALL`: columns,
constraints, indexes, storage. What is not copied cannot reach the real table either: triggers, foreign keys, policies,
partitions. One thing that is copied can: a default, which draws from the real table's sequence or calls a function of
the database's own. Such a default is replaced, and a CHECK that calls a volatile function is left out. All of that is
in the transaction that makes the copy.

A session holds an advisory lock on its copy for as long as it lives. A copy that nobody holds was left by a tune that
crashed: the next one drops it.
"""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from psycopg import sql

from consumerd import postgres
from consumerd.catalog import VARHDRSZ
from consumerd.checkpoint import schema_is_there
from consumerd.errors import Halt
from consumerd.postgres import call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from psycopg import AsyncConnection

PREFIX: Final = "tune_"
LOCK: Final = "pg_catalog.hashtext('consumerd tune')"

_MAY_CREATE = """\
SELECT pg_catalog.has_schema_privilege(%(schema)s, 'CREATE'), quote_ident(current_user), quote_ident(%(schema)s)"""

_LEFT_OVER = f"""\
WITH copies AS MATERIALIZED (
    SELECT c.oid, c.relname FROM pg_catalog.pg_class c
    WHERE c.relnamespace = to_regnamespace(quote_ident(%(schema)s)) AND c.relkind = 'r'
      AND c.relname ~ '^{PREFIX}[0-9a-f]{{8}}$' AND pg_catalog.pg_has_role(c.relowner, 'MEMBER')
)
SELECT relname FROM copies WHERE pg_catalog.pg_try_advisory_xact_lock({LOCK}, oid::int8::bit(32)::int)"""  # noqa: S608

_HOLD = f"SELECT pg_catalog.pg_advisory_lock({LOCK}, to_regclass(%(name)s)::oid::int8::bit(32)::int)"

_DEFAULTS = """\
SELECT a.attnum, a.attname, a.attnotnull, a.atttypmod, coalesce(nullif(t.typbasetype, 0), t.oid)::int8
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = to_regclass(%(name)s) AND a.attnum > 0 AND a.attgenerated = '' AND a.attidentity = '' AND (
    pg_catalog.pg_get_expr(d.adbin, d.adrelid) ~ '(nextval|setval)\\('
    OR (d.oid IS NULL AND t.typtype = 'd' AND t.typdefault LIKE '%%(%%')
    OR EXISTS (
        SELECT FROM pg_catalog.pg_depend p
        LEFT JOIN pg_catalog.pg_class s ON p.refclassid = 'pg_catalog.pg_class'::regclass AND s.oid = p.refobjid
        LEFT JOIN pg_catalog.pg_proc f ON p.refclassid = 'pg_catalog.pg_proc'::regclass AND f.oid = p.refobjid
        WHERE p.classid = 'pg_catalog.pg_attrdef'::regclass AND p.objid = d.oid
          AND (s.relkind = 'S' OR f.provolatile = 'v' OR p.refclassid = 'pg_catalog.pg_operator'::regclass)))
ORDER BY a.attnum"""
"""Defaults that draw from a sequence, or call a function that may do anything. Those of Postgres itself (now(), say)
are not in pg_depend, and do nothing but for the two that are looked for by name. A domain may have a default, too."""

_CHECKS = """\
SELECT c.conname FROM pg_catalog.pg_constraint c
WHERE c.conrelid = to_regclass(%(name)s) AND c.contype = 'c' AND EXISTS (
    SELECT FROM pg_catalog.pg_depend p JOIN pg_catalog.pg_proc f ON f.oid = p.refobjid
    WHERE p.classid = 'pg_catalog.pg_constraint'::regclass AND p.objid = c.oid
      AND p.refclassid = 'pg_catalog.pg_proc'::regclass AND f.provolatile = 'v')"""

_PUBLISHED = """\
SELECT DISTINCT pubname FROM pg_catalog.pg_publication_tables WHERE schemaname = %(schema)s AND tablename = %(table)s"""

_NOT_COPIED = """\
SELECT (SELECT count(*) FROM pg_catalog.pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal),
       (SELECT count(*) FROM pg_catalog.pg_constraint WHERE conrelid = c.oid AND contype = 'f'),
       (SELECT count(*) FROM pg_catalog.pg_policy WHERE polrelid = c.oid),
       (SELECT count(*) FROM pg_catalog.pg_inherits WHERE inhparent = c.oid)
FROM pg_catalog.pg_class c WHERE c.oid = to_regclass(%(name)s)"""

NUMBERS: Final = {20, 21, 23, 700, 701, 1700}
WORDS: Final = {25, 1042, 1043}
UUID: Final = 2950
"""Oids of types."""
UUID_LENGTH: Final = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy that is there."""

    name: str
    """Schema and name, quoted."""
    differs: list[str]
    """What it has not of the real table."""


class _Default(NamedTuple):
    """A column whose default is not to be copied."""

    number: int
    name: str
    not_null: bool
    typmod: int
    oid: int
    """Of its type, or of the one below its domain."""


@asynccontextmanager
async def copied(conn: AsyncConnection[Any], schema: str, table: str, handler: str) -> AsyncIterator[Copy]:
    """Make a copy of a table, and drop it in the end; `conn` is used for nothing else meanwhile. Raises Halt."""
    if not await schema_is_there(conn, schema):
        raise Halt("database", f"schema {schema}, where the copy would be made, is not there: type consumerd setup")
    ((may, role, quoted),) = await call(conn, _MAY_CREATE, {"schema": schema})
    if not may:
        raise Halt(
            "database",
            f"role {role} may not make the copy: type GRANT CREATE ON SCHEMA {quoted} TO {role}; and, after it, "
            f"REVOKE CREATE ON SCHEMA {quoted} FROM {role};",
        )
    await _drop_left_over(conn, schema)
    name = f"{PREFIX}{secrets.token_hex(4)}"
    copy = await _make(conn, schema, name, table, handler)
    try:
        yield copy
    finally:
        await call(conn, sql.SQL("DROP TABLE {}").format(sql.Identifier(schema, name)))


async def _drop_left_over(conn: AsyncConnection[Any], schema: str) -> None:
    """Drop copies that no session holds."""
    async with postgres.transaction(conn):
        for (name,) in await call(conn, _LEFT_OVER, {"schema": schema}):
            await call(conn, sql.SQL("DROP TABLE {}").format(sql.Identifier(schema, name)))


async def _make(conn: AsyncConnection[Any], schema: str, name: str, table: str, handler: str) -> Copy:
    place = sql.Identifier(schema, name)
    quoted = place.as_string()
    here = {"name": quoted, "schema": schema, "table": name}
    comment = f"Made by consumerd tune {handler}, which drops it; without a session that holds it, it may be dropped"
    async with postgres.transaction(conn):
        like = "CREATE TABLE {place} (LIKE {table} INCLUDING ALL)"
        await call(conn, sql.SQL(like).format(place=place, table=sql.SQL(table)))
        await call(conn, _HOLD, here)
        await call(conn, sql.SQL("COMMENT ON TABLE {} IS {}").format(place, sql.Literal(comment)))
        differs = await _not_copied(conn, table)
        for row in await call(conn, _DEFAULTS, here):
            differs.append(await _replace(conn, schema, name, _Default(*row)))
        for (constraint,) in await call(conn, _CHECKS, here):
            await call(conn, sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(place, sql.Identifier(constraint)))
            differs.append(f"without the check {constraint}, which calls a function of the database's own")
        if published := await call(conn, _PUBLISHED, here):
            names = ", ".join(publication for (publication,) in published)
            raise Halt(
                "database",
                f"publication {names} would send the copy to its subscribers, who have no such table: tune against "
                f"another database, one that is restored from a backup, say",
            )
    return Copy(name=quoted, differs=differs)


async def _replace(conn: AsyncConnection[Any], schema: str, name: str, column: _Default) -> str:
    """Give a column of the copy a default of its own; return what it is."""
    place, named = sql.Identifier(schema, name), sql.Identifier(column.name)
    default: sql.Composable = sql.SQL("NULL")
    what = "NULL"
    if column.oid in NUMBERS:
        own = sql.Identifier(schema, f"{name}_{column.number}")
        kind = sql.SQL({21: "smallint", 23: "integer"}.get(column.oid, "bigint"))
        make = "CREATE SEQUENCE {} AS {} CYCLE OWNED BY {}.{}"
        await call(conn, sql.SQL(make).format(own, kind, place, named))
        default, what = sql.SQL("nextval({})").format(sql.Literal(own.as_string())), "a sequence of its own"
    elif column.oid == UUID or column.oid in WORDS:
        text = "gen_random_uuid()" if column.oid == UUID else "left(gen_random_uuid()::text, {})"
        length = column.typmod - VARHDRSZ if column.oid != UUID and column.typmod > VARHDRSZ else UUID_LENGTH
        default, what = sql.SQL(text).format(sql.Literal(length)), "random values"
    elif column.not_null:
        await call(conn, sql.SQL("ALTER TABLE {} ALTER {} DROP NOT NULL").format(place, named))
    await call(conn, sql.SQL("ALTER TABLE {} ALTER {} SET DEFAULT {}").format(place, named, default))
    return f"with {what} as the default of {column.name}"


async def _not_copied(conn: AsyncConnection[Any], table: str) -> list[str]:
    """Say what LIKE does not copy of a table."""
    ((triggers, keys, policies, partitions),) = await call(conn, _NOT_COPIED, {"name": table})
    counted = {"triggers": triggers, "foreign keys": keys, "policies": policies, "partitions": partitions}
    return [f"without its {count} {what}" for what, count in counted.items() if count]
