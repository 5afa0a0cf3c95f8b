"""`python -m tests.chaos.mutants [NAME...]`: the daemon broken on purpose, once for each promise; each must be caught.

A mutant is a copy of `consumerd/` with a few lines replaced, and the faults that matter for it. A checker that passes
one of them is too weak, and this run fails.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import segment
from tests.chaos.segment import Plan
from tests.chaos.variant import Mode, Protocol
from tests.chaos.world import World, end_in_order, make_folder
from tests.servers.daemon import REPOSITORY

SECONDS = 50.0
TRIES = 3
"""Segments, with a seed each, that a mutant may need: most faults meet a write in flight only by chance."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One replacement in one file; `old` is there exactly once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A broken daemon, and what shows it."""

    name: str
    breaks: str
    changes: tuple[Change, ...]
    kinds: tuple[str, ...] = ("daemon killed",)
    faults: int = 20
    records: int = 150_000
    daemons: int | None = None
    protocol: Protocol | None = None
    mode: Mode = "postgres"


NO_COMPARE = Change(
    file="checkpoint.py",
    old="WHERE c.group_id = %(group)s AND c.epoch = e.epoch AND c.next_offset = e.old_offset\n",
    new="WHERE c.group_id = %(group)s\n",
)

MUTANTS = (
    Mutant(
        name="no-compare-and-set",
        breaks="P2: the checkpoint moves whatever it was",
        changes=(NO_COMPARE,),
        kinds=("daemon stopped past its session", "Postgres connections cut", "backends terminated"),
        faults=30,
    ),
    Mutant(
        name="commit-before-write",
        breaks="P1: the offset is committed to Kafka when a batch is taken, and a start goes on from there",
        changes=(
            Change(
                file="member.py",
                old="                self.progress.taken(batches)\n",
                new="                self.progress.taken(batches)\n"
                "                self.assignment.commit(\n"
                "                    [self.assignment.commit_of(b.partition, b.next_offset, None) for b in batches]\n"
                "                )\n",
            ),
            Change(
                file="decide.py",
                old='    if offset > here:\n        note = f"Postgres went back',
                new="    if offset > here:\n"
                '        return Decision(kind="adopt", offset=offset)\n'
                '        note = f"Postgres went back',
            ),
        ),
        kinds=("daemon killed", "table locked"),
        faults=30,
    ),
    Mutant(
        name="letters-not-awaited",
        breaks="P1: a letter counts as acknowledged when it is handed to the client",
        changes=(
            Change(
                file="dead_letter.py",
                old="                batch.on_their_way.add(position)\n",
                new="                batch.lettered.add(position)\n",
            ),
        ),
        kinds=("daemon killed", "daemon restarted", "Kafka connections deaf", "Kafka connections slow"),
        faults=30,
    ),
    Mutant(
        name="rejects-dropped",
        breaks="P1: what Postgres refuses gets no letter",
        changes=(
            Change(
                file="dead_letter.py",
                old="        due = [position for position in batch.refused if position not in batch.lettered]\n",
                new="        due = [\n"
                "            position\n"
                "            for position, refusal in batch.refused.items()\n"
                '            if position not in batch.lettered and refusal.stage == "decode"\n'
                "        ]\n",
            ),
        ),
    ),
    Mutant(
        name="revoke-ignored",
        breaks="P9: partitions go at once, writes in flight go on, and nothing fences them",
        changes=(
            NO_COMPARE,
            Change(
                file="member.py",
                old='            await self._lay_down(partitions, "revoke", deadline)\n'
                "        self.release(partitions)\n",
                new="            await asyncio.sleep(0)\n",
            ),
        ),
        kinds=("daemon joins and leaves", "daemon restarted"),
        faults=12,
    ),
    Mutant(
        name="order-swapped",
        breaks="P3: the rows of a batch are written last first",
        changes=(
            Change(
                file="live_table.py",
                old="        self.sink.pack(rows.rows, data)\n",
                new="        self.sink.pack(rows.rows[::-1], data)\n",
            ),
        ),
    ),
    Mutant(
        name="upsert-keeps-first",
        breaks="P3: of a key's records in a batch the first wins",
        changes=(Change(file="sinks/upsert.py", old='sql.SQL("{} DESC")', new='sql.SQL("{} ASC")'),),
    ),
    Mutant(
        name="checkpoint-ahead",
        breaks="P1: the checkpoint passes over the record after each batch",
        changes=(
            Change(
                file="writer.py",
                old="                new=batch.next_offset,\n",
                new="                new=batch.next_offset + 1,\n",
            ),
        ),
    ),
    Mutant(
        name="outage-as-poison",
        breaks="P4: a lock that is not had in time counts as a fault of the row",
        changes=(Change(file="sqlstate.py", old='"55P03": Next.RETRY,', new='"55P03": Next.ISOLATE,'),),
        kinds=("rows locked",),
        faults=20,
    ),
    Mutant(
        name="memory-unbounded",
        breaks="P8: the thread consumes however full the buffer is",
        changes=(
            Change(
                file="member.py",
                old="        return max((self._batches.memory + in_transit) / self.budget.full, "
                "self._batches.messages / self.budget.enough)\n",
                new="        return 0.0 * in_transit\n",
            ),
        ),
        kinds=("nothing written for long",),
        faults=1,
        records=1_000_000,
        daemons=1,
    ),
    Mutant(
        name="repeats-unbounded",
        breaks="rule 28: at least once, a batch is written before the last one's commit is acknowledged",
        changes=(
            Change(
                file="writer.py",
                old="                elif self._member.committed(work):\n",
                new="                elif self._member is not None:\n",
            ),
        ),
        kinds=("daemon killed", "Kafka connections deaf", "Kafka connections slow"),
        faults=30,
        mode="kafka",
    ),
)


def copy_of(mutant: Mutant, folder: Path) -> Path:
    """Make the mutant's package below a folder and return what goes on the path; raises when a change does not fit."""
    shutil.copytree(REPOSITORY / "consumerd", folder / "consumerd", ignore=shutil.ignore_patterns("__pycache__"))
    for change in mutant.changes:
        path = folder / "consumerd" / change.file
        source = path.read_text(encoding="utf-8")
        if source.count(change.old) != 1:
            raise LookupError(f"{mutant.name}: {source.count(change.old)} of {change.old!r} in {change.file}")
        path.write_text(source.replace(change.old, change.new), encoding="utf-8")
    return folder


def main(names: Sequence[str], seed: int) -> int:
    """Run mutants and print how each was caught; 0 when all were."""
    end_in_order()
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    lines = []
    survived = 0
    folder = make_folder()
    world = World(folder)
    try:
        world.start()
        for mutant in chosen:
            how = _catch(world, mutant, seed)
            survived += not how
            lines.append(f"{mutant.name:<22} {how or 'SURVIVED'}")
            print(f"mutant {lines[-1]}", flush=True)
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["", f"seed {seed}", *lines]), flush=True)
    return 1 if survived else 0


def _catch(world: World, mutant: Mutant, seed: int) -> str:
    """Run segments against a mutant until one fails; return what failed, or nothing."""
    with tempfile.TemporaryDirectory(prefix="consumerd-mutant-") as name:
        package = copy_of(mutant, Path(name) / "package")
        for number in range(TRIES):
            plan = Plan(
                seed=seed,
                seconds=SECONDS,
                records=mutant.records,
                faults=mutant.faults,
                mode=mutant.mode,
                kinds=mutant.kinds,
                protocol=mutant.protocol,
                daemons=mutant.daemons,
                package=package,
            )
            result = segment.run(world, plan, number, Path(name) / f"segment-{number}")
            if not result["passed"]:
                return _how(result)
    return ""


def _how(result: dict[str, Any]) -> str:
    counts = [f"{count} {times}" for count, times in result["counts"].items() if times]
    return "; ".join([*([", ".join(counts)] if counts else []), *(problem[:200] for problem in result["problems"])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(mutant.name for mutant in MUTANTS))
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    sys.exit(main(arguments.names, arguments.seed))
