"""What the docs state about the code is so."""

import re
from importlib import import_module
from typing import get_args

from consumerd.errors import HaltReason, PoisonReason
from tests.servers.daemon import REPOSITORY

DESIGN = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
FAILURES = (REPOSITORY / "docs" / "failures.md").read_text(encoding="utf-8")
VALUES = (REPOSITORY / "docs" / "values.md").read_text(encoding="utf-8")


def test_each_reason_is_explained() -> None:
    """docs/values.md explains each reason of a dead letter, and no other."""
    table = VALUES.partition("| reason | what it means |")[2]
    assert set(get_args(PoisonReason)) == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_each_halt_is_explained() -> None:
    """docs/failures.md explains each reason of a halt, and no other."""
    table = FAILURES.partition("| reason | when |")[2]
    assert set(get_args(HaltReason)) == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_each_name_in_the_design_is_in_the_code() -> None:
    """Each `file.py: Class.function` of docs/design.md is there."""
    names = re.findall(r"`([\w/]+)\.py: ([\w.]+)`", DESIGN)
    assert len(names) > 10
    for module, path in names:
        found: object = import_module(f"consumerd.{module.replace('/', '.')}")
        for part in path.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_each_file_in_the_design_is_in_the_code() -> None:
    """Each module and folder that docs/design.md names is there, and each module of the package is named."""
    named = set(re.findall(r"`([a-z_/]+\.py|[a-z_]+/)", DESIGN))
    assert [] == [name for name in sorted(named) if not (REPOSITORY / "consumerd" / name).exists()]
    flat = {path.name for path in (REPOSITORY / "consumerd").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert flat <= named
