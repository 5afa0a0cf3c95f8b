"""What systemd hears of the daemon, over its own socket."""

import asyncio
import faulthandler
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from consumerd.accumulator import Bounds
from consumerd.errors import Halt
from consumerd.kafka import REJOIN_PAUSE, ConsumerThread, Listener
from consumerd.member import Member
from consumerd.progress import Progress
from consumerd.systemd import Service, sentence
from consumerd.types import TopicPartition


class Manager:
    """The socket that systemd listens on."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": address}

    def heard(self) -> list[list[str]]:
        """Return the datagrams since the last look, by their lines."""
        datagrams = []
        with suppress(BlockingIOError):
            while True:
                datagrams.append(self._socket.recv(65536).decode().split("\n"))
        return datagrams

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Listen as systemd does."""
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


def member(name: str = "orders", *, stuck: float = 0.0) -> Member:
    """Return what a service looks at of a handler; a name of its own has metrics of its own."""
    stub = SimpleNamespace(handler=SimpleNamespace(name=name), progress=Progress(name), unwritten=dict)
    stub.stuck_for = lambda _: stuck
    return cast("Member", stub)


def set_stuck(stub: Member, seconds: float) -> None:
    """Change how long a handler's thread has not turned."""
    cast("SimpleNamespace", stub).stuck_for = lambda _: seconds


def told(service: Service, now: float = 0.0) -> None:
    """Have the service look once."""
    service._tell(now)


@pytest.mark.parametrize("address", ["@consumerd-{}", "{}"])
def test_ready_once_all_have_begun(tmp_path: Path, address: str) -> None:
    """READY comes when each handler has joined, waits or is halted, once; a start that lasts asks for more time."""
    place = secrets.token_hex(4) if address.startswith("@") else tmp_path / "socket"
    manager = Manager(address.format(place))
    joins, waits, halts = member("joins"), member("waits"), member("halts")
    service = Service(lambda: [joins, waits, halts], manager.environ)
    told(service)
    more_time = "EXTEND_TIMEOUT_USEC=30000000"
    starting = "STATUS=0 of 3 handlers running; starting: joins, waits, halts; 0 rows/s, 0 messages behind"
    assert [[more_time, starting]] == manager.heard()
    joins.progress.joined()
    waits.progress.outage("kafka", "no broker", "consumer")
    told(service)
    assert [more_time] == [lines[0] for lines in manager.heard()]
    halts.progress.halt(Halt("table", "no table"))
    told(service)
    status = "1 of 3 handlers running; waiting (kafka): waits; halted (table): halts; 0 rows/s, 0 messages behind"
    assert [["READY=1", f"STATUS={status}"]] == manager.heard()
    told(service)
    assert [] == manager.heard()
    manager.close()


def test_status_tells_rate_and_lag() -> None:
    """STATUS has the rows/s and the lag of all handlers together, and names a few of many in the same state."""
    lags = member("lags")
    lags.progress.joined()
    partition = TopicPartition("orders", 0)
    lags.progress.leased(partition, 10)
    lags.progress.watermarks({partition: 30})
    lags.progress._writes.add(time.monotonic(), partition, rows=500, messages=500, seconds=0.1)
    assert sentence([lags]) == "1 of 1 handlers running; 50 rows/s, 20 messages (0 s) behind"
    others = [member(f"h{number}") for number in range(5)]
    assert sentence(others).startswith("0 of 5 handlers running; starting: h0, h1, h2 and 2 more; 0 rows/s")


def test_watchdog_is_fed_while_all_threads_turn(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    """WATCHDOG comes at each look, until a Kafka thread has not turned for a watchdog's time; the log names it once."""
    good, bad = member("good"), member("bad", stuck=60.0)
    service = Service(lambda: [good, bad], manager.environ | {"WATCHDOG_USEC": "60000000"})
    told(service)
    told(service)
    assert [True, True] == ["WATCHDOG=1" in lines for lines in manager.heard()]
    set_stuck(bad, 60.1)
    with caplog.at_level(logging.ERROR):
        told(service)
        told(service)
    assert not any("WATCHDOG=1" in lines for lines in manager.heard())
    assert ["bad"] == [record.__dict__["handler"] for record in caplog.records]
    set_stuck(bad, 0.0)
    told(service)
    assert any("WATCHDOG=1" in lines for lines in manager.heard())


@pytest.mark.parametrize(
    ("environ", "fed"), [({}, False), ({"WATCHDOG_PID": "1"}, False), ({"WATCHDOG_PID": str(os.getpid())}, True)]
)
def test_watchdog_of_this_process_alone(manager: Manager, environ: dict[str, str], fed: bool) -> None:
    """No watchdog, or one that is meant for another process, is not fed."""
    usec = {"WATCHDOG_USEC": "60000000"} if environ else {}
    told(Service(lambda: [member()], manager.environ | usec | environ))
    assert [fed] == ["WATCHDOG=1" in lines for lines in manager.heard()]


async def test_looks_at_half_of_the_watchdogs_time(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all have begun there is a look at half of WATCHDOG_USEC, and each five seconds where that is longer."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    one = member()
    for usec in ("3000000", "60000000"):
        one.progress.ready = not slept
        service = Service(lambda: [one], manager.environ | {"WATCHDOG_USEC": usec})
        one.progress.ready = True
        with pytest.raises(asyncio.CancelledError):
            await service.run()
        assert [1.5, 1.5] == slept if usec == "3000000" else [5.0, 5.0] == slept
        slept.clear()
    faulthandler.disable()


async def test_nothing_happens_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NOTIFY_SOCKET no socket is made, nobody looks at the handlers, and the task ends at once."""
    monkeypatch.setattr(socket, "socket", None)
    service = Service(lambda: pytest.fail("looked"), {"WATCHDOG_USEC": "60000000"})
    await service.run()
    service.stopping(30)
    with service.reloading():
        pass


def test_a_lost_datagram_is_said_again(manager: Manager) -> None:
    """Nobody waits for systemd: what could not be sent is said at the next look."""
    one = member()
    one.progress.joined()
    service = Service(lambda: [one], manager.environ)
    place = Path(manager.environ["NOTIFY_SOCKET"])
    away = place.rename(place.with_name("away"))
    told(service)
    away.rename(place)
    assert [] == manager.heard()
    told(service)
    assert [["READY=1", "STATUS=1 of 1 handlers running; 0 rows/s, 0 messages behind"]] == manager.heard()


def test_reload_and_stop(manager: Manager) -> None:
    """A reload is between RELOADING, with its time, and READY, also when it fails; a stop asks for its drain's time."""
    one = member()
    service = Service(lambda: [one], manager.environ)
    with service.reloading():
        assert [] == manager.heard()  # systemd takes no reload of what has not begun
    assert [] == manager.heard()
    one.progress.joined()
    told(service)
    manager.heard()
    with suppress(RuntimeError), service.reloading():
        ((reloading, since),) = manager.heard()
        raise RuntimeError
    assert ("RELOADING=1", "MONOTONIC_USEC=") == (reloading, since.rstrip("0123456789"))
    assert [["READY=1"]] == manager.heard()
    service.stopping(30.0)
    assert [["STOPPING=1", "EXTEND_TIMEOUT_USEC=45000000"]] == manager.heard()


async def test_what_a_thread_waits_for_on_purpose_is_no_hang() -> None:
    """A thread is stuck from its last turn on; not while it waits to join again, and not when it closes."""
    bounds = Bounds(max_messages=1000, max_bytes=1 << 20, max_age=0.5)
    thread = ConsumerThread({}, ["t"], cast("Listener", None), "t", bounds)
    turned = thread._turned
    assert 7.0 == pytest.approx(thread.stuck_for(turned + 7))
    thread._stopping.set()  # the wait ends at once
    thread._pause_before_the_next()
    thread._closing.clear()
    assert thread.stuck_for(thread._turned) == 0.0
    assert thread._turned >= turned + REJOIN_PAUSE
    thread._closing.set()
    assert thread.stuck_for(turned + 1000) == 0.0
