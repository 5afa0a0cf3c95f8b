"""The table as Postgres has it: columns, types, unique indexes, privileges, and a fingerprint of them.

The live catalog decides what a value must look like; nothing about the table stands in the configuration. The
fingerprint of what was read is compared again inside every write: binary COPY into a column whose type has changed
meanwhile loads garbage without an error (seen: int8 into timestamp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from psycopg import sql
from psycopg.rows import dict_row

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
a domain is what it is over, and an array is what its elements are. Any other type goes by its text form."""

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
    default: bytes | None = None
    """Its default as JSON, where that is a literal and the column takes no NULL."""
    always: Literal["", "identity", "expression"] = ""
    """Which of the two makes its values, where it is GENERATED ALWAYS: none of ours belongs there."""
    lacking: frozenset[str] = frozenset()
    """Privileges that this role has neither on the column nor on the table."""
    type_oid: int = 0
    """The type's own, of a domain and an enum too: an array's binary form names it of its elements."""
    element: Column | None = None
    """Of an array: what its elements are, as if they were a column."""
    delimiter: str = ","
    """Of an array: what stands between two elements in its text form."""

    @property
    def by_text(self) -> bool:
        """Whether its values go by the type's text form, as no binary one is proven."""
        return self.oid not in SUPPORTED if self.element is None else self.element.by_text

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
    role: str = ""
    """Who writes, quoted."""
    lockable: bool = True
    """The role may lock it: it has a privilege on the whole table."""
    row_security: bool = False
    """Policies apply to the role, for which Postgres refuses COPY into the table."""
    refusing: tuple[frozenset[str], ...] = ()
    """Columns of each index that may refuse a row for another: partial ones, too, and the plain columns of those on
    expressions."""
    deferrable: tuple[tuple[str, str], ...] = ()
    """Names, quoted, and definitions but for that, of constraints that are not checked at once."""
    has_unique: bool = False
    """It has an index that ON CONFLICT DO NOTHING goes by, a partial one or one of expressions perhaps."""
    has_rules: bool = False
    """It has rewrite rules, which COPY passes by."""
    may_drop_rows: bool = False
    """It has a trigger before rows, which may drop them without an error."""

    def column(self, name: str) -> Column | None:
        """Return the column of that name."""
        return next((column for column in self.columns if column.name == name), None)

    @property
    def lock(self) -> str:
        """The statement that keeps the table as it is until the transaction ends, by the lock that a write takes.

        The table alone: its partitions follow it, and thousands of locks have a price. LOCK TABLE wants a privilege on
        the whole table; an INSERT that is planned, and not run, does with one on a column.
        """
        if self.lockable:
            return f"LOCK TABLE ONLY {self.identifier} IN ROW EXCLUSIVE MODE"
        granted = next(c.name for c in self.columns if "INSERT" not in c.lacking and not c.always)
        column = sql.Identifier(granted).as_string()
        return f"EXPLAIN INSERT INTO {self.identifier} ({column}) VALUES (DEFAULT)"  # noqa: S608 - quoted both


FINGERPRINT = """\
SELECT concat_ws(E'\\n',
    (SELECT string_agg(concat_ws(' ', attname, atttypid, atttypmod, attnotnull, attidentity, attgenerated,
        CASE WHEN attnotnull AND atthasdef THEN
            (SELECT md5(adbin::text) FROM pg_catalog.pg_attrdef WHERE adrelid = attrelid AND adnum = attnum) END
     ), ',' ORDER BY attnum)
     FROM pg_catalog.pg_attribute WHERE attrelid = {table} AND attnum > 0 AND NOT attisdropped),
    (SELECT concat_ws(' ', relpersistence, relhasrules) FROM pg_catalog.pg_class WHERE oid = {table}),
    (SELECT string_agg(concat_ws(' ', indkey, indnkeyatts, indpred IS NULL, indexprs IS NULL, indimmediate), ','
        ORDER BY indexrelid)
     FROM pg_catalog.pg_index WHERE indrelid = {table} AND (indisunique OR indisexclusion) AND indisvalid),
    (SELECT string_agg(oid::text, ',' ORDER BY oid) FROM pg_catalog.pg_constraint
     WHERE conrelid = {table} AND contype = 'c'),
    (SELECT string_agg(oid::text, ',' ORDER BY oid) FROM pg_catalog.pg_trigger
     WHERE tgrelid = {table} AND NOT tgisinternal AND tgtype & 3 = 3))"""
"""Whatever a mapping goes by. The default of a column that takes no NULL stands in for absent values; without its
unique index a COPY straight into the table would double rows; a trigger before rows may drop some of a merge; a staging
table keeps the constraints that it was made with. Of partitions nothing: there may be thousands."""

_RELATION = """\
SELECT c.oid::int8, c.relkind::text, c.relpersistence::text,
       quote_ident(n.nspname) || '.' || quote_ident(c.relname), quote_ident(n.nspname),
       array(SELECT p FROM unnest(%(privileges)s::text[]) AS p WHERE NOT has_table_privilege(c.oid, p)
             AND NOT (p IN ('INSERT', 'UPDATE') AND has_any_column_privilege(c.oid, p))),
       has_schema_privilege(n.oid, 'USAGE'), quote_ident(current_user), c.relhasrules, row_security_active(c.oid),
       has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(%(name)s)"""
"""What may be granted on columns is looked at column by column."""

_KINDS: Final = {
    "v": "a view: name the table below it in `table.name`",
    "m": "a materialized view, which Postgres fills itself: name a table in `table.name`",
    "f": "a foreign table, whose rows would not be committed together with their checkpoint: name a table of this "
    "database in `table.name`",
}

_BASE = """\
    WITH RECURSIVE below(oid, kind, next, next_typmod, typmod) AS (
        SELECT oid, typtype, typbasetype, typtypmod, {typmod} FROM pg_catalog.pg_type WHERE oid = {type}
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype, t.typtypmod, below.next_typmod
        FROM below JOIN pg_catalog.pg_type t ON t.oid = below.next WHERE below.kind = 'd'
    )
    SELECT CASE WHEN kind = 'e' THEN {text} ELSE oid::int8 END AS oid, typmod FROM below WHERE kind <> 'd'"""
"""What a type is below its domains; an enum is text."""

_COLUMNS = """\
SELECT attname AS name, base.oid, base.typmod, format_type(atttypid, atttypmod) AS type_name, attnotnull AS not_null,
       attidentity <> '' OR attgenerated <> '' AS automatic, atthasdef AS has_default,
       CASE WHEN attidentity = 'a' THEN 'identity' WHEN attgenerated <> '' THEN 'expression' ELSE '' END AS always,
       array(SELECT p FROM unnest('{{INSERT,UPDATE}}'::text[]) AS p
             WHERE NOT has_column_privilege(attrelid, attnum, p)) AS lacking,
       e.oid::int8 AS element_type, e.typdelim::text AS delimiter, format_type(e.oid, base.typmod) AS element_name,
       below.oid AS element_oid, below.typmod AS element_typmod,
       (SELECT pg_get_expr(adbin, adrelid) FROM pg_catalog.pg_attrdef WHERE adrelid = attrelid AND adnum = attnum)
       AS expression, format_type(base.oid::oid, -1) AS cast_to, ({fingerprint}) AS fingerprint
FROM pg_catalog.pg_attribute
CROSS JOIN LATERAL ({base}) AS base
LEFT JOIN pg_catalog.pg_type a ON a.oid = base.oid
LEFT JOIN pg_catalog.pg_type e ON e.oid = a.typelem AND e.typarray = a.oid
LEFT JOIN LATERAL ({element}) AS below ON true
WHERE attrelid = {table} AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
"""Columns and fingerprint come of one statement, and both of one oid: of two, or of the name, the fingerprint may be
that of another table, which has taken the name meanwhile."""

_UNIQUE = """\
SELECT array(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])),
       i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indimmediate, i.indimmediate,
       quote_ident(c.conname), regexp_replace(pg_get_constraintdef(c.oid), ' DEFERRABLE( INITIALLY DEFERRED)?$', '')
FROM pg_catalog.pg_index i
LEFT JOIN pg_catalog.pg_constraint c ON c.conindid = i.indexrelid AND c.contype IN ('p', 'u', 'x')
WHERE i.indrelid = %s::oid AND (i.indisunique OR i.indisexclusion) AND i.indisvalid ORDER BY i.indexrelid"""

_PARTITIONS_APART = """\
SELECT c.oid::regclass::text, c.relkind = 'f'
FROM pg_partition_tree(%s::oid) JOIN pg_catalog.pg_class c ON c.oid = relid
WHERE c.relkind = 'f' OR c.relpersistence <> 'p' ORDER BY 1"""
"""Partitions whose rows do not share the checkpoint's fate."""

_LITERAL: Final = re.compile(
    r"""\(?('([^']|'')*'|-?[0-9]+(\.[0-9]+)?|true|false|ARRAY\[\])\)?"""
    r"""(::[A-Za-z_"][\w ."]*(\([0-9, ]+\))?[\w ]*(\[\])?)?"""
)
"""A default that is one value, whenever it is looked at: no function, no sequence, nothing in two steps."""


def fingerprint_query(name: str) -> sql.Composed:
    """Return the query for a table's fingerprint as it is now; '' when there is no such table."""
    return sql.SQL(FINGERPRINT).format(table=sql.SQL("to_regclass({})").format(sql.Literal(name)))


_BEFORE_TRIGGERS = """\
SELECT 1 FROM pg_catalog.pg_trigger
WHERE tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree(%(oid)s::oid) UNION SELECT %(oid)s::oid)
  AND NOT tgisinternal AND tgtype & 3 = 3 LIMIT 1"""
"""tgtype: 1 is FOR EACH ROW, 2 is BEFORE. A partition may have one of its own."""


async def load(conn: AsyncConnection[Any], name: str, privileges: tuple[str, ...]) -> Table:
    """Read a table from the catalog; raises Halt with what to type when it cannot be written to.

    `name` is resolved as psql does: unquoted parts are folded to lower case, without a schema the search path is used.
    INSERT and UPDATE may be granted on columns; which of them, their columns tell.
    """
    cursor = await conn.execute(_RELATION, {"name": name, "privileges": list(privileges)})
    row = await cursor.fetchone()
    if row is None:
        where = "" if "." in name else " (without a schema it is looked up along search_path)"
        raise Halt("table", f"table {name} does not exist{where}: create it, or correct `table.name`")
    oid, kind, persistence, identifier, schema, missing, schema_usage, role, has_rules, secured, lockable = row
    if schema in {"pg_catalog", "information_schema", "pg_toast"}:
        raise Halt("table", f"{name} is a table of Postgres's own catalog: name one of yours in `table.name`")
    if kind not in "rp":
        what = _KINDS.get(kind, "not a table: only tables and partitioned tables are written to")
        raise Halt("table", f"{name} is {what}")
    if persistence != "p":
        raise Halt(
            "table",
            f"table {name} is unlogged: a crash would empty it and keep its checkpoint; type: "
            f"ALTER TABLE {identifier} SET LOGGED;",
        )
    if missing or not schema_usage:
        grants = [f"GRANT {', '.join(missing)} ON {identifier} TO {role};"] if missing else []
        grants += [] if schema_usage else [f"GRANT USAGE ON SCHEMA {schema} TO {role};"]
        raise Halt("table", f"role {role} lacks privileges on {name}; type: {' '.join(grants)}")
    for part, foreign in await (await conn.execute(_PARTITIONS_APART, [oid])).fetchall():
        raise Halt("table", f"partition {part} of {name} {_apart(part, identifier, foreign=foreign)}")
    columns, fingerprint = await _columns(conn, oid)
    indexes = await (await conn.execute(_UNIQUE, [oid])).fetchall()
    triggers = await (await conn.execute(_BEFORE_TRIGGERS, {"oid": oid})).fetchall()
    return Table(
        name=name,
        identifier=identifier,
        columns=columns,
        unique=tuple(frozenset(names) for names, plain, *_ in indexes if plain),
        refusing=tuple(frozenset(names) for names, *_ in indexes),
        deferrable=tuple((name, definition) for _, _, at_once, name, definition in indexes if not at_once),
        has_unique=any(at_once for _, _, at_once, *_ in indexes),
        fingerprint=fingerprint,
        role=role,
        lockable=lockable,
        row_security=secured,
        has_rules=has_rules,
        may_drop_rows=bool(triggers),
    )


def _apart(part: str, identifier: str, *, foreign: bool) -> str:
    if foreign:
        return (
            "is a foreign table, whose rows would not be committed together with their checkpoint; type: "
            f"ALTER TABLE {identifier} DETACH PARTITION {part};"
        )
    return f"is unlogged: a crash would empty it and keep the checkpoint; type: ALTER TABLE {part} SET LOGGED;"


async def _columns(conn: AsyncConnection[Any], oid: int) -> tuple[tuple[Column, ...], str]:
    """Return the columns of a table and its fingerprint, both as of one moment."""
    text, table = sql.Literal(TEXT), sql.SQL("{}::oid").format(sql.Literal(oid))
    base = {"type": sql.SQL("atttypid"), "typmod": sql.SQL("atttypmod"), "text": text}
    element = {"type": sql.SQL("e.oid"), "typmod": sql.SQL("base.typmod"), "text": text}
    query = sql.SQL(_COLUMNS).format(
        fingerprint=sql.SQL(FINGERPRINT).format(table=table),
        table=table,
        base=sql.SQL(_BASE).format(**base),
        element=sql.SQL(_BASE).format(**element),
    )
    async with conn.cursor(row_factory=dict_row) as cursor:
        rows = await (await cursor.execute(query)).fetchall()
    columns = [_column(row) for row in rows]
    defaults = {
        at: sql.SQL("to_json(CAST({} AS {}))::text").format(sql.SQL(row["expression"]), sql.SQL(row["cast_to"]))
        for at, row in enumerate(rows)
        if _stands_in(columns[at], row["expression"])
    }
    if defaults:
        query = sql.SQL("SELECT {}").format(sql.SQL(", ").join(defaults.values()))
        for at, value in zip(defaults, await (await conn.execute(query)).fetchone() or (), strict=True):
            columns[at] = replace(columns[at], default=value and value.encode())
    return tuple(columns), rows[0]["fingerprint"] if rows else ""


def _column(row: dict[str, Any]) -> Column:
    element = None
    if row["element_type"] is not None:
        element = Column(
            name=row["name"],
            oid=row["element_oid"],
            typmod=row["element_typmod"],
            type_name=row["element_name"],
            type_oid=row["element_type"],
            not_null=False,
            automatic=False,
        )
    return Column(
        name=row["name"],
        oid=row["oid"],
        typmod=row["typmod"],
        type_name=row["type_name"],
        not_null=row["not_null"],
        automatic=row["automatic"],
        has_default=row["has_default"],
        always=row["always"],
        lacking=frozenset(row["lacking"]),
        element=element,
        delimiter=row["delimiter"] or ",",
    )


def _stands_in(column: Column, default: str | None) -> bool:
    """Whether a default is one value, for a column that takes no NULL and whose values JSON can hold."""
    if default is None or not column.not_null or column.automatic or column.by_text:
        return False
    return _LITERAL.fullmatch(default) is not None
