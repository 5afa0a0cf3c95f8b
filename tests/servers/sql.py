"""What a test does in a database by its DSN."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg


def execute(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    """Run SQL outside a transaction and return its rows, if it has any."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@contextmanager
def locked(dsn: str, table: str) -> Iterator[None]:
    """Lock a table against all others for the block; whatever waits for it goes on after."""
    with psycopg.connect(dsn) as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield


def blocked(dsn: str) -> bool:
    """Whether a session waits for a lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return execute(dsn, waiting) != []
