"""`consumerd setup`: the schema and tables that the daemon needs, made, or printed for a DBA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql

from consumerd import postgres
from consumerd.checkpoint import SCHEMA, ensure_schema

if TYPE_CHECKING:
    from consumerd.config import Config


def statements(config: Config) -> str:
    """Return the SQL, with the grants for a role that does not own the schema."""
    schema = sql.Identifier(config.postgres.schema_name)
    grants = """\
-- for a role that is not the owner:
-- GRANT USAGE ON SCHEMA {schema} TO loader;
-- GRANT SELECT ON {schema}.store TO loader;
-- GRANT SELECT, INSERT, UPDATE ON {schema}.checkpoint TO loader;
"""
    return sql.SQL(SCHEMA + grants).format(schema=schema).as_string()


async def make(config: Config) -> None:
    """Make what is missing; raises Outage or Halt."""
    conn = await postgres.connect(config.postgres, "consumerd/setup")
    try:
        await ensure_schema(conn, config.postgres.schema_name)
    finally:
        await conn.close()
