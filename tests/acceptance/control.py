"""What the tests of a daemon's commands share: one that listens at a control socket, and what is typed beside it."""

import re
import shlex
import subprocess

from tests.servers.daemon import Daemon, consumerd

CONTROL = {"daemon": {"control": "control.sock"}}
"""Each daemon of a test has a folder of its own."""


def command(run: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command beside a daemon."""
    return consumerd(*arguments, "-c", str(run.config), cwd=run.config.parent)


def done(run: Daemon, *arguments: str) -> str:
    """Run a command that succeeds; return what it says."""
    ended = command(run, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refused(run: Daemon, *arguments: str, code: int = 1) -> str:
    """Run a command that does not; return its sentence."""
    ended = command(run, *arguments)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    return ended.stderr


def typed(run: Daemon, sentence: str, verb: str = "resume") -> subprocess.CompletedProcess[str]:
    """Type the command that a halt names, as it stands there."""
    line = re.findall(rf"consumerd {verb} .*?(?=; |$)", sentence)[0]
    return consumerd(*shlex.split(line)[1:], cwd=run.config.parent)
