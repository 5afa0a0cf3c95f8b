"""`python -m tests.bench.scaling [dimension…]`: how speed, CPU and memory follow one thing that is made larger.

Each point carries about 100 MB or 500,000 rows, whichever is less, and stands next to one raw COPY of the same rows in
the same run. A point's time is from the first message that a daemon was handed to the commit of the last row: of so
few batches many are under way at the first commit, and from there a speed would come out too high. So the end is in it,
where partitions that are left keep fewer connections busy. Batches may wait 100 ms only, or the last ones, which are
not full, would wait long for a run that short; "written" says how many rows a transaction had.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.bench.carry import config_of, cpu, passed, wait_for
from tests.bench.ceilings import one_copy
from tests.bench.report import kept
from tests.bench.stage import SIX, Shape, stage
from tests.servers.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.bench.stage import Stage

ROWS, BYTES = 500_000, 100_000_000
"""What a point carries at most."""
MAX_AGE = "100ms"
WARM_UP = 200_000
"""Messages that go the path before any point is measured."""
JOIN_DELAY_MS = 3_000
"""Milliseconds that the broker waits for more members of a new group: all processes are in its first assignment."""
NOISE = "".join(f"{number * 2_654_435_761 % 2**32:08x}" for number in range(16_384))
REPORT = Path("build/bench/scaling.json")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is carried, and by what."""

    handlers: int = 1
    """In each process, of a group, topic and table each."""
    processes: int = 1
    """In the same groups."""
    partitions: int = 6
    batch: int = 20_000
    connections: int = 4
    memory: str = "512MiB"
    """The daemon's `max_buffered`."""
    shape: Shape = SIX


def sized(size: int) -> Shape:
    """Return a shape whose messages have about so many bytes."""
    if size < len(SIX.value(0)):
        return Shape(columns=SIX.columns[:5])
    filling = NOISE[: size - len(SIX.value(100_000)) - len(',"filling":""')]
    return Shape(columns=(*SIX.columns, ("filling", 25, "text", False)), extra={"filling": filling})


def wide(count: int) -> Shape:
    """Return a shape of so many columns."""
    kinds: list[tuple[int, str, object]] = [
        (23, "integer", 1_234_567),
        (25, "text", "some text"),
        (701, "double precision", 1234.5),
        (20, "bigint", 123_456_789_012),
    ]
    columns, extra = list(SIX.columns[:count]), {}
    for number in range(len(columns), count):
        oid, kind, value = kinds[number % len(kinds)]
        columns.append((f"c{number}", oid, kind, False))
        extra[f"c{number}"] = value
    return Shape(columns=tuple(columns), extra=extra)


DIMENSIONS: dict[str, dict[str, Point]] = {
    "handlers": {str(n): Point(handlers=n) for n in (1, 2, 4)},
    "processes": {str(n): Point(processes=n, partitions=12) for n in (1, 2, 4)},
    "partitions": {str(n): Point(partitions=n) for n in (6, 60, 600)},
    "bytes": {str(n): Point(shape=sized(n)) for n in (100, 1_000, 10_000, 100_000)},
    "columns": {str(n): Point(shape=wide(n)) for n in (3, 6, 30, 100)},
    "batch x connections": {
        f"{batch} x {connections}": Point(batch=batch, connections=connections, memory="1GiB")
        for batch in (1_000, 5_000, 20_000, 50_000)
        for connections in (1, 2, 4, 8)
    },
}


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """What one point took. Times per row in nanoseconds of a core, of all handlers; memory in MiB, of all processes."""

    rate: float
    daemon: float
    postgres: float
    peak: float
    written: float
    """Rows of a transaction."""


def measure(stage: Stage, point: Point, topic: str, count: int) -> Scaled:
    """Have each handler carry a topic of `count` messages."""
    name = f"scaled_{time.time_ns()}"
    tables = [f"{name}_{number}" for number in range(point.handlers)]
    for table in tables:
        stage.make_table(table, point.shape)
    handlers = {table: _handler(point, topic, table) for table in tables}
    bound = {"max_buffered": point.memory}
    runs = [Daemon(config_of(stage, f"{name}_p{number}", handlers, bound)) for number in range(point.processes)]
    total = count * point.handlers
    with ExitStack() as running:
        conn = running.enter_context(psycopg.connect(stage.postgres.dsn, autocommit=True))
        for run in runs:
            running.enter_context(closing(run))
            run.start()
        wait_for(runs[0], lambda: sum(map(_consumed, runs)), 1)
        begun, pids = time.perf_counter(), [run.process.pid for run in runs]
        daemon, postgres = sum(map(cpu, pids)), cpu(stage.postgres.pid)
        wait_for(runs[0], lambda: sum(passed(conn, table) for table in tables), total)
        took = time.perf_counter() - begun
        daemon, postgres = sum(map(cpu, pids)) - daemon, cpu(stage.postgres.pid) - postgres
        peak = sum(run.memory("VmHWM") for run in runs)
        for run in runs:
            run.stop()
    writes = sum(_settled(stage, table, count) for table in tables)
    per_row = {"daemon": daemon / total * 1e9, "postgres": postgres / total * 1e9}
    return Scaled(rate=total / took, peak=peak, written=total / writes, **per_row)


def _settled(stage: Stage, table: str, rows: int) -> int:
    """Drop a table that has all its rows, and return in how many transactions they came."""
    with psycopg.connect(stage.postgres.dsn, autocommit=True) as conn:
        ((found, writes),) = conn.execute(f"SELECT count(*), count(DISTINCT xmin::text) FROM {table}").fetchall()
        if found != rows:
            raise SystemExit(f"{table} has {found} rows of {rows}")
        conn.execute(f"DROP TABLE {table}")
    return int(writes)


def _handler(point: Point, topic: str, table: str) -> dict[str, Any]:
    return {
        "topics": [topic],
        "group_id": table,
        "table": {"name": table, "write": "append"},
        "max_connections": point.connections,
        "batch": {"max_messages": point.batch, "max_age": MAX_AGE},
    }


def _consumed(run: Daemon) -> int:
    try:
        return sum(handler["consumed"] for handler in run.status()["handlers"].values())
    except OSError:
        return 0  # not listening yet


def curve(stage: Stage, points: Mapping[str, Point], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure and print the points of one dimension."""
    topics: dict[tuple[int, int, bytes], tuple[str, float, bytes]] = {}
    for label, point in points.items():
        shape = point.shape
        count = min(ROWS, BYTES // len(shape.value(ROWS))) // point.handlers
        kind = count, point.partitions, shape.value(0)
        if kind not in topics:
            topic = f"topic-{time.time_ns()}"
            size = stage.fill(topic, count, point.partitions, shape) / count
            topics[kind] = topic, size, shape.packed(0, count)
        topic, size, packed = topics[kind]
        ratios, runs = [], []
        for _ in range(rounds):
            raw = one_copy(stage, "raw", packed, count, shape)
            runs.append(measure(stage, point, topic, count))
            ratios.append(runs[-1].rate / raw.rate)
        seen = {name: statistics.median(asdict(run)[name] for run in runs) for name in asdict(runs[0])}
        seen |= {"megabytes": seen["rate"] * size / 1e6, "ratio": statistics.median(ratios)}
        print(
            f"{label:20}{seen['rate']:10,.0f}{seen['megabytes']:7.0f}{seen['ratio']:7.2f}"
            f"{seen['daemon']:9,.0f}{seen['postgres']:9,.0f}{seen['peak']:7.0f}{seen['written']:9,.0f}",
            flush=True,
        )
        yield {"label": label, "batch": point.batch, "connections": point.connections, **seen}


@contextmanager
def warm_stage(dimension: str) -> Iterator[Stage]:
    """Start servers for one dimension, and have them and a daemon carry something before anything counts."""
    with stage() as here:
        if dimension == "processes":
            here.kafka.stop()
            here.kafka.configure({"group.initial.rebalance.delay.ms": str(JOIN_DELAY_MS)})
            here.kafka.start()
        here.fill("warm", WARM_UP, Point.partitions)
        measure(here, Point(), "warm", WARM_UP)
        yield here


def main() -> None:
    """Measure the dimensions asked for, or all; those measured before stay in the report."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench.scaling", description=__doc__)
    arguments.add_argument("dimensions", nargs="*", metavar="dimension", help=f"of {', '.join(DIMENSIONS)}")
    arguments.add_argument("-r", "--rounds", type=int, default=1)
    options = arguments.parse_args()
    if unknown := set(options.dimensions) - set(DIMENSIONS):
        arguments.error(f"no dimension {', '.join(unknown)}; there are {', '.join(DIMENSIONS)}")
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    for name in options.dimensions or DIMENSIONS:
        head = f"{'rows/s':>10}{'MB/s':>7}{'ratio':>7}{'daemon':>9}{'Postgres':>9}{'MiB':>7}{'written':>9}"
        print(f"\n{name:20}{head}", flush=True)
        with warm_stage(name) as here:
            report[name] = list(curve(here, DIMENSIONS[name], options.rounds))
        REPORT.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with kept("scaling"):
        main()
