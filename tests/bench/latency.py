"""`python -m tests.bench.latency`: from a message's produce to its row's commit, at a steady pace.

A process of its own produces what is due every few milliseconds and writes the time into each message; the row keeps
it, and Postgres says when the row's transaction committed (`track_commit_timestamp`): both are the machine's one clock.
Postgres takes that time just before it flushes the commit to the disk, so the last flush is not in it.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import Message, Producer

from tests.bench.carry import config_of, passed, wait_for
from tests.bench.report import kept
from tests.bench.stage import SIX, stage
from tests.servers.daemon import Daemon

if TYPE_CHECKING:
    from tests.bench.stage import Stage

PARTITIONS = 6
TICK = 0.002
"""Seconds between two looks at what is due."""
LINGER_MS = 1
WARM_UP = 5.0
"""Seconds at the start whose rows are left out: connections, caches, the broker's compiler."""
SECONDS = 15.0
RATES = (1_000, 10_000, 50_000)
AGES = (0.02, 0.1, 0.5)
REPORT = Path("build/bench/latency.json")


@dataclass(frozen=True)
class Pace:
    """Messages/s that are sent, and the batch's `max_age` in seconds."""

    rate: int
    max_age: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds from produce to commit that half, 99 % and 99.9 % of the rows took at most; rows/s that it was."""

    p50: float
    p99: float
    p999: float
    rate: float
    pause: float
    """The producer's longest time between two ticks: how far the machine itself kept somebody waiting."""
    acked: float
    """Seconds until 99 % were acknowledged by the broker, of one message a tick: what is not the daemon's part."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a producer sent; times of the wall clock."""

    count: int
    begun: float
    pause: float
    acked: float


def latency(stage: Stage, pace: Pace, seconds: float = SECONDS) -> Latency:
    """Measure one pace; the stage's Postgres must have `track_commit_timestamp` on."""
    name = f"late_{time.time_ns()}"
    stage.kafka.make_topic(name, PARTITIONS)
    stage.make_table(name)
    batch = {"max_age": f"{pace.max_age * 1000:.0f}ms"}
    handler = {"topics": [name], "table": {"name": name, "write": "append"}, "batch": batch}
    run = Daemon(config_of(stage, name, {name: handler}))
    with (
        closing(run),
        psycopg.connect(stage.postgres.dsn, autocommit=True) as conn,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        run.start()
        run.wait_ready()
        sent = process.submit(produce, stage.kafka.bootstrap, name, pace.rate, WARM_UP + seconds).result()
        wait_for(run, lambda: passed(conn, name), sent.count)
        run.stop()
    if (found := stage.rows(name)) != sent.count:
        raise SystemExit(f"{name} has {found} rows of {sent.count}")
    return _read(stage, name, sent)


def _read(stage: Stage, table: str, sent: Sent) -> Latency:
    asked = f"""
        SELECT percentile_cont(ARRAY[0.5, 0.99, 0.999]) WITHIN GROUP (ORDER BY seconds),
               count(*) / extract(epoch FROM max(ts) - min(ts))
        FROM (SELECT ts, extract(epoch FROM pg_xact_commit_timestamp(xmin) - ts)::float8 AS seconds FROM {table}
              WHERE ts >= to_timestamp(%s)) AS rows"""
    with psycopg.connect(stage.postgres.dsn, autocommit=True) as conn:
        ((found, rate),) = conn.execute(asked, [sent.begun + WARM_UP]).fetchall()
        conn.execute(f"DROP TABLE {table}")
    p50, p99, p999 = found
    return Latency(p50=p50, p99=p99, p999=p999, rate=float(rate), pause=sent.pause, acked=sent.acked)


def produce(bootstrap: str, topic: str, rate: int, seconds: float) -> Sent:
    """Send at a rate for a while, each message with the time of its tick; in a process of its own."""
    tails = [value[value.index(b'","n":') :] for value in map(SIX.value, range(1_000))]
    producer = Producer(
        {"bootstrap.servers": bootstrap, "linger.ms": LINGER_MS, "queue.buffering.max.messages": 1_000_000}
    )
    producer.list_topics(topic)
    acked: list[float] = []
    count, pause, total = 0, 0.0, int(rate * seconds)
    begun = last = time.monotonic()
    wall = time.time()

    def note(_: object, message: Message) -> None:
        if last > begun + WARM_UP:
            acked.append(message.latency() or 0.0)

    while count < total:
        time.sleep(max(0.0, last + TICK - time.monotonic()))
        now = time.monotonic()
        pause, last = max(pause, now - last), now
        stamp = datetime.now(UTC).isoformat(timespec="microseconds").encode()
        first, count = count, min(total, int((now - begun) * rate))
        for number in range(first, count):
            value = b'{"id":%d,"ts":"%b%b' % (number, stamp, tails[number % len(tails)])
            at = number % PARTITIONS
            if number == first:
                producer.produce(topic, value, partition=at, on_delivery=note)
            else:
                producer.produce(topic, value, partition=at)
        producer.poll(0)
    producer.flush()
    return Sent(count=count, begun=wall, pause=pause, acked=statistics.quantiles(acked, n=100)[-1])


def main() -> None:
    """Measure each rate with each `max_age`, print a table, and keep it."""
    seen = []
    print(f"{'messages/s':>10}{'max_age':>9}{'p50':>8}{'p99':>8}{'p99.9':>8}{'acked':>8}{'pause':>8}  (ms)", flush=True)
    with stage({"track_commit_timestamp": "on"}) as here:
        latency(here, Pace(rate=10_000, max_age=0.1), seconds=1.0)  # the broker's compiler
        for pace in (Pace(rate, max_age) for rate in RATES for max_age in AGES):
            late = latency(here, pace)
            seen.append({**asdict(late), "asked": pace.rate, "max_age": pace.max_age})
            times = "".join(f"{t * 1000:8.1f}" for t in (late.p50, late.p99, late.p999, late.acked, late.pause))
            print(f"{late.rate:10,.0f}{pace.max_age * 1000:9.0f}{times}", flush=True)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(seen, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with kept("latency"):
        main()
