"""How long each fault held the handlers up: seconds from its end until each of them wrote again."""

import threading
import time
from bisect import bisect_right
from collections.abc import Iterable

import psycopg

from tests.chaos.schedule import Done
from tests.chaos.stage import Stage
from tests.chaos.variant import group

INTERVAL = 0.2
"""Seconds between two looks."""
CHECKPOINTS = "SELECT group_id, sum(next_offset)::bigint FROM consumerd.checkpoint WHERE next_offset >= 0 GROUP BY 1"
ROWS = "SELECT '{group}', last_value FROM append_arrived_seq"
"""At least once there is no checkpoint in Postgres to look at."""


class Recovery:
    """Looks at the checkpoints as long as records are produced."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._times: list[float] = []
        self._sums: dict[str, list[int]] = {group(stage.topic, handler): [] for handler in stage.variant.handlers}
        self._query = CHECKPOINTS if stage.variant.mode == "postgres" else ROWS.format(group=next(iter(self._sums)))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="recovery", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._over.set()
        self._thread.join()

    def seconds(self, faults: Iterable[Done]) -> list[tuple[str, float]]:
        """Return kind and seconds for each fault after whose end the handlers still had something to write."""
        found = []
        for fault in faults:
            here = bisect_right(self._times, fault.ended)
            moved = [self._moved(sums, here) for sums in self._sums.values()]
            if here and None not in moved:
                found.append((fault.kind, max(at for at in moved if at is not None) - fault.ended))
        return found

    def _moved(self, sums: list[int], here: int) -> float | None:
        """Return when a handler's checkpoint first differed from what it was at a look."""
        later = (at for at, value in zip(self._times[here:], sums[here:], strict=True) if value != sums[here - 1])
        return next(later, None)

    def _look(self) -> None:
        while not self._over.is_set():
            try:
                with self._stage.world.superuser(self._stage.database) as conn:
                    while not self._over.wait(INTERVAL):
                        seen = {
                            str(name): int(str(total)) for name, total in conn.execute(self._query.encode()).fetchall()
                        }
                        self._times.append(time.monotonic())
                        for name, sums in self._sums.items():
                            sums.append(seen.get(name, 0))
            except psycopg.Error:
                self._over.wait(INTERVAL)  # not there, or the daemons have not made their schema yet
            except TimeoutError:
                return
