"""`make bench`: the daemon from a real broker, next to what Postgres can take of the same rows in the same run.

Ratios count, not figures: the machine is shared. So all works take turns, each next to its ceiling, and a ratio is the
median of the rounds' ratios. The table says for each goal what was measured; `build/bench/bench.json` has every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.carry import Run, carry
from tests.bench.ceilings import BATCH, Ceiling, copies, one_copy, upserts
from tests.bench.idle import idle
from tests.bench.latency import Pace, latency
from tests.bench.report import kept
from tests.bench.stage import SIX, stage
from tests.bench.steps import steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.latency import Latency
    from tests.bench.stage import Shape, Stage

PARTITIONS = 6
REPEATED = 10
"""Times that each key comes where keys are repeated."""
UPSERT = {"table": {"write": "upsert", "key": ["id"]}}
LEAST = 250_000
"""Messages that the steps alone need; figures that mean something take a million."""
REPORT = Path("build/bench")


@dataclass
class Rounds:
    """What was measured in each round: for each work the daemon's run and the ceiling next to it."""

    runs: dict[str, list[tuple[Run, Ceiling | Run]]] = field(default_factory=dict)

    def note(self, work: str, run: Run, beside: Ceiling | Run) -> None:
        """Keep a run and what it is compared with."""
        self.runs.setdefault(work, []).append((run, beside))

    def ratio(self, work: str) -> float:
        """Return the median of the rounds' ratios."""
        return statistics.median(run.rate / beside.rate for run, beside in self.runs[work])

    def median(self, work: str, name: str) -> float:
        """Return the median of one figure of the daemon's runs."""
        return statistics.median(float(asdict(run)[name]) for run, _ in self.runs[work])


@dataclass(frozen=True)
class Rows:
    """Messages' rows encoded beforehand: as one, and batch by batch without and with ordinals."""

    whole: bytes
    batches: Sequence[bytes]
    numbered: Sequence[bytes]


def encode(shape: Shape, count: int) -> Rows:
    """Encode all messages, batches of one partition each as the daemon's are."""
    turn = BATCH * PARTITIONS
    batches = [
        (first, len(range(first, min(start + turn, count), PARTITIONS)))
        for start in range(0, count, turn)
        for first in range(start, min(start + PARTITIONS, count))
    ]
    return Rows(
        whole=shape.packed(0, count),
        batches=[shape.packed(first, size, step=PARTITIONS) for first, size in batches],
        numbered=[shape.packed(first, size, step=PARTITIONS, ordinal=True) for first, size in batches],
    )


def measure(stage: Stage, count: int, rounds: int) -> Rounds:
    """Run every work next to its ceiling, round by round."""
    seen = Rounds()
    repeated, bare = replace(SIX, keys=count // REPEATED), replace(SIX, primary_key=False)
    new, again = encode(SIX, count), encode(repeated, count)
    for _ in range(rounds):
        one = one_copy(stage, "raw", new.whole, count)
        stage.make_table("appended")
        seen.note("append", carry(stage, count, "bench", "appended", {}), one)
        _expect(stage, "appended", count)
        many = copies(stage, "raw", new.batches, count)
        seen.note("append, batches on four connections", seen.runs["append"][-1][0], many)
        raw = upserts(stage, "raw", new.numbered, count, distinct=False, fresh=True)
        stage.make_table("upserted")
        seen.note("upsert, all keys new", carry(stage, count, "bench", "upserted", UPSERT), raw)
        raw = upserts(stage, "raw", new.numbered, count, distinct=False, fresh=False)
        stage.settle()
        seen.note("upsert, every key there", carry(stage, count, "bench", "upserted", UPSERT), raw)
        _expect(stage, "upserted", count)
        raw = upserts(stage, "raw", again.numbered, count, distinct=True, fresh=True)
        stage.make_table("repeated")
        seen.note("upsert, each key ten times", carry(stage, count, "again", "repeated", UPSERT), raw)
        _expect(stage, "repeated", count // REPEATED)
        stage.make_table("in_kafka", bare)
        in_kafka = carry(stage, count, "bench", "in_kafka", {"checkpoint": "kafka"}, in_kafka=True)
        stage.make_table("in_postgres", bare)
        in_postgres = carry(stage, count, "bench", "in_postgres", {}, in_kafka=True)
        seen.note("checkpoint in Postgres against Kafka", in_postgres, in_kafka)
    return seen


def _expect(stage: Stage, table: str, rows: int) -> None:
    """Stop when a table has not what it should: a speed without the rows is none."""
    if (found := stage.rows(table)) != rows:
        raise SystemExit(f"{table} has {found} rows of {rows}")


def main() -> None:
    """Measure, print the tables, and keep what was measured."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    arguments.add_argument("-n", "--messages", type=int, default=3_000_000)
    arguments.add_argument("-r", "--rounds", type=int, default=5)
    options = arguments.parse_args()
    if options.messages < LEAST or options.rounds < 1:
        arguments.error(f"at least {LEAST:,} messages and 1 round")
    with stage() as here:
        size = here.fill("bench", options.messages, PARTITIONS) / options.messages
        here.fill("again", options.messages, PARTITIONS, replace(SIX, keys=options.messages // REPEATED))
        print(f"{options.messages} messages of {size:.0f} bytes in {PARTITIONS} partitions", flush=True)
        seen = measure(here, options.messages, options.rounds)
        resting = idle(here)
        taken = steps(here, "bench", PARTITIONS, SIX)
    with stage({"track_commit_timestamp": "on"}) as here:
        pace = Pace(rate=10_000, max_age=0.1)
        latency(here, pace, seconds=15.0)  # the broker's compiler takes a while
        late = latency(here, pace)
    print_runs(seen, size)
    print_steps(taken, seen.median("append", "daemon"))
    print_goals(seen, resting, late)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "bench.json").write_text(json.dumps(_json(seen, resting, late, taken), indent=1), encoding="utf-8")


def print_runs(seen: Rounds, size: float) -> None:
    """Print what each work took; nanoseconds of a core for each row."""
    print("\nnanoseconds of a core for each row, by daemon, Postgres and broker; the daemon's peak memory")
    print(
        f"{'':38}{'rows/s':>9}{'MB/s':>7}{'ceiling':>9}{'ratio':>7}{'daemon':>9}{'Postgres':>9}{'broker':>9}{'MiB':>6}"
    )
    for work, runs in seen.runs.items():
        rate = seen.median(work, "rate")
        ceiling = statistics.median(beside.rate for _, beside in runs)
        used = "".join(f"{seen.median(work, name):9.0f}" for name in ("daemon", "postgres", "broker"))
        print(
            f"{work:38}{rate:9,.0f}{rate * size / 1e6:7.0f}{ceiling:9,.0f}{seen.ratio(work):7.2f}{used}"
            f"{seen.median(work, 'peak'):6.0f}"
        )


def print_steps(taken: Mapping[str, float], daemon: float) -> None:
    """Print where the daemon's time goes in append; nanoseconds of a core for each row."""
    print(f"\n{'step of append, alone':38}{'ns/row':>9}")
    for name, cost in taken.items():
        print(f"{name:38}{cost:9.0f}")
    print(f"{'between the steps':38}{daemon - sum(taken.values()):9.0f}\n{'the daemon':38}{daemon:9.0f}")


def print_goals(seen: Rounds, resting: tuple[float, float], late: Latency) -> None:
    """Print each goal beside its figure."""
    memory, share = resting
    first = min(run.first for run, _ in seen.runs["append"])
    goals = [
        ("append, of one raw COPY", seen.ratio("append"), ">=", 0.85, ""),
        ("upsert, all keys new, of the raw statement", seen.ratio("upsert, all keys new"), ">=", 0.80, ""),
        ("upsert, every key there", seen.ratio("upsert, every key there"), ">=", 0.80, ""),
        ("upsert, each key ten times", seen.ratio("upsert, each key ten times"), ">=", 0.80, ""),
        (
            "checkpoint in Postgres, of that in Kafka",
            seen.ratio("checkpoint in Postgres against Kafka"),
            ">=",
            0.97,
            "",
        ),
        ("peak memory", max(run.peak for runs in seen.runs.values() for run, _ in runs), "<=", 350, " MiB"),
        ("idle memory", memory, "<=", 80, " MiB"),
        ("process start to the first rows", first, "<=", 1.0, " s"),
        ("idle, 60 partitions, of a core", share * 100, "<=", 1.0, " %"),
        ("p99 produce to commit, 10,000/s, max_age 100 ms", late.p99 * 1000, "<=", 130, " ms"),
    ]
    print(f"\n{'goal':50}{'':>3}{'':>8}  measured")
    for name, figure, sign, bound, unit in goals:
        held = figure >= bound if sign == ">=" else figure <= bound
        print(f"{name:50}{sign:>3}{bound:8g}  {figure:.3g}{unit}{'' if held else '   not reached'}")


def _json(seen: Rounds, resting: tuple[float, float], late: Latency, taken: Mapping[str, float]) -> dict[str, Any]:
    runs = {work: [[asdict(run), asdict(beside)] for run, beside in pairs] for work, pairs in seen.runs.items()}
    return {
        "runs": runs,
        "steps": dict(taken),
        "idle": {"memory_mib": resting[0], "core": resting[1]},
        "latency": asdict(late),
    }


if __name__ == "__main__":
    with kept("bench"):
        main()
