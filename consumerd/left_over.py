"""What operators have begun and not ended: replays that failed or were interrupted, letters that failed once more.

A command has no metrics of its own, and nobody watches it for hours. So the daemon looks at their records once a
minute, for the gauges that alerts go by.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from psycopg import sql

from consumerd import metrics, postgres
from consumerd.errors import ConsumerdError
from consumerd.postgres import call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from consumerd.config import HandlerConfig, PostgresConfig

INTERVAL = 60.0
"""Seconds between two looks. A replay that runs notes that it does every ten seconds."""

_THERE = """\
SELECT relname::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND relname IN ('replays', 'letters')"""
_OF_TABLES = {
    "replays": """\
SELECT group_id, CASE WHEN failed IS NULL THEN 'interrupted' ELSE 'failed' END, count(*) FROM {schema}.replays
WHERE finished_at IS NULL AND (failed IS NOT NULL OR seen_at < now() - interval '1 minute') GROUP BY 1, 2""",
    "letters": "SELECT group_id, 'letters', count(*) FROM {schema}.letters WHERE status = 'failed' GROUP BY 1",
}


async def watch(postgres_config: Callable[[], PostgresConfig], handlers: Callable[[], list[HandlerConfig]]) -> None:
    """Look now and then, until cancelled; while the database is away, what was seen last stands."""
    while True:
        with suppress(ConsumerdError):  # members meet the same, and tell
            await look(postgres_config(), handlers())
        await asyncio.sleep(INTERVAL)


async def look(config: PostgresConfig, handlers: Iterable[HandlerConfig]) -> None:
    """Set the gauges of handlers; raises Outage, Halt."""
    found: Counter[tuple[str, str]] = Counter()
    schema = config.schema_name
    conn = await postgres.connect(config, "consumerd/daemon")
    try:
        for (table,) in await call(conn, _THERE, {"schema": schema}):
            query = sql.SQL(_OF_TABLES[table]).format(schema=sql.Identifier(schema))
            found.update({(group, what): count for group, what, count in await call(conn, query)})
    finally:
        await conn.close()
    for handler in handlers:
        for state in metrics.REPLAYS:
            metrics.replays.labels(handler.name, state).set(found[handler.group_id, state])
        metrics.letters_failed_again.labels(handler.name).set(found[handler.group_id, "letters"])
