"""The units that ship: systemd itself reads them, and finds little that a daemon which is taken over could do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from consumerd.config import DaemonConfig
from consumerd.daemon import EXIT_NOT_DRAINED
from tests.servers.daemon import REPOSITORY

UNITS = ("consumerd.service", "consumerd@.service")
MOST_EXPOSED = 1.2
"""Of ten, by `systemd-analyze security`."""


def analyze(*arguments: str) -> str:
    """Run systemd-analyze and return all that it says; skips the test where it is missing."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there: apt-get install systemd")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout + done.stderr


def unit(name: str) -> dict[str, list[str]]:
    """Return a unit's settings."""
    settings: dict[str, list[str]] = {}
    text = (REPOSITORY / "systemd" / name).read_text(encoding="utf-8")
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        settings.setdefault(key, []).append(value)
    return settings


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_no_mistake(name: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say, where the programs are that the unit names."""
    text = (REPOSITORY / "systemd" / name).read_text(encoding="utf-8")
    program = tmp_path / "consumerd"
    program.touch(0o755)
    copy = tmp_path / name.replace("@", "@warehouse")
    copy.write_text(text.replace("/opt/consumerd/current/bin/consumerd", str(program)), encoding="utf-8")
    assert "" == analyze("verify", "--man=no", "--recursive-errors=no", str(copy))


@pytest.mark.parametrize("name", UNITS)
def test_little_is_exposed(name: str) -> None:
    """The sandbox is as tight as the network that it needs allows, and leaves /proc/stat to the metrics."""
    said = analyze("security", "--offline=true", "--no-pager", str(REPOSITORY / "systemd" / name))
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert float(exposure) <= MOST_EXPOSED
    assert "ProcSubset" not in unit(name)


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_fits_the_daemon(name: str) -> None:
    """It is told of readiness by the daemon alone, waits for the drain, and knows its exit statuses."""
    settings = {key: values[-1] for key, values in unit(name).items()}
    assert ("notify", "main", "mixed") == (settings["Type"], settings["NotifyAccess"], settings["KillMode"])
    assert float(settings["TimeoutStopSec"]) >= DaemonConfig().drain_timeout + 10
    assert (str(EXIT_NOT_DRAINED), "78") == (settings["SuccessExitStatus"], settings["RestartPreventExitStatus"])
    assert "ExecStop" not in settings
