"""One run of a peer over a topic that is there, as a process of its own, and what it took: as carry.py for the daemon."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.bench.carry import LIMIT, LOOK, cpu
from tests.servers.process import Process, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.bench.stage import Stage

PARTITIONS = 6
BUILD = Path("build/peers").absolute()
"""What is fetched for peers, once."""
REPORT = Path("build/bench/peers").absolute()
"""The logs of their runs."""
FIRST = 120
"""Seconds from a peer's start in which its first rows must be there."""
STALL = 60
"""Seconds without a new page in its table after which a peer has written all that it will."""
EXIT = 30
"""Seconds that what it started has to be gone after it."""


class Unavailable(Exception):  # noqa: N818 - it says why a peer cannot be measured here
    """A peer that cannot be installed or run, and why in a few words."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a peer is told."""

    bootstrap: str
    topic: str
    group: str
    dsn: str
    table: str
    write: str
    folder: Path
    """Its own, and empty."""

    @property
    def arguments(self) -> list[str]:
        """All of it but the folder, as the peers' scripts take it."""
        return [self.bootstrap, self.topic, self.group, self.dsn, self.table, self.write]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer is installed and started, and what it needs to be otherwise than the daemon has it."""

    name: str
    install: Callable[[], None]
    command: Callable[[Job], Sequence[str]]
    writes: Sequence[str] = ("append", "upsert")
    topic: str = "bench"
    table: Callable[[str], Sequence[str]] = lambda _: ()
    """What is changed in the table (`{table}`) for a way to write."""
    key: str = "id"
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run took. Times per row in nanoseconds of a core, from the first rows to the last; memory in MiB."""

    rate: float = 0.0
    """Rows/s, from the first rows in the table to the last."""
    peer: float = 0.0
    postgres: float = 0.0
    broker: float = 0.0
    peak: float = 0.0
    first: float = 0.0
    """Seconds from the process's start to the first rows."""
    rows: int = 0
    """In the table at the end."""
    right: int = 0
    """Rows that hold what was sent."""


def race(stage: Stage, peer: Peer, write: str, count: int) -> Result:
    """Have a peer write a topic into an empty table, in a group of its own; Unavailable when no row came."""
    table = f"{peer.name.replace('-', '_')}_{write}"
    stage.make_table(table)
    folder = stage.folder / f"{table}-{time.time_ns()}"
    folder.mkdir()
    REPORT.mkdir(parents=True, exist_ok=True)
    log = REPORT / f"{table}.log"
    log.unlink(missing_ok=True)
    job = Job(
        bootstrap=stage.kafka.bootstrap,
        topic=peer.topic,
        group=folder.name,
        dsn=stage.postgres.dsn,
        table=table,
        write=write,
        folder=folder,
    )
    with psycopg.connect(stage.postgres.dsn, autocommit=True) as conn:
        for statement in peer.table(write):
            conn.execute(statement.format(table=table).encode())
        conn.execute("SET enable_seqscan = off")  # asked while statistics are still those of an empty table
        begun = time.perf_counter()
        process = Process(peer.command(job), log, cwd=folder, env=peer.env)
        try:
            return _watch(stage, conn, process, (table, peer.key), count, begun)
        finally:
            _end(process)
            shutil.rmtree(folder, ignore_errors=True)


def _watch(  # noqa: PLR0917 - whom and where
    stage: Stage,
    conn: psycopg.Connection[Any],
    process: Process,
    where: tuple[str, str],
    count: int,
    begun: float,
) -> Result:
    pids = {"peer": process.pid, "postgres": stage.postgres.pid, "broker": stage.kafka.pid}
    first, rows = _first(conn, process, where[0])
    used = {name: cpu(pid) for name, pid in pids.items()}
    last = _last(conn, process, where, count)
    took = {name: cpu(pid) - used[name] for name, pid in pids.items()}
    peak = sum(_peak(pid) for pid in tree(process.pid))
    _end(process)  # what it does on is no longer counted, and not waited for
    at_end, right = _held(conn, *where)
    written = at_end - rows
    per_row = {name: seconds / written * 1e9 if written else 0.0 for name, seconds in took.items()}
    rate = written / (last - first) if last > first else 0.0
    return Result(rate=rate, peak=peak, first=first - begun, rows=at_end, right=right, **per_row)


def _first(conn: psycopg.Connection[Any], process: Process, table: str) -> tuple[float, int]:
    """Return when the first rows were there, and how many they were."""
    deadline = time.monotonic() + FIRST
    while True:
        now = time.perf_counter()
        ((rows,),) = conn.execute(f"SELECT count(*) FROM {table}".encode()).fetchall()
        if rows:
            return now, int(rows)
        if not process.running:
            raise Unavailable(f"ended without a row: {process.log.name}")
        if time.monotonic() > deadline:
            raise Unavailable(f"no row in {FIRST} s: {process.log.name}")
        time.sleep(LOOK)


def _last(conn: psycopg.Connection[Any], process: Process, where: tuple[str, str], count: int) -> float:
    """Return when the last rows were there: those of each partition's last message, which are few to look for.

    A peer that ends, or writes no more, is done when its table last grew.
    """
    table, key = where
    ends = list(range(count - PARTITIONS, count))
    deadline = time.monotonic() + LIMIT * 2
    grown, size, asked = time.perf_counter(), 0, 0.0
    while True:
        now = time.perf_counter()
        ((there,),) = conn.execute(f"SELECT count(*) FROM {table} WHERE {key} = ANY(%s)".encode(), [ends]).fetchall()
        if there == PARTITIONS:
            return now
        if now > asked + 1:
            asked = now
            ((pages,),) = conn.execute("SELECT pg_relation_size(%s)", [table]).fetchall()
            grown, size = (now, pages) if pages != size else (grown, size)
        if now > grown + STALL or not process.running or time.monotonic() > deadline:
            return grown
        time.sleep(LOOK)


def _held(conn: psycopg.Connection[Any], table: str, key: str) -> tuple[int, int]:
    """Return how many rows a table has, and how many of them hold what the message of their key held."""
    asked = (
        f"SELECT count(*), count(*) FILTER (WHERE n = {key} % 1000 AND name = 'customer ' || {key} "
        f"AND d = {key} * 1.5 AND ts = timestamptz '2026-11-23 10:15:00Z' + ({key} % 1000000) * interval '1 us' "
        f"AND o = jsonb_build_object('a', {key}, 'b', 'x', 'c', jsonb_build_array(1, 2))) FROM {table}"
    )
    ((rows, right),) = conn.execute(asked.encode()).fetchall()
    return int(rows), int(right)


def held(stage: Stage, table: str) -> tuple[int, int]:
    """Return how many rows a table has that the daemon wrote, and how many hold what was sent."""
    with psycopg.connect(stage.postgres.dsn) as conn:
        return _held(conn, table, "id")


def tree(pid: int) -> list[int]:
    """Return a process and all that it started and that still run."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text(encoding="ascii").split())
    return [pid, *(one for child in children for one in tree(child))]


def _peak(pid: int) -> float:
    """Return the most memory that a process had, in MiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024 if "VmHWM:" in status else 0.0


def _end(process: Process) -> None:
    """Kill a peer with all that it started."""
    pids = tree(process.pid)
    process.kill_group()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), EXIT, "a peer's processes")
