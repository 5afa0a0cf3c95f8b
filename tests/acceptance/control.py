"""What the tests of a daemon's commands share: one that listens at a control socket, and what is typed beside it."""

import re
import shlex
from typing import Any

from typer.testing import CliRunner, Result

from consumerd.cli import app
from tests.acceptance.halts import handler
from tests.servers.daemon import Daemon

CONTROL = {"daemon": {"control": "control.sock"}}
"""Each daemon of a test has a folder of its own."""


def apart(topic: str, table: str, /, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - TOML
    """Return a handler whose group and dead letters no other test of the session has."""
    return handler(topic, table, **{"group_id": f"{topic}.{table}", **more})


def command(run: Daemon, *arguments: str) -> Result:
    """Run a command beside a daemon, in this process: Python's start is longer than most commands."""
    return CliRunner().invoke(app, [*arguments, "-c", str(run.config)])


def done(run: Daemon, *arguments: str) -> str:
    """Run a command that succeeds; return what it says."""
    ended = command(run, *arguments)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def refused(run: Daemon, *arguments: str, code: int = 1) -> str:
    """Run a command that does not; return its sentence."""
    ended = command(run, *arguments)
    assert ended.exit_code == code, ended.output
    return ended.stderr


def typed(sentence: str) -> Result:
    """Type the way on that a halt names, as it stands there."""
    line = re.findall(r"consumerd resume .*?(?=; |$)", sentence)[0]
    return CliRunner().invoke(app, shlex.split(line)[1:])
