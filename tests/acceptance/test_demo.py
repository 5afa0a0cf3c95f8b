"""`consumerd demo`, whole, as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.process import wait_until

pytest.importorskip("rich", reason="the demo's extra is not installed: pip install 'consumerd[demo]'")

DEMO = [sys.executable, "-m", "consumerd", "demo"]
REPOSITORY = Path(__file__).parents[2]
DEMO_TIMEOUT = 110  # seconds: it takes 15 on two idle cores
END_TIMEOUT = 60  # seconds to clean up


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give the demo a temporary folder of its own, with a name short enough for a socket; it must leave it empty."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        Path(name).chmod(0o711)  # as root Postgres runs as another user
        yield Path(name)
        assert list(Path(name).iterdir()) == []
        assert _processes_in(name) == []


def test_demo(folder: Path) -> None:
    """It ends with `lost 0, doubled 0` and exit status 0, and leaves nothing running or lying about."""
    done = subprocess.run(
        DEMO,
        cwd=REPOSITORY,
        env=_environment(folder),
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0, doubled 0" in done.stdout.splitlines()
    assert re.search(r"Killed it by SIGKILL with [\d,]+ of 400,000 messages settled", done.stdout)
    assert re.search(r"produced +│ +200,000 │ +200,000", done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle(folder: Path, number: signal.Signals, code: int) -> None:
    """A signal ends it at any time, and it cleans up."""
    with (folder.with_suffix(".log")).open("wb") as output:
        demo = subprocess.Popen(DEMO, cwd=REPOSITORY, env=_environment(folder), stdout=output, stderr=output)
    try:
        wait_until(lambda: bool(list(folder.glob("*/consumerd.log"))), DEMO_TIMEOUT, "the demo's daemon")
        demo.send_signal(number)
        assert demo.wait(END_TIMEOUT) == code
    finally:
        demo.kill()
        folder.with_suffix(".log").unlink()


def test_broker_hears_no_signal() -> None:
    """None of its threads takes a signal: one that did would end, and `close` would wait for it for ever."""
    from consumerd.commands.demo_parts.broker import Broker

    before = set(Path("/proc/self/task").iterdir())
    broker = Broker({"orders": 1})
    begun = set(Path("/proc/self/task").iterdir()) - before
    blocked = [re.search(r"SigBlk:\s+(\w+)", (task / "status").read_text()) for task in begun]
    broker.close()
    stops = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    assert begun
    assert [int(mask[1], 16) & stops if mask else 0 for mask in blocked] == [stops] * len(begun)


def test_keep(folder: Path) -> None:
    """With --keep everything is left running, and what is printed reaches it, until Ctrl-C."""
    demo = subprocess.Popen(
        [*DEMO, "--keep"], cwd=REPOSITORY, env=_environment(folder), stdout=subprocess.PIPE, text=True
    )
    try:
        assert demo.stdout is not None
        printed = ""
        for line in demo.stdout:
            printed += line
            if line.startswith("Ctrl-C"):
                break
        found = {name: re.search(rf"^  {name} +(.+?)(    |$)", printed, re.MULTILINE) for name in ("tables", "status")}
        psql, status = (match[1] if match else "" for match in found.values())
        counted = subprocess.run(
            [*psql.split(), "-tAc", "select count(*) from orders"], capture_output=True, text=True, check=False
        )
        assert counted.stdout == "197500\n", printed + counted.stderr
        assert '"state": "running"' in _fetch(status)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(END_TIMEOUT) == 0
    finally:
        demo.kill()


def _fetch(address: str) -> str:
    from urllib.request import urlopen

    with urlopen(address, timeout=END_TIMEOUT) as answer:  # noqa: S310 - the demo's own address
        return str(answer.read().decode())


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}


def _processes_in(name: str) -> list[str]:
    """Return the command lines of processes that name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if name in line:
            found.append(line)
    return found
