"""P1 to P5, P8, P9 together, under a schedule of faults; and that the checker can fail."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import check, segment
from tests.chaos.ledger import Ledger, Rewind
from tests.chaos.mutants import MUTANTS, Mutant, copy_of
from tests.chaos.records import POISON, POISON_SHARE, Records
from tests.chaos.segment import Plan
from tests.chaos.world import World, make_folder

FIXED_SEED = 20261123
SECONDS = 30.0
RECORDS = 60_000
FAULTS = 12


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Start the servers of a run."""
    folder = make_folder()
    servers = World(folder)
    try:
        servers.start()
        yield servers
    finally:
        servers.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [FIXED_SEED, random.randrange(2**32)], ids=["fixed", "random"])
def test_a_segment_of_faults(world: World, tmp_path: Path, seed: int) -> None:
    """P1 to P5, P8, P9: each record is once where it belongs, in order, whatever fails meanwhile."""
    plan = Plan(seed=seed, seconds=SECONDS, records=RECORDS, faults=FAULTS, mode="postgres")
    result = segment.run(world, plan, 0, tmp_path / "segment")
    assert result["passed"], json.dumps(result, indent=1)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_still_applies(mutant: Mutant, tmp_path: Path) -> None:
    """P1 to P9: each change of a mutant is found once in the daemon as it is, so `make chaos-mutants` tests it."""
    package = copy_of(mutant, tmp_path) / "consumerd"
    for change in mutant.changes:
        source = (package / change.file).read_text(encoding="utf-8")
        compile(source, change.file, "exec")
        assert change.new in source


def test_the_ledger_follows_a_reset() -> None:
    """P10: what an operator set back is there once more, and a reset that was never adopted is not."""
    ledger = Ledger(Records("ledger"))
    ledger.rewind(0, Rewind(100, 40), before_was_adopted=True)
    assert [range(100), range(40, 200)] == list(ledger.spans(0, 200))
    ledger.rewind(0, Rewind(100, 70), before_was_adopted=False)
    assert [range(100), range(70, 200)] == list(ledger.spans(0, 200))
    ledger.rewind(0, Rewind(150, 10), before_was_adopted=True)
    assert [range(100), range(70, 150), range(10, 200)] == list(ledger.spans(0, 200))


def test_every_kind_of_poison_is_sent() -> None:
    """P5: within 20,000 records of a partition each kind of poison comes, and below the breaker's share."""
    records = Records("kinds")
    bad = [seq for seq in range(20_000) if not records.good(3, seq)]
    sent = {
        kind for seq in bad for kind, make in POISON.items() if make(records.fields(3, seq)) == records.value(3, seq)
    }
    assert sent == set(POISON)
    assert len(bad) / 20_000 == pytest.approx(POISON_SHARE, rel=0.3)


@pytest.mark.parametrize(
    ("found", "count", "times"),
    [
        ([0, 1, 2, 3, 4, 5], None, 0),
        ([0, 1, 2, 4, 5], "lost", 1),
        ([0, 1, 2, 3, 4, 5, 5], "doubled", 1),
        ([0, 1, 2, 3, 5, 4], "out of order", 1),
        ([0, 1, 2, 3, 4, 5, 6], "wrong", 1),
    ],
)
def test_the_check_of_rows(found: list[int], count: str | None, times: int) -> None:
    """P1 to P3: a row that is missing, twice, behind a later one, or not to be there at all is found."""
    ledger = Ledger(Records("rows"))
    assert all(ledger.records.good(0, seq) for seq in range(6))
    verdict = check.Verdict()
    check.check_append(ledger, {0: found}, {0: 6}, verdict)
    assert {count: times} if count else {} == +verdict.counts
    assert (verdict.counts[count] if count else 0) == times


@pytest.mark.parametrize(
    ("found", "doubled"),
    [
        ([0, 1, 2, 3, 2, 3, 4, 5], 0),
        ([0, 1, 2, 3, 2, 3, 2, 3, 4, 5], 0),
        ([0, 1, 2, 3, 1, 2, 3, 4, 5], 1),
        ([0, 0, 0, 0, 1, 2, 3, 4, 5], 1),
    ],
)
def test_what_at_least_once_may_repeat(found: list[int], doubled: int) -> None:
    """Rule 28: at most one batch at a time may be there again, and only so many times."""
    verdict = check.Verdict()
    first = check.without_repeats(found, 0, check.Repeats(rows=2, times=2), verdict)
    assert [0, 1, 2, 3, 4, 5] == first
    assert verdict.counts["doubled"] == doubled
