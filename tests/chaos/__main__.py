"""`python -m tests.chaos`: a run of segments under faults. The same command goes on with a run that was interrupted."""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.chaos import report, segment
from tests.chaos.faults import KINDS
from tests.chaos.segment import Plan
from tests.chaos.variant import PROTOCOLS
from tests.chaos.world import World, end_in_order, make_folder


def main() -> int:
    """Run what is missing of a run, and print its table; 0 when every segment passed."""
    given = _arguments()
    end_in_order()
    folder: Path = given.report
    folder.mkdir(parents=True, exist_ok=True)
    results_file = folder / "segments.jsonl"
    seed = _seed(given, folder / "run.json", results_file)
    plan = Plan(
        seed=seed,
        seconds=given.seconds,
        records=given.records,
        faults=given.faults,
        mode=given.mode,
        kinds=tuple(given.kinds.split(",")) if given.kinds else None,
        protocol=given.protocol,
        package=given.daemon_package,
    )
    print(f"seed {seed}", flush=True)
    done = {result["segment"] for result in _read(results_file)}
    missing = [number for number in range(given.segments) if number not in done]
    if missing:
        _run(plan, missing, folder, results_file)
    results = sorted(_read(results_file), key=lambda result: int(result["segment"]))
    print(f"\nseed {seed}\n{report.tell(results)}", flush=True)
    return 0 if len(results) == given.segments and report.passed(results) else 1


def _run(plan: Plan, numbers: list[int], folder: Path, results_file: Path) -> None:
    servers = make_folder()
    world = World(servers)
    try:
        world.start()
        for number in numbers:
            logs = folder / f"segment-{number}"
            shutil.rmtree(logs, ignore_errors=True)
            result = segment.run(world, plan, number, logs)
            with results_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(result) + "\n")
            print(f"segment {number}: {'passed' if result['passed'] else 'FAILED'} {result['counts']}", flush=True)
            if result["passed"]:
                shutil.rmtree(logs, ignore_errors=True)
            else:
                shutil.copy(world.kafka.log, logs)
    finally:
        world.close()
        shutil.rmtree(servers, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=230, help="of faults in a segment; catching up comes after")
    parser.add_argument("--records", type=int, default=500_000, help="in a segment")
    parser.add_argument("--faults", type=int, default=50, help="in a segment")
    parser.add_argument("--seed", type=int, help="default: that of the unfinished run in FOLDER, else a random one")
    parser.add_argument("--mode", choices=("postgres", "kafka"), default="postgres")
    parser.add_argument("--report", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--daemon-package", type=Path, metavar="PATH", help="the folder that holds consumerd/")
    parser.add_argument("--kinds", help=f"only these faults, comma-separated: {', '.join(KINDS)}")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: drawn for each segment")
    return parser.parse_args()


def _seed(given: argparse.Namespace, run_file: Path, results_file: Path) -> int:
    """Return the run's seed: of the run in the folder, when it is of the same command and not done; else begin anew."""
    command = {name: str(value) for name, value in vars(given).items()}
    if run_file.exists() and len(_read(results_file)) < given.segments:
        begun = json.loads(run_file.read_text(encoding="utf-8"))
        if begun["command"] == command:
            return int(begun["seed"])
    results_file.unlink(missing_ok=True)
    seed: int = random.randrange(2**32) if given.seed is None else given.seed
    run_file.write_text(json.dumps({"seed": seed, "command": command}), encoding="utf-8")
    return seed


def _read(results_file: Path) -> list[dict[str, Any]]:
    if not results_file.exists():
        return []
    return [json.loads(line) for line in results_file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
