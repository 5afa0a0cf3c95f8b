"""What became of an unanswered COMMIT is asked for by its transaction's number (rule 28), on a real server."""

import psycopg
import pytest

from consumerd import postgres
from consumerd.config import PostgresConfig
from tests.servers.postgres import PostgresServer

MOST = 100
"""Transactions until the number must have come again: those of a server that starts, and some."""


async def test_what_became_of_a_transaction(database: str) -> None:
    """One that was committed is known to be, one that was rolled back is not."""
    async with await psycopg.AsyncConnection.connect(database) as conn:
        for end, expected in (("COMMIT", True), ("ROLLBACK", False)):
            await conn.execute("CREATE TABLE IF NOT EXISTS t (id int); INSERT INTO t VALUES (1)")
            transaction = await postgres.transaction_id(conn)
            await conn.execute(end)
            other = await postgres.connect(PostgresConfig(dsn=database), "test")
            assert await postgres.was_committed(other, transaction) is expected
            await other.close()


async def test_a_number_that_a_crash_gave_out_again(
    breakable_postgres: PostgresServer, breakable_database: str
) -> None:
    """After a crash another transaction may have the number of one whose records had not come to the disk."""
    lost = await postgres.connect(PostgresConfig(dsn=breakable_database), "test")
    await lost.execute("CREATE TABLE t (id int)")
    await lost.execute("BEGIN; INSERT INTO t VALUES (1)")
    transaction = await postgres.transaction_id(lost)
    breakable_postgres.kill()
    breakable_postgres.start()
    await lost.close()
    conn = await postgres.connect(PostgresConfig(dsn=breakable_database), "test")
    try:
        number: tuple[object, ...] | None = None
        for _ in range(MOST):
            cursor = await conn.execute("INSERT INTO t VALUES (2) RETURNING pg_catalog.pg_current_xact_id()::text")
            number = await cursor.fetchone()
            assert number is not None
            if int(str(number[0])) >= int(transaction.number):
                break
        if number != (transaction.number,):
            pytest.skip("the transaction's record had come to the disk in time")
        assert not await postgres.was_committed(conn, transaction)
    finally:
        await conn.close()
