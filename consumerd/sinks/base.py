"""What a sink is: it takes the rows of one batch inside an open transaction, or raises.

A sink neither begins nor commits; it runs after the checkpoint was set in the same transaction. What it raises are
psycopg's errors, translated by whoever opened the transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import AsyncConnection

    from consumerd.sinks.copy import CopyData


class Sink(Protocol):
    """One way to write rows into a table."""

    async def prepare(self, conn: AsyncConnection[Any]) -> None:
        """Make what a session needs; once for each connection, outside a transaction."""

    async def forget(self, conn: AsyncConnection[Any]) -> None:
        """Take back what was made for a session."""

    def pack(self, rows: Sequence[tuple[Any, ...]], data: CopyData) -> CopyData:
        """Add rows to the data of a COPY, and return it; raises Rejected, naming a row that has no such form."""

    async def write(self, conn: AsyncConnection[Any], data: CopyData) -> int:
        """Write packed rows; those written before in the same transaction are left alone.

        Return how many of them were left out because the table has them already.
        """
