"""`consumerd setup`: the schema and tables that the daemon needs, made, or printed for a DBA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql

from consumerd import letters, postgres, replay_checkpoint
from consumerd.checkpoint import GRANTS, SCHEMA
from consumerd.commands.replays import Replays

if TYPE_CHECKING:
    from consumerd.config import Config


def statements(config: Config) -> str:
    """Return the SQL, with the grants for a role that does not own the schema."""
    schema = sql.Identifier(config.postgres.schema_name)
    made = sql.SQL(SCHEMA + replay_checkpoint.SCHEMA + letters.LETTERS).format(schema=schema).as_string()
    every = GRANTS + replay_checkpoint.GRANTS + letters.GRANTS
    grants = sql.SQL(every).format(schema=schema, role=sql.SQL("loader")).as_string()
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
