"""`consumerd status` and the page at /: how a daemon does, and after a halt what to type."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from consumerd.cli import app
from tests.acceptance.halts import TIMEOUT, expect_halt, expect_rows, handler, make_tables, send
from tests.conftest import MakeDaemon, MakeTopic
from tests.servers.browser import chromium, dom
from tests.servers.daemon import REPOSITORY, Daemon
from tests.servers.kafka import KafkaServer
from tests.servers.process import free_port, wait_until

SENTENCE_WIDTH = 80


@pytest.fixture
def run(kafka: KafkaServer, database: str, topic: MakeTopic, daemon: MakeDaemon) -> Daemon:
    """Run a handler that has written ten rows, and one that has halted for its dead-letter topic."""
    name = topic(2)
    make_tables(database, "runs", "halts")
    handlers = {"runs": handler(name, "runs"), "halts": handler(name, "halts", dead_letter={"topic": f"{name}.gone"})}
    run = daemon(handlers, wait=False)
    expect_halt(run, "halts")
    send(kafka, name)
    expect_rows(database, "runs")
    wait_until(lambda: run.status()["handlers"]["runs"]["written"] == 10, TIMEOUT, "the rows in /status")
    return run


def halt_commands(run: Daemon) -> list[str]:
    """Return what the halt names to be typed: what makes the topic, and what has the handler, or its file, taken up."""
    found: list[str] = run.status()["handlers"]["halts"]["halt"]["commands"]
    make, *others = found
    assert make.startswith("kafka-topics --create --topic ")
    assert others == [f"consumerd restart halts -c {run.config}", f"consumerd reload -c {run.config}"]
    return found


def status(run: Daemon, *arguments: str) -> tuple[int, str]:
    """Return the exit status and what was printed."""
    result = CliRunner().invoke(app, ["status", "-c", str(run.config), *arguments])
    return result.exit_code, result.output


def test_status_tells_how_each_handler_does(run: Daemon) -> None:
    """Within 80 columns, the halt's command whole; one handler alone; JSON; one sentence where no daemon answers."""
    (run.config.parent / "handlers" / "halts.toml").write_text("a mistake that somebody makes meanwhile")
    commands = halt_commands(run)

    code, text = status(run)
    lines = text.splitlines()
    assert (code, lines[0].partition(", up")[0]) == (0, f"consumerd 0.1.0, process {run.process.pid}")
    assert {tuple(line.split()[:3]) for line in lines[3:5]} == {("runs", "running", "2"), ("halts", "HALTED", "0")}
    assert [line[4:] for line in lines if line.startswith("    ")] == commands
    assert [
        line for line in lines if len(line) > SENTENCE_WIDTH and " " in line.strip() and line[4:] not in commands
    ] == []

    code, text = status(run, "runs")
    assert (code, "halts" in text) == (0, False)
    assert "consumed 10, written 10 rows since the start" in text

    code, text = status(run, "halts", "-o", "json")
    answer = json.loads(text)
    assert (code, list(answer["handlers"])) == (0, ["halts"])
    assert answer["handlers"]["halts"]["halt"] == run.status()["handlers"]["halts"]["halt"]

    assert status(run, "other") == (2, "the daemon runs no handler other; it runs: halts, runs\n")

    run.kill()
    refused = f"no daemon answers at {run.listen} (daemon.listen): Connection refused; start it with `consumerd run`\n"
    assert status(run) == (1, refused)


def test_what_is_not_the_daemon_is_told_from_it(tmp_path: Path) -> None:
    """Where something else answers, that is said in one sentence, and the exit status is 1."""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as other:
        config = tmp_path / "consumerd.toml"
        config.write_text(f'[daemon]\nlisten = "127.0.0.1:{port}"\n', encoding="utf-8")
        result = CliRunner()
        wait_until(
            lambda: "refused" not in result.invoke(app, ["status", "-c", str(config)]).output, TIMEOUT, "the server"
        )
        answer = result.invoke(app, ["status", "-c", str(config)])
        other.kill()
    sentence = f"what answers at 127.0.0.1:{port} (daemon.listen) is not consumerd\n"
    assert (answer.exit_code, answer.output) == (1, sentence)


def test_watch_goes_on_until_ctrl_c(run: Daemon) -> None:
    """On a terminal each look is drawn over the last, elsewhere it is lines; Ctrl-C ends both without a word."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "consumerd", "status", "--watch", "-c", str(run.config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    os.set_blocking(master, False)
    shown = ""

    def drawn(times: int) -> bool:
        nonlocal shown
        with suppress(BlockingIOError, OSError):
            shown += os.read(master, 65_536).decode()
        return shown.count("\x1b[Hconsumerd 0.1.0") >= times

    try:
        wait_until(lambda: drawn(2), TIMEOUT, "the second look")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0
        drawn(0)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert shown.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert shown.endswith("\x1b[J\x1b[?25h\x1b[?1049l")

    follower = subprocess.Popen(
        [*command, "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert follower.stdout is not None
    assert " runs running, 2 partitions, lag 0 messages (0 s)" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    rest, errors = follower.communicate(timeout=TIMEOUT)
    assert (follower.returncode, errors) == (0, "")
    assert "\x1b" not in rest


def test_the_page_shows_a_halt_with_its_command(run: Daemon, tmp_path: Path) -> None:
    """In a browser, after its script ran, the page has each handler, and the halt's command to be copied."""
    chromium()
    commands = halt_commands(run)
    for width in (400, 1200):
        picture = tmp_path / f"{width}.png"
        page = dom(f"http://{run.listen}/", width=width, picture=picture)
        first, second = page.texts("h2")
        assert first.startswith("halts halted for ")
        assert second.startswith("runs running for ")
        assert page.texts("code") == commands
        assert page.texts("div", "said")[0].startswith("Halted (dead_letter): dead-letter topic ")
        assert ("Rows written", "10") in zip(page.texts("dt"), page.texts("dd"), strict=True)
        assert int.from_bytes(picture.read_bytes()[16:20], "big") == width
