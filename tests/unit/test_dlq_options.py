"""What is typed behind `consumerd dlq` and cannot be meant."""

import pytest
from typer.testing import CliRunner

from consumerd.cli import app
from consumerd.commands.dlq.survey import Source, moment, source

USAGE = 2


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("list t --status opened", "--status opened: one of open, failed, redriven, discarded"),
        (
            "redrive t --status redriven",
            "--status redriven: those are written already, and are not redriven a second time",
        ),
        ("discard t --status redriven", "--status redriven: those are written already, and are not discarded"),
        ("redrive t --topic x", "--topic goes with --to-topic"),
        ("redrive t --to-topic --into x", "--into is a table, and --to-topic sends to a topic: one of them"),
        (
            "export t --source t:x",
            "t:x: write TOPIC, TOPIC:PARTITION, TOPIC:PARTITION@OFFSET or TOPIC:PARTITION@FROM-TO",
        ),
        ("show t --from soon", "soon: write a time such as 2026-01-31T00:00:00Z"),
    ],
)
def test_mistakes(typed: str, sentence: str) -> None:
    """Each is one sentence and status 2, before any file or server is looked at."""
    done = CliRunner().invoke(app, ["dlq", *typed.split()])
    assert (USAGE, "", f"{sentence}\n") == (done.exit_code, done.stdout, done.stderr)


@pytest.mark.parametrize("given", ["", "t:", "t:0@", "t:0@1-", "t:x", "a b", "t:0@5-2"])
def test_sources_that_are_none(given: str) -> None:
    """What is no topic, partition or range is refused with what may be written."""
    with pytest.raises(ValueError, match=r"write TOPIC, TOPIC:PARTITION"):
        source(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.b-c_d", Source("a.b-c_d")),
        ("t:0", Source("t", 0)),
        ("t:0@7", Source("t", 0, 7)),
        ("t:12@7-9", Source("t", 12, 7, 9)),
        ("t:12@7..9", Source("t", 12, 7, 9)),
    ],
)
def test_sources(given: str, expected: Source) -> None:
    """A topic, one of its partitions, an offset, or a range of them."""
    assert expected == source(given)


def test_times() -> None:
    """A time with a zone is that time; a word is none."""
    assert "2026-01-31T00:00:00+00:00" == moment("2026-01-31T01:00:00+01:00").isoformat()
    with pytest.raises(ValueError, match="soon: write a time such as"):
        moment("soon")
