"""`make bench-peers`: the daemon beside other ways to carry the same records into the same table, in the same run.

Each is a process of its own, one at a time, with the best settings that its documentation names. Ratios count, not
figures: the machine is shared, so a ratio is the median of the rounds' ratios, each to the daemon's run of that round.
`build/bench/peers.json` has every run, `build/bench/peers` the peers' logs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.carry import carry
from tests.bench.peers import connect, scripts
from tests.bench.peers.race import LIMIT, PARTITIONS, SETTINGS, Peer, Result, Unavailable, account, race
from tests.bench.report import kept
from tests.bench.stage import stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.stage import Stage

DAEMON = "consumerd"
WRITES = {"append": {}, "upsert": {"table": {"write": "upsert", "key": ["id"]}}}
GOALS = {("debezium", "append"): 2.5, ("pathway", "append"): 3.5, ("forty-lines", "append"): 4.0}
"""How many times faster the daemon is to be."""
PEERS = {
    peer.name: peer
    for peer in (connect.debezium(), scripts.pathway(), scripts.forty_lines(), scripts.arroyo(), scripts.quix())
}
ABSENT = {"aiven": "its JDBC sink is not on Maven Central"}
REPORT = Path("build/bench")


@dataclass
class Seen:
    """What was measured: the runs by peer and way to write, and why there are none."""

    runs: dict[tuple[str, str], list[Result]] = field(default_factory=dict)
    absent: dict[tuple[str, str], str] = field(default_factory=dict)

    def ratio(self, name: str, write: str) -> float:
        """Return how many times faster the daemon was: the median of the rounds."""
        pairs = zip(self.runs[DAEMON, write], self.runs[name, write], strict=True)
        return statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)

    def median(self, name: str, write: str, figure: str) -> float:
        """Return the median of one figure."""
        return statistics.median(float(asdict(run)[figure]) for run in self.runs[name, write])


def measure(here: Stage, peers: Sequence[Peer], count: int, rounds: int, seen: Seen) -> None:
    """Have all take turns, round by round."""
    for _ in range(rounds):
        for write in WRITES:
            seen.runs.setdefault((DAEMON, write), []).append(_daemon(here, write, count))
            for peer in peers:
                case = peer.name, write
                if write not in peer.writes or case in seen.absent:
                    continue
                try:
                    result = race(here, peer, write, count)
                except Unavailable as why:
                    seen.absent[case] = str(why)
                    seen.runs.pop(case, None)
                else:
                    seen.runs.setdefault(case, []).append(result)
                    print(f"{peer.name}, {write}: {result.rate:,.0f} rows/s, {result.rows} rows", flush=True)


def _daemon(here: Stage, write: str, count: int) -> Result:
    table = f"{DAEMON}_{write}"
    here.make_table(table)
    run = carry(here, count, "bench", table, WRITES[write])
    held = account(here, table)
    print(f"{DAEMON}, {write}: {run.rate:,.0f} rows/s, {held.rows} rows", flush=True)
    return Result(
        rate=run.rate,
        peer=run.daemon,
        postgres=run.postgres,
        broker=run.broker,
        peak=run.peak,
        first=run.first,
        rows=held.rows,
        right=held.right,
    )


def main() -> None:
    """Install, measure, print the table, and keep what was measured."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    arguments.add_argument("-n", "--messages", type=int, default=3_000_000)
    arguments.add_argument("-r", "--rounds", type=int, default=3)
    arguments.add_argument("peers", nargs="*", metavar="PEER", help=f"some alone: {', '.join(PEERS)}")
    options = arguments.parse_args()
    if unknown := set(options.peers) - PEERS.keys():
        arguments.error(f"no such peer: {', '.join(sorted(unknown))}")
    seen = Seen()
    peers = _installed([PEERS[name] for name in options.peers or PEERS], seen)
    with stage(SETTINGS) as here:
        size = here.fill("bench", options.messages, PARTITIONS) / options.messages
        if any(peer.topic == connect.TOPIC for peer in peers):
            here.fill(connect.TOPIC, options.messages, PARTITIONS, connect.WithText())
        print(f"{options.messages} messages of {size:.0f} bytes in {PARTITIONS} partitions", flush=True)
        measure(here, peers, options.messages, options.rounds, seen)
    if not options.peers:
        seen.absent.update({(name, write): why for name, why in ABSENT.items() for write in WRITES})
    print_table(seen, options.messages)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "peers.json").write_text(json.dumps(_json(seen, options.messages), indent=1), encoding="utf-8")


def _installed(peers: Sequence[Peer], seen: Seen) -> list[Peer]:
    """Install what can be installed."""
    there = []
    for peer in peers:
        begun = time.monotonic()
        try:
            peer.install()
        except Unavailable as why:
            seen.absent.update({(peer.name, write): str(why) for write in peer.writes})
        else:
            there.append(peer)
            print(f"{peer.name} is there after {time.monotonic() - begun:.0f} s", flush=True)
    return there


def print_table(seen: Seen, count: int) -> None:
    """Print each way to carry in a line: medians, and the daemon's ratio to it; nanoseconds of a core for each row."""
    print(
        f"\n{'':13}{'':8}{'rows/s':>9}{'daemon is':>11}{'goal':>8}{'CPU ns':>8}{'Postgres':>9}{'broker':>8}{'MiB':>6}"
        f"{'first s':>8}{'rows':>10}"
    )
    for write in WRITES:
        for name in (DAEMON, *PEERS, *ABSENT):
            if (name, write) in seen.absent:
                print(f"{name:13}{write:8}        -  {seen.absent[name, write]}")
            elif (name, write) in seen.runs:
                print(_line(seen, name, write, count))


def _line(seen: Seen, name: str, write: str, count: int) -> str:
    ratio = "" if name == DAEMON else f"x {seen.ratio(name, write):.2f}"
    goal = GOALS.get((name, write))
    used = "".join(f"{seen.median(name, write, what):{width}.0f}" for what, width in (("peer", 8), ("postgres", 9)))
    worst = min(seen.runs[name, write], key=lambda run: run.right)
    notes = [
        f"stopped after {LIMIT} s" if worst.stopped else f"{count - worst.rows} lost" if worst.rows < count else "",
        f"{worst.rows - worst.right} not as sent" if worst.right < worst.rows else "",
        "goal not reached" if goal and seen.ratio(name, write) < goal else "",
    ]
    return (
        f"{name:13}{write:8}{seen.median(name, write, 'rate'):9,.0f}{ratio:>11}{f'>= {goal:g}' if goal else '':>8}"
        f"{used}{seen.median(name, write, 'broker'):8.0f}{seen.median(name, write, 'peak'):6.0f}"
        f"{seen.median(name, write, 'first'):8.1f}{worst.rows:10}  {', '.join(filter(None, notes))}"
    ).rstrip()


def _json(seen: Seen, count: int) -> dict[str, object]:
    return {
        "messages": count,
        "runs": {f"{name}, {write}": [asdict(run) for run in runs] for (name, write), runs in seen.runs.items()},
        "absent": {f"{name}, {write}": why for (name, write), why in seen.absent.items()},
        "ratios": {f"{name}, {write}": seen.ratio(name, write) for name, write in seen.runs if name != DAEMON},
    }


if __name__ == "__main__":
    with kept("peers"):
        main()
