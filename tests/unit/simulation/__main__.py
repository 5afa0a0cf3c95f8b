"""Run one seed and print its trace: `python -m tests.unit.simulation all postgres 85`."""

import sys

from tests.unit.simulation.core import run, simulated

kind, mode, seed = sys.argv[1:]
with simulated():
    world = run(int(seed), kind, mode, traced=True)
print(*world.trace or [], sep="\n")  # noqa: T201
print("held" if world.problem is None else world.problem)  # noqa: T201
