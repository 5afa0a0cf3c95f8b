"""The daemon as a service: what it tells whoever has started it, and a stop that comes early."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.acceptance.events import MakeEvents
from tests.acceptance.test_stop import handler
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.daemon import REPOSITORY, write_config
from tests.servers.process import Process, free_port, wait_until
from tests.servers.sql import locked

TIMEOUT = 30  # seconds for anything that a test waits for
NOWHERE = {"kafka": {"bootstrap_servers": "127.0.0.1:1"}, "postgres": {"dsn": "host=127.0.0.1 port=1 user=nobody"}}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
SLOW_IMPORT = """\
import sys, time
from consumerd.__main__ import main

class Slow:
    def find_spec(self, name, *_):
        if name == "consumerd.cli":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
main()
"""
"""`consumerd run` on a machine whose disk is asleep."""


class Manager:
    """What systemd hears, line by line."""

    def __init__(self, address: Path) -> None:
        self.lines: list[str] = []
        self.environ = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "1000000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.settimeout(TIMEOUT)

    def wait_for(self, line: str) -> None:
        """Take datagrams until one has a line."""
        deadline = time.monotonic() + TIMEOUT
        heard: list[str] = []
        while line not in heard:
            assert time.monotonic() < deadline, f"no {line}: {self.lines[-5:]}"
            heard = self._socket.recv(65536).decode().split("\n")
            self.lines += heard


@pytest.fixture
def manager(tmp_path: Path) -> Manager:
    """Listen as systemd does."""
    return Manager(tmp_path / "notify")


def test_systemd_hears_how_it_is(database: str, events: MakeEvents, manager: Manager) -> None:
    """It is ready once it has joined, feeds the watchdog while a write waits for a lock, and says that it stops."""
    made = events(database)
    run = made.make(
        {"events": handler(made.stream.topic) | {"table": {"name": "events", "write": "append"}}},
        {"postgres": {"dsn": database}},
        env=manager.environ,
    )
    manager.wait_for("READY=1")
    with locked(database, "events"):
        made.stream.produce(10)
        for _ in range(5):  # longer than a watchdog's time
            manager.wait_for("WATCHDOG=1")
    wait_until(lambda: run.status()["handlers"]["events"]["written"] > 0, TIMEOUT, "the rows")
    assert 0 == run.stop()
    manager.wait_for("STOPPING=1")
    said = " ".join(manager.lines)
    assert "STATUS=0 of 1 handlers running; starting: events; " in said
    assert "STATUS=1 of 1 handlers running; " in said


def test_a_daemon_that_waits_is_ready(daemon: MakeDaemon, topic: MakeTopic, manager: Manager) -> None:
    """Without its database the unit is up: what it waits for stands in its status, and the watchdog is fed."""
    nowhere = {"postgres": NOWHERE["postgres"]}
    run = daemon({"events": handler(topic())}, nowhere, wait=False, env=manager.environ)
    manager.wait_for("READY=1")
    assert any(line.startswith("STATUS=0 of 1 handlers running; waiting (postgres)") for line in manager.lines)
    manager.wait_for("WATCHDOG=1")
    assert 0 == run.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_imports_is_clean(tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends `run` with status 0 though not a line of the daemon is imported yet."""
    log = tmp_path / "log"
    process = Process([sys.executable, "-c", SLOW_IMPORT, "run"], log, env=ENVIRONMENT)
    wait_until(lambda: "importing" in log.read_text(encoding="utf-8"), TIMEOUT, "the imports")
    assert 0 == process.stop(TIMEOUT, number)


def test_a_stop_during_the_start_is_clean(tmp_path: Path) -> None:
    """A signal ends it with status 0 whatever the start has come to."""
    config = write_config(tmp_path, NOWHERE | {"daemon": {"listen": f"127.0.0.1:{free_port()}"}}, {"t": handler("t")})
    command = [sys.executable, "-m", "consumerd", "run", "-c", str(config)]
    for pause in (0.0, 0.7):
        process = Process(command, tmp_path / "log", env=ENVIRONMENT)
        wait_until(lambda: catches(process), TIMEOUT, "handlers of signals")  # noqa: B023 - used at once
        time.sleep(pause)
        assert (pause, 0) == (pause, process.stop(TIMEOUT))


def catches(process: Process) -> bool:
    """Whether a process has handlers of its own; Python's is for SIGINT alone."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("address", "told"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_port_that_others_reach_is_told(tmp_path: Path, address: str, told: bool) -> None:
    """Where the page is not on loopback alone the log warns of it, once; in a network of its own, for this test."""
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("`unshare` makes no network here: install util-linux, or run where user namespaces are allowed.")
    listen = {"daemon": {"listen": f"{address}:0"}}
    config = write_config(tmp_path, NOWHERE | listen, {"t": handler("nothing")})
    run = Process(
        [*alone, sys.executable, "-m", "consumerd", "run", "-c", str(config)], tmp_path / "log", env=ENVIRONMENT
    )
    run.wait_ready(lambda: "waiting: " in run.log_tail(), TIMEOUT, "consumerd")
    run.kill_group()
    lines = [line for line in run.log_tail().splitlines() if "whoever reaches the port may read /metrics" in line]
    assert told == (len(lines) == 1), lines
    assert not told or '"level":"warning"' in lines[0]
