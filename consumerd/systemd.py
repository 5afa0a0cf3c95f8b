"""What systemd is told (sd_notify(3)), and how it learns of a hang. Without $NOTIFY_SOCKET nothing of this happens.

`READY=1` comes once each handler has joined its group, waits for something, or is halted: a daemon without a broker is
one that runs. `WATCHDOG=1` comes from the event loop, so it stops when that does, and only while each handler's Kafka
thread has turned within one watchdog's time; that is far above all that a thread waits for on purpose (a revoke six
seconds, a broker's answer five). A long transform is neither: it has a deadline of its own.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from consumerd.progress import total_lag

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from consumerd.member import Member

log = logging.getLogger(__name__)

START_INTERVAL: Final = 0.2
"""Seconds between two looks whether all have begun."""
STATUS_INTERVAL: Final = 5.0
"""Seconds between two looks at rate and lag."""
START_TIMEOUT: Final = 30
"""Seconds that systemd gives a start whose loop turns, again and again: a transform may take long to be imported."""
LEAVE: Final = 15
"""Seconds for last commits and for closing, on top of `drain_timeout`."""
NAMED: Final = 3
"""Handlers in one state that are named; of more the rest is counted."""


class Service:
    """The daemon as a unit of systemd's; `members` gives the handlers as they are now."""

    def __init__(self, members: Callable[[], Collection[Member]], environ: Mapping[str, str] = os.environ) -> None:
        self._members = members
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = int(environ.get("WATCHDOG_USEC", "0")) / 1e6 if ours else 0.0
        self._ready = False
        self._status = ""
        self._stuck: set[str] = set()

    async def run(self) -> None:
        """Tell how the daemon is, until cancelled."""
        if not self._address:
            return
        interval = STATUS_INTERVAL
        if self._watchdog:
            interval = min(interval, self._watchdog / 2)
            faulthandler.enable()  # systemd ends what hangs by SIGABRT: where each thread stands goes into the log
        while True:
            self._tell(time.monotonic())
            await asyncio.sleep(interval if self._ready else START_INTERVAL)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Have systemd wait for a reload's end."""
        if self._ready:
            self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self._ready:
                self._notify("READY=1")

    def stopping(self, drain_timeout: float) -> None:
        """Have systemd wait for the drain, whatever TimeoutStopSec says."""
        self._notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((drain_timeout + LEAVE) * 1e6)}")

    def _tell(self, now: float) -> None:
        """Say in one datagram what is new."""
        lines = []
        if not self._ready:
            begun = all(member.progress.ready or member.progress.state != "starting" for member in self._members())
            lines.append("READY=1" if begun else f"EXTEND_TIMEOUT_USEC={START_TIMEOUT * 1_000_000}")
        status = sentence(self._members())
        if status != self._status:
            lines.append(f"STATUS={status}")
        if self._watchdog and self._all_turn(now):
            lines.append("WATCHDOG=1")
        if lines and self._notify(*lines):  # else all of it is said again
            self._ready = self._ready or "READY=1" in lines
            self._status = status

    def _all_turn(self, now: float) -> bool:
        """Whether no handler's Kafka thread hangs; a line for one that does."""
        stuck = {member.handler.name: member.stuck_for(now) for member in self._members()}
        stuck = {name: seconds for name, seconds in stuck.items() if seconds > self._watchdog}
        for name in stuck.keys() - self._stuck:
            extra = {"handler": name, "seconds": round(stuck[name], 1)}
            log.error("the Kafka thread hangs: systemd is left to restart this process", extra=extra)
        self._stuck = set(stuck)
        return not stuck

    def _notify(self, *lines: str) -> bool:
        """Send one datagram; False when it did not go, for nobody waits for systemd here."""
        if not self._address:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                return False
        return True


def sentence(members: Collection[Member]) -> str:
    """Return how the handlers are: `1 of 2 handlers running; halted (table): a; 1200 rows/s, 0 messages behind`."""
    others: dict[str, list[str]] = {}
    for member in members:
        progress = member.progress
        cause = progress.halted.reason if progress.halted else ", ".join(progress.waiting_for())
        if progress.state != "running":
            others.setdefault(f"{progress.state} ({cause})" if cause else progress.state, []).append(
                member.handler.name
            )
    running = len(members) - sum(map(len, others.values()))
    lags = [lag for member in members for lag in member.progress.lag(member.unwritten()).values()]
    messages, seconds = total_lag(lags)
    age = f" ({seconds:.0f} s)" if messages else ""
    return "; ".join(
        [
            f"{running} of {len(members)} handlers running",
            *(f"{state}: {_some(names)}" for state, names in others.items()),
            f"{sum(member.progress.rate() for member in members):.0f} rows/s, {messages} messages{age} behind",
        ]
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
