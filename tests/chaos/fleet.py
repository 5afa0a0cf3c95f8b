"""The daemons of a segment: up to five processes, and what is held against them.

A daemon may end only when it was told to: with SIGTERM (exit status 0, or 75 when something was away at that moment)
or by SIGKILL. One that ends by itself, and any handler that halts, is a failure of the segment.
"""

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers.daemon import Daemon, merged, write_config
from tests.servers.process import free_port

SLOTS = 5
STOP_TIMEOUT = 60
READY_TIMEOUT = 60
NOT_DRAINED = 75
KIB = 1024


class Slot:
    """One daemon. Who sends it signals holds its lock."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.lock = threading.Lock()
        self.wanted = False
        """Whether it should be running."""
        self.peak_rss = 0

    def ended_by_itself(self) -> bool:
        """Whether it is gone and nobody has ended it."""
        return self.wanted and not self.daemon.running

    def start(self) -> None:
        """Start it, and do not wait for it."""
        self.daemon.start()
        self.wanted = True

    def kill(self) -> None:
        """SIGKILL."""
        self.wanted = False
        self.daemon.kill()

    def stop(self) -> int:
        """SIGTERM; return the exit status."""
        self.wanted = False
        return self.daemon.stop(STOP_TIMEOUT)

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self.daemon.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.daemon.process.pid, signal.SIGCONT)


class Fleet:
    """All daemons of a segment; the first `size` of them run from the start."""

    def __init__(
        self,
        folder: Path,
        size: int,
        config: Mapping[str, Any],
        handlers: Mapping[str, Mapping[str, Any]],
        *,
        static: bool,
        package: Path | None,
    ) -> None:
        self.size = size
        self.problems: list[str] = []
        env = {"PYTHONPATH": str(package)} if package else None
        self.slots = []
        for number in range(SLOTS):
            own: dict[str, Any] = {"daemon": {"listen": f"127.0.0.1:{free_port()}"}, "log": {"format": "json"}}
            if static:
                own["kafka"] = {"group_instance_id": f"daemon-{number}"}
            path = write_config(folder / f"daemon-{number}", merged(config, own), handlers)
            self.slots.append(Slot(Daemon(path, env=env)))
        self._read = [0] * SLOTS

    def start(self) -> None:
        """Start the first ones."""
        for slot in self.slots[: self.size]:
            slot.start()

    def look(self) -> None:
        """Note daemons that ended by themselves, and halts that are new in the logs."""
        for number, slot in enumerate(self.slots):
            if slot.lock.acquire(blocking=False):
                try:
                    if slot.ended_by_itself():
                        slot.wanted = False
                        self.problems.append(f"daemon {number} ended by itself with {slot.daemon.process.wait(1)}")
                finally:
                    slot.lock.release()
            if slot.wanted:
                slot.peak_rss = max(slot.peak_rss, rss(slot.daemon.process.pid))
            self._read_log(number, slot.daemon.log)

    def stop(self) -> None:
        """Stop all that run, once they have joined; each must end with 0."""
        self._wait_ready()
        running = [(number, slot) for number, slot in enumerate(self.slots) if slot.daemon.running]
        for _, slot in running:
            slot.wanted = False
            os.kill(slot.daemon.process.pid, signal.SIGTERM)
        for number, slot in running:
            try:
                status = slot.daemon.process.wait(STOP_TIMEOUT)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is noted and the others are stopped
                self.problems.append(f"daemon {number} did not stop: {type(error).__name__}")
                continue
            if status != 0:
                self.problems.append(f"daemon {number} stopped with {status} at the end")
        self.look()

    def note_exit(self, number: int, status: int) -> None:
        """Note how a daemon answered SIGTERM; one that had just started dies of it, as any process does."""
        if status not in {0, NOT_DRAINED, -signal.SIGTERM}:
            self.problems.append(f"daemon {number} answered SIGTERM with {status}")

    def close(self) -> None:
        """Leave nothing running."""
        for slot in self.slots:
            slot.wanted = False
            slot.daemon.close()

    def _wait_ready(self) -> None:
        for number, slot in enumerate(self.slots):
            if slot.wanted:
                try:
                    slot.daemon.wait_ready(READY_TIMEOUT)
                except (RuntimeError, TimeoutError) as error:
                    self.problems.append(f"daemon {number} is not ready at the end: {str(error).splitlines()[0]}")

    def _read_log(self, number: int, log: Path) -> None:
        if not log.exists():
            return
        with log.open("rb") as lines:
            lines.seek(self._read[number])
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._read[number] += len(line)
                if b"halted: " in line or b"Traceback" in line:
                    self.problems.append(f"daemon {number}: {_sentence(line)}")


def _sentence(line: bytes) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line.decode(errors="replace").strip()
    return f"{entry.get('handler')}: {entry.get('message')}"


def rss(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4 * KIB
