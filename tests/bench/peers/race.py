"""One run of a peer over a topic that is there, as a process of its own, and what it took: as carry.py for the daemon.

Postgres keeps the time of each commit (`track_commit_timestamp`), so the rows themselves tell afterwards when the first
and the last of them came, and nobody counts them while a peer runs. A rate counts from the first write, not from the
first commit: a peer with few and long transactions would seem faster by what its first ones hold.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.bench.carry import cpu
from tests.servers.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.bench.stage import Stage

PARTITIONS = 6
BUILD = Path("build/peers").absolute()
"""What is fetched for peers, once."""
REPORT = Path("build/bench/peers").absolute()
"""The logs of their runs."""
SETTINGS = {"track_commit_timestamp": "on"}
"""What Postgres needs."""
FIRST = 120
"""Seconds from a peer's start in which its table must begin to grow."""
LIMIT = 60
"""Seconds from then on after which a peer is stopped, so that a slow one does not hold the others up."""
STALL = 15
"""Seconds without growth after which a peer has written all that it will."""
LOOK = 1.0
"""Seconds between two looks at how far a peer is."""


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
class Held:
    """What a table holds after a run."""

    rows: int
    right: int
    """Rows that hold what was sent."""
    first: float
    """When the first were committed, in seconds since 1970."""
    last: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run took. Times per row in nanoseconds of a core, while the table grew; memory in MiB."""

    rate: float
    """Rows/s, from the first write to the last commit. (The daemon's: from the first commit, as in `make bench`.)"""
    peer: float
    postgres: float
    broker: float
    peak: float
    first: float
    """Seconds from the process's start to the first rows."""
    rows: int
    right: int
    stopped: bool = False
    """It was not done when its time was up."""


def race(stage: Stage, peer: Peer, write: str, count: int) -> Result:
    """Have a peer write a topic into an empty table, in a group of its own; Unavailable when no row came."""
    table = f"{peer.name.replace('-', '_')}_{write}"
    stage.make_table(table)
    job = _job(stage, peer, write, table)
    REPORT.mkdir(parents=True, exist_ok=True)
    log = REPORT / f"{table}.log"
    log.unlink(missing_ok=True)
    with psycopg.connect(stage.postgres.dsn, autocommit=True) as conn:
        for statement in peer.table(write):
            conn.execute(statement.format(table=table).encode())
        begun = time.time()
        process = Process(peer.command(job), log, cwd=job.folder, env=peer.env)
        try:
            pids = {"peer": process.pid, "postgres": stage.postgres.pid, "broker": stage.kafka.pid}
            _await_first(conn, process, table)
            grown = time.time()
            before = {name: cpu(pid) for name, pid in pids.items()}
            stopped = _await_last(conn, process, table, count)
            used = {name: cpu(pid) - before[name] for name, pid in pids.items()}
            peak = sum(_peak(pid) for pid in _tree(process.pid))
        finally:
            process.kill_group()
            shutil.rmtree(job.folder, ignore_errors=True)
    held = account(stage, table, peer.key)
    per_row = {name: seconds / held.rows * 1e9 for name, seconds in used.items()}
    return Result(
        rate=held.rows / (held.last - grown),
        peak=peak,
        first=held.first - begun,
        rows=held.rows,
        right=held.right,
        stopped=stopped,
        **per_row,
    )


def _job(stage: Stage, peer: Peer, write: str, table: str) -> Job:
    folder = stage.folder / table
    folder.mkdir()
    return Job(
        bootstrap=stage.kafka.bootstrap,
        topic=peer.topic,
        group=f"{table}-{time.time_ns()}",
        dsn=stage.postgres.dsn,
        table=table,
        write=write,
        folder=folder,
    )


def account(stage: Stage, table: str, key: str = "id") -> Held:
    """Say what a table holds, and drop it: else it would be vacuumed while the next is written."""
    asked = (
        f"SELECT count(*), count(*) FILTER (WHERE n = {key} % 1000 AND name = 'customer ' || {key} AND d = {key} * 1.5 "
        f"AND ts = timestamptz '2026-11-23 10:15:00Z' + ({key} % 1000000) * interval '1 us' "
        f"AND o = jsonb_build_object('a', {key}, 'b', 'x', 'c', jsonb_build_array(1, 2))), "
        f"extract(epoch FROM min(at))::float8, extract(epoch FROM max(at))::float8 "
        f"FROM (SELECT *, pg_xact_commit_timestamp(xmin) AS at FROM {table}) rows"
    )
    with psycopg.connect(stage.postgres.dsn, autocommit=True) as conn:
        ((rows, right, first, last),) = conn.execute(asked.encode()).fetchall()
        conn.execute(f"DROP TABLE {table}".encode())
    if not rows:
        raise Unavailable("committed no row")
    return Held(rows=rows, right=right, first=first, last=last)


def _await_first(conn: psycopg.Connection[Any], process: Process, table: str) -> None:
    try:
        process.wait_ready(lambda: _size(conn, table) > 0, FIRST, table)
    except (TimeoutError, RuntimeError):
        raise Unavailable(f"wrote no row: {process.log.name}") from None


def _await_last(conn: psycopg.Connection[Any], process: Process, table: str, count: int) -> bool:
    """Wait until a peer is done or writes no more, and return whether it had to be stopped instead.

    Rows are counted only while the table does not grow, when that takes nothing from the peer.
    """
    begun = grown = time.monotonic()
    size = 0
    while process.running and (now := time.monotonic()) < grown + STALL:
        if now > begun + LIMIT:
            return True
        time.sleep(LOOK)
        size, before = _size(conn, table), size
        if size > before:
            grown = now
        elif conn.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() == (count,):
            break
    if not process.running:
        raise Unavailable(f"ended before it was done: {process.log.name}")
    return False


def _size(conn: psycopg.Connection[Any], table: str) -> int:
    ((size,),) = conn.execute("SELECT pg_relation_size(%s::regclass)", [table]).fetchall()
    return int(size)


def _tree(pid: int) -> list[int]:
    """Return a process and all that it started and that still run."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text(encoding="ascii").split())
    return [pid, *(one for child in children for one in _tree(child))]


def _peak(pid: int) -> float:
    """Return the most memory that a process had, in MiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024 if "VmHWM:" in status else 0.0
