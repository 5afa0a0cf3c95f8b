"""What a daemon costs that has nothing to do: memory and CPU with partitions assigned and no message."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

from tests.bench.carry import config_of, cpu
from tests.servers.daemon import Daemon
from tests.servers.process import wait_until

if TYPE_CHECKING:
    from tests.bench.stage import Stage

PARTITIONS = 60
SECONDS = 20.0
REST = 5.0
"""Seconds that it is given to come to rest."""


def idle(stage: Stage) -> tuple[float, float]:
    """Return MiB of resident memory, and the share of a core, of a daemon with 60 empty partitions."""
    stage.fill("idle", 0, PARTITIONS)
    stage.make_table("idle")
    handler = {"topics": ["idle"], "table": {"name": "idle", "write": "append"}}
    run = Daemon(config_of(stage, f"idle-{time.time_ns()}", {"idle": handler}))
    with closing(run):
        run.start()
        run.wait_ready()
        wait_until(lambda: len(run.status()["handlers"]["idle"]["partitions"]) == PARTITIONS, REST * 4, "partitions")
        time.sleep(REST)
        used, begun = cpu(run.process.pid), time.perf_counter()
        time.sleep(SECONDS)
        share = (cpu(run.process.pid) - used) / (time.perf_counter() - begun)
        memory = run.memory()
        run.stop()
    return memory, share
