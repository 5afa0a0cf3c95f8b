"""The peers that are a script of Python: in this environment, or in one of their own with pinned versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.peers.race import BUILD, Job, Peer, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
INSTALL_TIMEOUT = 900
"""Seconds: Pathway brings half a gigabyte."""
THREADS = {"PATHWAY_THREADS": "2"}
"""As many as the machine has cores, as its documentation says."""


def forty_lines() -> Peer:
    """Return what an engineer writes in an afternoon."""
    return Peer(
        name="forty-lines",
        install=lambda: None,
        command=lambda job: [sys.executable, str(HERE / "forty_lines.py"), *job.arguments],
        env=_env(),
    )


def arroyo() -> Peer:
    """Return arroyo with a step that copies."""
    return Peer(
        name="arroyo",
        install=lambda: _install("arroyo"),
        command=lambda job: _run("arroyo", job),
        writes=("append",),
        env=_env(),
    )


def quix() -> Peer:
    """Return Quix Streams with its sink."""
    return Peer(name="quix", install=lambda: _install("quix"), command=lambda job: _run("quix", job), env=_env())


def pathway() -> Peer:
    """Return Pathway."""

    def table(write: str) -> Sequence[str]:
        renamed = "ALTER TABLE {table} RENAME COLUMN id TO key"
        return [renamed, "ALTER TABLE {table} ADD time bigint, ADD diff smallint"] if write == "append" else [renamed]

    return Peer(
        name="pathway",
        install=lambda: _install("pathway"),
        command=lambda job: _run("pathway", job),
        table=table,
        key="key",
        env={**_env(), **THREADS},
    )


def _env() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}


def _run(name: str, job: Job) -> Sequence[str]:
    return [str(BUILD / name / "bin" / "python"), str(HERE / f"with_{name}.py"), *job.arguments]


def _install(name: str) -> None:
    """Make an environment for a peer, unless it is there with the same pins."""
    pins = HERE / f"requirements-{name}.txt"
    folder, done = BUILD / name, BUILD / name / "installed.txt"
    if done.exists() and done.read_bytes() == pins.read_bytes():
        return
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, "-r", str(pins)]):
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=INSTALL_TIMEOUT, check=True)
        except (subprocess.SubprocessError, OSError):
            raise Unavailable("pip did not install it on this Python") from None
    done.write_bytes(pins.read_bytes())
