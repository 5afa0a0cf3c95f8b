"""The processes that the demo starts: each dies with it, writes to a file, and shows that file's end when it fails."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LIFELINE = Path(__file__).with_name("lifeline.py")
TAIL_LINES = 25
"""Lines of a log that a failure shows."""
ANSWER_TIMEOUT = 5.0
"""Seconds for one page of the daemon."""
DRAIN_TIMEOUT = 35.0
"""Seconds for the daemon to end after SIGTERM; its own `drain_timeout` is 30."""

User = tuple[int, int]
"""uid and gid."""
SAME_USER: User = (-1, -1)


class DemoFailed(Exception):  # noqa: N818 - it is the demo's verdict, not an error of the program
    """Something did not go as it must: the sentence says what."""


def start(
    command: Sequence[str],
    log: Path,
    *,
    user: User = SAME_USER,
    death_signal: signal.Signals = signal.SIGKILL,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command that dies with this process; its output is added to `log`."""
    uid, gid = user
    lifeline = [LIFELINE, os.getpid(), int(death_signal), uid, gid]
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - the demo's own commands
            [sys.executable, "-S", *map(str, lifeline), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            # A variable such as PGSERVICE or PGOPTIONS would change what Postgres's programs and libpq do.
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            start_new_session=True,  # Ctrl-C is for the demo, which then ends its processes in order
        )


def tail(log: Path) -> str:
    """Return the end of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-TAIL_LINES:])


class Daemon:
    """`consumerd run` as a process of its own, as anybody would start it."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._logged_before = 0

    def start(self) -> None:
        """Start it; it listens on a port that the kernel gives it."""
        self._logged_before = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-m", "consumerd", "run", "-c", str(self._config)]
        self._process = start(command, self.log)

    @property
    def address(self) -> str | None:
        """Where its pages are, as it logged at its start."""
        with self.log.open("rb") as log:
            log.seek(self._logged_before)
            for line in log:
                if b'"listen":' in line and line.endswith(b"\n"):
                    return str(json.loads(line)["listen"])
        return None

    def status(self) -> dict[str, Any] | None:
        """Return what /status says of its handlers; None while it does not answer."""
        if (address := self.address) is None:
            return None
        connection = http.client.HTTPConnection(address, timeout=ANSWER_TIMEOUT)
        try:
            connection.request("GET", "/status")
            handlers: dict[str, Any] = json.loads(connection.getresponse().read())["handlers"]
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return handlers

    def check(self) -> None:
        """Raise DemoFailed when the process is gone or a handler has halted."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise DemoFailed(f"the daemon ended by itself, with exit code {code}")
        for name, handler in (self.status() or {}).items():
            if handler["halt"]:
                raise DemoFailed(f"handler {name} halted: {handler['halt']['message']}")

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM; raises DemoFailed unless it drains and ends with exit code 0."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(DRAIN_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the daemon had not ended {DRAIN_TIMEOUT:g} s after SIGTERM") from None
        if code != 0:
            raise DemoFailed(f"the daemon ended with exit code {code} after SIGTERM; 0 was expected")
