"""`make bench-guard`: instructions per row of the pure core, here and in an earlier commit, counted in the same run.

valgrind's callgrind counts what the interpreter and its libraries execute, so a busy machine moves nothing. Both trees
are copied to paths of the same length, hashes are fixed, and the collector of cyclic garbage is off: what differs is
the code. The earlier commit is counted by the steps of now or, where its functions were called otherwise, by its own.
Status 1 when a step costs more than it may; 2 when nothing can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from tests.bench.guard_steps import STEPS
from tests.bench.stage import SIX

ROWS = 20_000
TOLERANCE = 3.0
"""Percent that a step may cost more."""
NOISE = 20.0
"""Instructions per row that count for nothing: what it costs to grow a list depends on where it happens to lie."""
REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path("tests/bench/guard_steps.py")
REPORT = REPOSITORY / "build/bench/guard.json"


def main() -> None:
    """Count both, print the table, and fail when it got dearer."""
    arguments = argparse.ArgumentParser(prog="python -m tests.bench.guard", description=__doc__)
    arguments.add_argument("ref", nargs="?", default="HEAD~1", help="the commit to compare with")
    options = arguments.parse_args()
    if shutil.which("valgrind") is None:
        _give_up(
            "valgrind is not installed, and nothing else counts instructions here (Debian: apt-get install valgrind)"
        )
    with tempfile.TemporaryDirectory(prefix="consumerd-guard-") as name:
        folder = Path(name)
        old, new = folder / "old", folder / "new"
        _export(options.ref, old)
        shutil.copytree(REPOSITORY / "consumerd", new / "consumerd", ignore=shutil.ignore_patterns("__pycache__"))
        messages = folder / "messages"
        messages.write_bytes(b"\n".join([json.dumps(SIX.columns).encode(), *map(SIX.value, range(ROWS))]))
        with ThreadPoolExecutor(2) as threads:
            was, now = threads.map(lambda tree: count(tree, messages), (old, new))
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps({"ref": options.ref, "was": was, "now": now}, indent=1), encoding="utf-8")
    if dearer := compare(was, now, options.ref):
        raise SystemExit(f"more than {TOLERANCE:g} % dearer than {options.ref}: {', '.join(dearer)}")


def count(tree: Path, messages: Path) -> dict[str, float]:
    """Return the instructions per row of each step, and of all."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
    error = ""
    for script in (REPOSITORY / SCRIPT, tree / SCRIPT):
        command = [sys.executable, "-P", str(script), str(messages)]
        if script.exists() and not (error := _run(command, env)):  # quick to fail, and compiles the modules
            break
    else:
        _give_up(f"the steps do not run in {tree.name}:\n{error}")
    counts = tree / "counts"
    valgrind = ["valgrind", "--tool=callgrind", "--dump-before=getloadavg", f"--callgrind-out-file={counts}"]
    if error := _run([*valgrind, *command], env):
        _give_up(f"valgrind cannot run Python:\n{error}")
    dumps = [counts.with_suffix(f".{number}") for number in range(1, 2 * len(STEPS) + 3)]
    missing = [dump.name for dump in dumps if not dump.exists()]
    if missing:
        _give_up(f"callgrind wrote no {', '.join(missing)}")
    totals = [_total(dump) for dump in dumps[-len(STEPS) :]]
    steps = {step: total / ROWS for step, total in zip(STEPS, totals, strict=True)}
    return {**steps, "all": sum(steps.values())}


def compare(was: dict[str, float], now: dict[str, float], ref: str) -> list[str]:
    """Print instructions per row and how they changed; return the steps that cost more than they may."""
    print(f"{'instructions per row':22}{ref[:12]:>12}{'here':>12}{'':>4}change")
    change = {step: (now[step] / was[step] - 1) * 100 for step in was}
    for step, percent in change.items():
        print(f"{step:22}{was[step]:12,.1f}{now[step]:12,.1f}{percent:+9.2f} %")
    return [step for step, percent in change.items() if percent > TOLERANCE and now[step] - was[step] > NOISE]


def _export(ref: str, tree: Path) -> None:
    """Put a commit into a folder."""
    tree.mkdir()
    git = ["git", "-C", str(REPOSITORY), "archive", ref]
    archive = subprocess.run(git, capture_output=True, check=False)
    if archive.returncode:
        _give_up(f"{ref} cannot be read: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)


def _total(dump: Path) -> int:
    return next(int(line.split()[1]) for line in dump.read_text().splitlines() if line.startswith("totals:"))


def _run(command: list[str], env: dict[str, str]) -> str:
    """Run a command, and return what it complained of if it failed."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stderr[-2000:] or f"status {done.returncode}" if done.returncode else ""


def _give_up(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
