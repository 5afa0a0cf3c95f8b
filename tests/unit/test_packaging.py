"""What an installation relies on: pins, hashes, and no address of any index."""

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = ["requirements.txt", "requirements-dev.txt"]
HASHES_AND_SOURCE = r"(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+(?:    #.*\n)+"


def _text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def _pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) ", _text(name), re.MULTILINE))


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in requirements}


def test_a_daemon_beside_another_runs_as_the_first() -> None:
    """`consumerd@NAME` differs from `consumerd` in its config file alone."""
    one, many = (
        [line for line in _text(f"systemd/{name}.service").splitlines() if not line.startswith("#")]
        for name in ("consumerd", "consumerd@")
    )
    assert [line.replace("/consumerd.toml", "/%i.toml").replace("Postgres", "Postgres (%i)") for line in one] == many


@pytest.mark.parametrize("name", FILES)
def test_each_requirement_is_pinned_and_hashed(name: str) -> None:
    """A requirements file is nothing but comments, exact versions and SHA-256 hashes."""
    rest = re.sub(rf"^[a-z0-9-]+==[\w.]+ ; .* \\\n{HASHES_AND_SOURCE}", "", _text(name), flags=re.MULTILINE)
    assert [line for line in rest.splitlines() if not line.startswith("#")] == []


@pytest.mark.parametrize("name", FILES)
def test_no_requirement_names_an_address(name: str) -> None:
    """An installer takes its index from the machine's own configuration, never from a requirements file."""
    assert re.findall(r"://|--\w*index|--find-links|--trusted-host|\b[\w-]+\.(?:org|com|net|io)\b", _text(name)) == []


def test_both_files_agree() -> None:
    """What the demo runs is what the tests ran: one version of each package."""
    runtime, development = _pins("requirements.txt"), _pins("requirements-dev.txt")
    assert runtime == {name: development.get(name) for name in runtime}


def test_requirements_cover_the_project() -> None:
    """Every dependency that pyproject.toml declares is locked: the demo's in requirements.txt, all in the other."""
    extras = PROJECT["optional-dependencies"]
    needed = _names(PROJECT["dependencies"] + extras["demo"])
    assert needed - _pins("requirements.txt").keys() == set()
    every = needed.union(*map(_names, extras.values())) - {PROJECT["name"]}
    assert every - _pins("requirements-dev.txt").keys() == set()
