"""One process of the harness: it dies with pytest, keeps its log in a file, and is asked whether it is ready."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

LIFELINE = Path(__file__).with_name("lifeline.py")
POLL_INTERVAL = 0.02  # seconds between two questions: far below what any server here needs to start
LOG_TAIL = 4_000  # characters of a log that an error shows
LOWEST_PORT = 20_000  # below are the ports that people give to services

_ports_given: set[int] = set()


class MissingPart(Exception):  # noqa: N818 - it names what the machine lacks, and the sentence says how to get it
    """Something that the tests need is not installed."""


def free_port() -> int:
    """Return a free TCP port on loopback, outside the range that the kernel gives to outgoing connections.

    Inside that range a client that reconnects to a stopped server's port can be given that very port as its own, is
    then connected to itself, and keeps the server from coming back.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = random.randrange(LOWEST_PORT, max(ephemeral, LOWEST_PORT + 1_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Return once ``condition`` holds; raise TimeoutError naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(POLL_INTERVAL)


class Process:
    """A started command. ``death_signal`` is what the kernel sends it should pytest be gone."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: str = "-",
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.log = log
        lifeline = [sys.executable, "-S", str(LIFELINE), str(os.getpid()), str(int(death_signal)), user]
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [*lifeline, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=env,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops its servers in order
            )
        self.pid = self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._popen.poll() is None

    def wait_ready(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait until ``ready``; a process that ends or does not get there raises with the end of its log."""

        def ready_or_gone() -> bool:
            return not self.running or ready()

        try:
            wait_until(ready_or_gone, timeout, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log_tail()}") from None
        if not self.running:
            raise RuntimeError(f"{what}: ended with exit status {self._popen.returncode}\n{self.log_tail()}")

    def stop(self, timeout: float, signal_number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop and return its exit status (negative: the signal that ended it)."""
        if self.running:
            self._popen.send_signal(signal_number)
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(
                f"{self.log.name}: still there {timeout:g} s after a signal\n{self.log_tail()}"
            ) from None

    def kill(self) -> None:
        """SIGKILL, to this one process, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def kill_group(self) -> None:
        """SIGKILL to it and to whatever it started in its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def wait(self, timeout: float) -> int:
        """Wait for it to end by itself and return its exit status."""
        return self._popen.wait(timeout)

    def log_tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
