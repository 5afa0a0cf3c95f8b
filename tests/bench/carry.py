"""One run of the daemon over a topic that is there, as a process of its own, and what it took."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.servers.daemon import Daemon, merged, write_config
from tests.servers.process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.bench.stage import Stage

LIMIT = 300
"""Seconds for one run."""
LOOK = 0.02
"""Seconds between two looks at how far the daemon is."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run took. Times per row in nanoseconds of a core, from the first rows to the last; memory in MiB."""

    rate: float
    """Rows/s, from the commit of the first rows to that of the last."""
    daemon: float
    postgres: float
    broker: float
    peak: float
    first: float
    """Seconds from the process's start to the first rows."""


def carry(  # noqa: PLR0917 - what is carried where
    stage: Stage,
    count: int,
    topic: str,
    table: str,
    handler: Mapping[str, Any],
    daemon: Mapping[str, Any] | None = None,
    *,
    in_kafka: bool = False,
) -> Run:
    """Have the daemon write a topic into a table that is there, in a group of its own.

    How far it is the checkpoints in Postgres say or, with `in_kafka`, what may be without them, the daemon itself.
    """
    group = f"{table}-{time.time_ns()}"
    settings = merged({"topics": [topic], "table": {"name": table, "write": "append"}}, handler)
    run = Daemon(config_of(stage, group, {table: settings}, daemon))
    with psycopg.connect(stage.postgres.dsn, autocommit=True) as conn, closing(run):

        def look() -> int:
            return written(run) if in_kafka else passed(conn, group)

        begun = time.perf_counter()
        run.start()
        rows = wait_for(run, look, 1)
        first = time.perf_counter()
        pids = {"daemon": run.process.pid, "postgres": stage.postgres.pid, "broker": stage.kafka.pid}
        used = {name: cpu(pid) for name, pid in pids.items()}
        wait_for(run, look, count)
        ended = time.perf_counter()
        if rows >= count:
            raise SystemExit(f"{count} messages are too few to measure: all were there at the first look")
        per_row = {name: (cpu(pid) - used[name]) / (count - rows) * 1e9 for name, pid in pids.items()}
        peak = run.memory("VmHWM")
        run.stop()
    return Run(rate=(count - rows) / (ended - first), peak=peak, first=first - begun, **per_row)


def config_of(
    stage: Stage, name: str, handlers: Mapping[str, Mapping[str, Any]], daemon: Mapping[str, Any] | None = None
) -> Path:
    """Write a configuration; a handler's group has the configuration's name unless it says another."""
    config = {
        "kafka": {"bootstrap_servers": stage.kafka.bootstrap},
        "postgres": {"dsn": stage.postgres.dsn},
        "daemon": {"listen": f"127.0.0.1:{free_port()}", **(daemon or {})},
    }
    defaults = {"group_id": name, "dead_letter": {"create": True}}
    return write_config(stage.folder / name, config, {key: merged(defaults, value) for key, value in handlers.items()})


def passed(conn: psycopg.Connection[Any], group: str) -> int:
    """Return how many messages a group's checkpoints have passed."""
    if conn.execute("SELECT to_regclass('consumerd.checkpoint')").fetchone() == (None,):
        return 0
    asked = "SELECT coalesce(sum(next_offset), 0) FROM consumerd.checkpoint WHERE group_id = %s AND next_offset > 0"
    ((offsets,),) = conn.execute(asked, [group]).fetchall()
    return int(offsets)


def written(run: Daemon) -> int:
    """Return how many rows a daemon says that it has written."""
    try:
        return sum(handler["written"] for handler in run.status()["handlers"].values())
    except OSError:
        return 0  # not listening yet


def wait_for(run: Daemon, look: Callable[[], int], least: int) -> int:
    """Wait until a daemon has reached a number, and return it; raises with its log when it does not."""
    deadline = time.monotonic() + LIMIT
    while (seen := look()) < least:
        if time.monotonic() > deadline or not run.running:
            raise TimeoutError(f"the daemon was at {seen} of {least}\n{run.process.log_tail()}")
        time.sleep(LOOK)
    return seen


def cpu(pid: int) -> float:
    """Return the seconds of a core that a process and all that it started have used."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        at = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(at)
        used[at] = sum(map(int, fields[11:15])) / TICKS  # with its children that have ended
    total, ahead = 0.0, [pid]
    while ahead:
        at = ahead.pop()
        total += used.get(at, 0.0)
        ahead += children.get(at, [])
    return total
