"""What Postgres itself can take: the same rows, encoded beforehand, by the statements alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from tests.bench.carry import cpu
from tests.bench.stage import PIECE, SIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.bench.stage import Shape, Stage

BATCH = 20_000
"""Messages of a batch, as the daemon's by default."""
CONNECTIONS = 4

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Rows/s, and nanoseconds of a core for each row in Postgres."""

    rate: float
    postgres: float


def one_copy(stage: Stage, table: str, data: bytes, count: int, shape: Shape = SIX) -> Ceiling:
    """Write by one binary COPY in one transaction, on one connection."""
    stage.make_table(table, shape)

    def write(conn: Connection) -> None:
        _copy(conn, f"COPY {table} FROM STDIN (FORMAT binary)", data)
        conn.commit()

    with psycopg.connect(stage.postgres.dsn) as conn:
        return _timed(stage, count, lambda: write(conn))


def copies(stage: Stage, table: str, batches: Sequence[bytes], count: int, shape: Shape = SIX) -> Ceiling:
    """Write each batch by a COPY and a COMMIT, on as many connections as the daemon uses."""
    stage.make_table(table, shape)

    def write(conn: Connection, data: bytes) -> None:
        _copy(conn, f"COPY {table} FROM STDIN (FORMAT binary)", data)
        conn.commit()

    return _on_connections(stage, batches, count, lambda _: None, write)


def upserts(
    stage: Stage, table: str, batches: Sequence[bytes], count: int, *, distinct: bool, fresh: bool, shape: Shape = SIX
) -> Ceiling:
    """Write each batch by a COPY into a temporary table, one INSERT ... ON CONFLICT, and a COMMIT for each batch.

    `batches` carry an ordinal; `distinct` has the newest of repeated keys win, which keys that are all different do
    without; `fresh` begins with an empty table.
    """
    if fresh:
        stage.make_table(table, shape)
    names = [name for name, *_ in shape.columns]
    columns = ", ".join(names)
    newest = f"SELECT DISTINCT ON (id) {columns} FROM staging ORDER BY id, ordinal DESC"
    merge = (
        f"INSERT INTO {table} ({columns}) {newest if distinct else f'SELECT {columns} FROM staging'} "
        f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in names if name != 'id')}"
    )

    def prepare(conn: Connection) -> None:
        conn.execute(f"CREATE TEMPORARY TABLE staging (LIKE {table}, ordinal integer) ON COMMIT DELETE ROWS")
        conn.commit()

    def write(conn: Connection, data: bytes) -> None:
        _copy(conn, "COPY staging FROM STDIN (FORMAT binary)", data)
        conn.execute(merge)
        conn.commit()

    return _on_connections(stage, batches, count, prepare, write)


def _on_connections(
    stage: Stage,
    batches: Sequence[bytes],
    count: int,
    prepare: Callable[[Connection], None],
    write: Callable[[Connection, bytes], None],
) -> Ceiling:
    """Write batches on several connections, each taking the next; of one partition none overtakes another in order."""
    lock = threading.Lock()
    waiting: Iterator[bytes] = iter(batches)

    def work(conn: Connection) -> None:
        while True:
            with lock:
                data = next(waiting, None)
            if data is None:
                return
            while True:
                try:
                    write(conn, data)
                    break
                except psycopg.errors.DeadlockDetected:  # of repeated keys, in unsorted statements
                    conn.rollback()

    connections = [psycopg.connect(stage.postgres.dsn) for _ in range(CONNECTIONS)]
    try:
        for conn in connections:
            prepare(conn)
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            return _timed(stage, count, lambda: list(threads.map(work, connections)))
    finally:
        for conn in connections:
            conn.close()


def _copy(conn: Connection, statement: str, data: bytes) -> None:
    view = memoryview(data)
    with conn.cursor().copy(statement) as copy:
        for at in range(0, len(data), PIECE):
            copy.write(bytes(view[at : at + PIECE]))


def _timed(stage: Stage, count: int, work: Callable[[], object]) -> Ceiling:
    used, begun = cpu(stage.postgres.pid), time.perf_counter()
    work()
    took = time.perf_counter() - begun
    return Ceiling(rate=count / took, postgres=(cpu(stage.postgres.pid) - used) / count * 1e9)
