"""`consumerd setup`: the schema and tables that the daemon needs, made, or printed for a DBA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from consumerd import letters, postgres, replay_checkpoint
from consumerd.checkpoint import GRANTS, SCHEMA
from consumerd.commands.replays import Replays

if TYPE_CHECKING:
    from consumerd.config import Config


DATABASE_GRANTS = "GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {role};\n"
"""Everybody has both unless they were taken from PUBLIC. Upsert and skip-existing stage rows in temporary tables."""


def statements(config: Config) -> str:
    """Return the SQL, with the grants for a role that does not own the schema."""
    schema = sql.Identifier(config.postgres.schema_name)
    made = sql.SQL(SCHEMA + replay_checkpoint.SCHEMA + letters.LETTERS).format(schema=schema).as_string()
    every = DATABASE_GRANTS + GRANTS + replay_checkpoint.GRANTS + letters.GRANTS
    names = {"schema": schema, "role": sql.SQL("loader"), "database": sql.Identifier(_database(config))}
    grants = sql.SQL(every).format(**names).as_string()
    commented = "".join(f"-- {line}\n" for line in grants.splitlines())
    return f"{made}-- For a role that is not the owner, here one of the name loader:\n{commented}"


async def make(config: Config) -> None:
    """Make what is missing; raises Outage or Halt."""
    conn = await postgres.connect(config.postgres, "consumerd/setup")
    try:
        await Replays(conn, config.postgres.schema_name, "").make()
        await letters.ensure_letters(conn, config.postgres.schema_name)
    finally:
        await conn.close()


def _database(config: Config) -> str:
    """Return the database that the DSN names; where that is a secret, the word for it."""
    dsn = config.postgres.dsn
    named = conninfo_to_dict(dsn) if isinstance(dsn, str) else {}
    return str(named.get("dbname") or named.get("user") or "database")
