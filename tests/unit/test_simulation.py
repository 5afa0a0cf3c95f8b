"""The core in one process with a clock, a broker and a database of the test's own, through thousands of interleavings.

A seed is a world: what happens to it (rebalances at any await, zombies, crashes, lost answers, a database that goes
back, resets by an operator) and in which order callbacks run. More of them by hand, and one with its trace:
`CONSUMERD_SIMULATION_SEEDS=100000 pytest tests/unit/test_simulation.py -k seeds`, and
`python -m tests.unit.simulation all postgres 85`.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from consumerd import checkpoint
from consumerd.accumulator import Accumulator
from consumerd.assignment import Assignment
from consumerd.member import Member
from consumerd.reconcile import Reconciler
from consumerd.writer import Writer
from tests.unit.simulation.core import run, simulated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

SEEDS = int(os.environ.get("CONSUMERD_SIMULATION_SEEDS", "150"))
MUTANT_SEEDS = 400
"""Seeds within which a mutant must be caught."""
TRACED = 60
"""Last lines of a trace that are shown."""
WORLDS = [
    *((kind, "postgres") for kind in ("rebalance", "faults", "zombies", "back", "all")),
    *((kind, "kafka") for kind in ("rebalance", "faults", "zombies", "all")),
]


@pytest.fixture(autouse=True)
def core() -> Iterator[None]:
    """Run within the simulation; without the collector, whose moments are nobody's seed."""
    gc.collect()
    gc.disable()
    with simulated():
        yield
    gc.enable()


def problem(kind: str, mode: str, seeds: int) -> tuple[int, str] | None:
    """Return the first seed in which something did not hold, and what."""
    for seed in range(seeds):
        found = run(seed, kind, mode).problem
        if found is not None:
            return seed, found
        if seed % 100 == 0:
            gc.collect()
    return None


@pytest.mark.parametrize(("kind", "mode"), WORLDS)
@pytest.mark.timeout(max(120, SEEDS))
def test_seeds(kind: str, mode: str) -> None:
    """Whatever happens: each message in the table once (P1, P2), in order (P3), nothing after a hand-over (P9)."""
    found = problem(kind, mode, SEEDS)
    if found is not None:
        trace = run(found[0], kind, mode, traced=True).trace or []
        print("\n".join(trace[-TRACED:]))  # noqa: T201 - what led to it
    assert found is None


@pytest.mark.parametrize(("kind", "mode"), [("all", "postgres"), ("zombies", "kafka")])
def test_a_seed_is_always_the_same(kind: str, mode: str) -> None:
    """A seed gives the same trace each time: what it finds can be looked at."""
    for seed in range(6):
        first = run(seed, kind, mode, traced=True).trace
        assert first
        assert first == run(seed, kind, mode, traced=True).trace


MUTANTS: dict[str, tuple[type | ModuleType, str, str, str, str, str]] = {
    "the lease is not compared": (
        Member, "holds", ".get(batch.partition) is lease", ".get(batch.partition) is not None", "all", "postgres"),
    "a revoke neither waits nor cuts": (
        Member, "_lay_down", "await self._settle(partitions, deadline)", "pass", "all", "postgres"),
    "claims are not awaited by a revoke": (
        Member, "revoked", "await self.assignment.claims_landed()", "pass", "rebalance", "postgres"),
    "messages of an earlier seek are taken": (
        Member, "release", "self._positions.pop(partition, None)", "pass", "back", "postgres"),
    "rejects are dropped": (
        Writer,
        "_settle_poison",
        "await member.letters.send(batch, member.epoch_of_letters(batch.partition, lease))",
        "pass",
        "rebalance",
        "postgres",
    ),
    "a fenced write counts as written": (
        Writer, "_until_settled", "await self._member.reconciler.fenced(work)",
        "self._member.written(work, 0.0)", "zombies", "postgres"),
    "a write goes on where it was, not where the checkpoint is": (
        Reconciler, "_return_to", "next_offset=offset,", "next_offset=lease.next_offset,", "back", "postgres"),
    "chunks are gathered in the wrong order": (
        Accumulator, "add", "queue.chunks.append", "queue.chunks.appendleft", "rebalance", "postgres"),
    "an adopted offset is not stamped": (
        Assignment, "_place", "await self._acknowledge(partition, offset, tally)", "pass", "zombies", "postgres"),
    "a database that goes back is not noticed": (
        Reconciler, "_compare", "if not before", "if before", "back", "postgres"),
    "the next batch does not wait for the commit": (
        Assignment, "committed", "promise is None or promise.done()", "True", "zombies", "kafka"),
    "an unknown commit is written again": (
        Writer, "_settle_doubt", "if await postgres.was_committed(conn, transaction)",
        "if not await postgres.was_committed(conn, transaction) and False", "faults", "kafka"),
    "no compare-and-set (rule 3)": (
        checkpoint, "_ADVANCE", "AND c.epoch = e.epoch AND c.next_offset = e.old_offset", "", "zombies", "postgres"),
    "a claim raises no epoch (rule 2)": (
        checkpoint, "_CLAIM", "epoch = c.epoch + 1, ", "", "zombies", "postgres"),
}  # fmt: skip
"""What is broken, how, and in which worlds that must be seen."""


def broken(owner: type | ModuleType, name: str, old: str, new: str) -> Any:  # noqa: ANN401
    """Return a method, or a statement's text, with some of it replaced."""
    whole = getattr(owner, name)
    source = whole if isinstance(whole, str) else textwrap.dedent(inspect.getsource(whole))
    assert source.count(old) == 1
    replaced = source.replace(old, new)
    if isinstance(whole, str):
        return replaced
    made: dict[str, Any] = {}
    module = vars(sys.modules[whole.__module__])
    exec("from __future__ import annotations\n" + replaced, module, made)  # noqa: S102 - our own text
    return made[name]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that breaks a promise is caught: a simulation that cannot fail proves nothing."""
    owner, name, old, new, kind, mode = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, broken(owner, name, old, new))
    assert problem(kind, mode, MUTANT_SEEDS) is not None
