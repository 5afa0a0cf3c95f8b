"""The table as Postgres has it: columns, types, unique indexes, privileges, and a fingerprint of them.

The live catalog decides what a value must look like; nothing about the table stands in the configuration. The
fingerprint (names, types, type modifiers) is compared again inside every write: binary COPY into a column whose type
has changed meanwhile loads garbage without an error (seen: int8 into timestamp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import sql

from consumerd.errors import Halt

if TYPE_CHECKING:
    from psycopg import AsyncConnection

SUPPORTED: dict[int, str] = {
    16: "boolean",
    17: "bytea",
    20: "bigint",
    21: "smallint",
    23: "integer",
    25: "text",
    114: "json",
    700: "real",
    701: "double precision",
    1042: "char",
    1043: "varchar",
    1082: "date",
    1083: "time",
    1114: "timestamp",
    1184: "timestamptz",
    1700: "numeric",
    2950: "uuid",
    3802: "jsonb",
}
"""Types whose binary form is proven equal to INSERT with parameters by a property test; oid to name. Enums are text,
and a domain is what it is over."""

TEXT, CHAR, VARCHAR, NUMERIC = 25, 1042, 1043, 1700
"""Oids of types that are treated apart."""

VARHDRSZ = 4
"""What Postgres adds to the length in a char's or varchar's type modifier, and to a numeric's packed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column; `typmod` is -1 where the type has no modifier."""

    name: str
    oid: int
    """The type's; of a domain that of the type below it, with its modifier; of an enum, whose binary form is its
    label, that of text."""
    typmod: int
    type_name: str
    """The type's own name, for sentences."""
    not_null: bool
    automatic: bool
    """Generated or identity: left to Postgres unless it is mapped by name."""
    has_default: bool = False

    @property
    def max_length(self) -> int | None:
        """Characters that a char(n) or varchar(n) holds."""
        return self.typmod - VARHDRSZ if self.oid in {CHAR, VARCHAR} and self.typmod >= VARHDRSZ else None

    @property
    def integer_digits(self) -> int | None:
        """Digits before the point that a numeric(p, s) holds."""
        if self.oid == NUMERIC and self.typmod >= VARHDRSZ:
            packed = self.typmod - VARHDRSZ
            precision, scale = packed >> 16 & 0xFFFF, packed & 0x7FF
            return precision - ((scale ^ 1024) - 1024)  # the scale is an 11-bit signed number since Postgres 15
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that exists, that this role may write, and whose rows share the checkpoint's fate."""

    name: str
    """As it was configured, for sentences."""
    identifier: str
    """Schema and name, quoted."""
    columns: tuple[Column, ...]
    unique: tuple[frozenset[str], ...]
    """Columns of each unique index that can serve ON CONFLICT."""
    fingerprint: str
    has_unique: bool = False
    """It has an index that ON CONFLICT DO NOTHING goes by, a partial one or one of expressions perhaps."""
    has_rules: bool = False
    """It has rewrite rules, which COPY passes by."""
    may_drop_rows: bool = False
    """It has a trigger before rows, which may drop them without an error."""

    def column(self, name: str) -> Column | None:
        """Return the column of that name."""
        return next((column for column in self.columns if column.name == name), None)


FINGERPRINT = """\
SELECT coalesce(string_agg(concat_ws(' ', attname, atttypid, atttypmod), ',' ORDER BY attnum), '')
FROM pg_catalog.pg_attribute WHERE attrelid = to_regclass({name}) AND attnum > 0 AND NOT attisdropped"""

_RELATION = """\
SELECT c.oid::int8, c.relkind::text, c.relpersistence::text, n.nspname, c.relname,
       quote_ident(n.nspname) || '.' || quote_ident(c.relname),
       array(SELECT p FROM unnest(%(privileges)s::text[]) AS p WHERE NOT has_table_privilege(c.oid, p)),
       has_schema_privilege(n.oid, 'USAGE'), current_user::text, c.relhasrules
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(%(name)s)"""

_COLUMNS = """\
SELECT attname, CASE WHEN base.kind = 'e' THEN {text} ELSE base.oid::int8 END, base.typmod,
       format_type(atttypid, atttypmod), attnotnull, attidentity <> '' OR attgenerated <> '', atthasdef, ({fingerprint})
FROM pg_catalog.pg_attribute, LATERAL (
    WITH RECURSIVE below(oid, kind, next, next_typmod, typmod) AS (
        SELECT oid, typtype, typbasetype, typtypmod, atttypmod FROM pg_catalog.pg_type WHERE oid = atttypid
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype, t.typtypmod, below.next_typmod
        FROM below JOIN pg_catalog.pg_type t ON t.oid = below.next WHERE below.kind = 'd'
    )
    SELECT oid, kind, typmod FROM below WHERE kind <> 'd'
) base
WHERE attrelid = {oid}::oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
"""Columns and fingerprint come of one statement: of two, the second may see another table than the first."""

_UNIQUE = """\
SELECT array(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])),
       i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL
FROM pg_catalog.pg_index i
WHERE i.indrelid = %s::oid AND (i.indisunique OR i.indisexclusion) AND i.indimmediate AND i.indisvalid"""


def fingerprint_query(name: str) -> sql.Composed:
    """Return the query for a table's fingerprint as it is now; '' when there is no such table."""
    return sql.SQL(FINGERPRINT).format(name=sql.Literal(name))


_BEFORE_TRIGGERS = """\
SELECT 1 FROM pg_catalog.pg_trigger
WHERE tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree(%(oid)s::oid) UNION SELECT %(oid)s::oid)
  AND NOT tgisinternal AND tgtype & 3 = 3 LIMIT 1"""
"""tgtype: 1 is FOR EACH ROW, 2 is BEFORE. A partition may have one of its own."""


async def load(conn: AsyncConnection[Any], name: str, privileges: tuple[str, ...]) -> Table:
    """Read a table from the catalog; raises Halt with what to type when it cannot be written to.

    `name` is resolved as psql does: unquoted parts are folded to lower case, without a schema the search path is used.
    """
    cursor = await conn.execute(_RELATION, {"name": name, "privileges": list(privileges)})
    row = await cursor.fetchone()
    if row is None:
        where = "" if "." in name else " (without a schema it is looked up along search_path)"
        raise Halt("table", f"table {name} does not exist{where}: create it, or correct `table.name`")
    oid, kind, persistence, _, _, identifier, missing, schema_usage, role, has_rules = row
    if kind not in "rp":
        raise Halt("table", f"{name} is not a table: only tables and partitioned tables are written to")
    if persistence != "p":
        raise Halt(
            "table",
            f"table {name} is unlogged: a crash would empty it and keep its checkpoint; type: "
            f"ALTER TABLE {identifier} SET LOGGED;",
        )
    if missing or not schema_usage:
        grants = [f"GRANT {', '.join(missing)} ON {identifier} TO {role};"] if missing else []
        grants += [] if schema_usage else [f"GRANT USAGE ON SCHEMA {identifier.split('.')[0]} TO {role};"]
        raise Halt("table", f"role {role} lacks privileges on {name}; type: {' '.join(grants)}")
    query = sql.SQL(_COLUMNS).format(fingerprint=fingerprint_query(name), oid=sql.Literal(oid), text=sql.Literal(TEXT))
    rows = await (await conn.execute(query)).fetchall()
    columns = tuple(
        Column(name=n, oid=o, typmod=m, type_name=t, not_null=nn, automatic=a, has_default=d)
        for n, o, m, t, nn, a, d, _ in rows
    )
    indexes = await (await conn.execute(_UNIQUE, [oid])).fetchall()
    triggers = await (await conn.execute(_BEFORE_TRIGGERS, {"oid": oid})).fetchall()
    return Table(
        name=name,
        identifier=identifier,
        columns=columns,
        unique=tuple(frozenset(names) for names, plain in indexes if plain),
        has_unique=bool(indexes),
        has_rules=has_rules,
        may_drop_rows=bool(triggers),
        fingerprint=rows[0][-1] if rows else "",
    )
