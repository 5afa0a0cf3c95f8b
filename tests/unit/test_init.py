"""What `consumerd init` says before it looks at anything, and what it makes of a table's name."""

import json
from pathlib import Path

import pytest

from consumerd.commands.infer import observe
from consumerd.commands.init import _made, propose
from consumerd.errors import ConfigError
from consumerd.loader import load


@pytest.mark.parametrize(
    ("table", "name", "words"),
    [
        ("bad name; drop", None, "bad name; drop: no handler can have this name: give it another with --name"),
        ("orders", "../../evil", "../../evil: no handler can have this name: give it another with --name"),
        ("raw.${topic}", None, "raw.${topic}: init looks at one table; name that of orders"),
        ("weird.table.name", None, 'weird.table.name: TABLE must be "table" or "schema.table"'),
    ],
)
async def test_names_that_cannot_be(tmp_path: Path, table: str, name: str | None, words: str) -> None:
    """A handler or a table that cannot have its name is one sentence with the way on; no server is asked."""
    config = '[kafka]\nbootstrap_servers = "127.0.0.1:1"\n[postgres]\ndsn = "host=127.0.0.1 port=1"\n'
    (tmp_path / "consumerd.toml").write_text(config)
    loaded = load(tmp_path / "consumerd.toml", environ={}, first=True)
    with pytest.raises(ConfigError) as raised:
        await propose(loaded, "orders", table, key=(), name=name, count=10)
    (sentence,) = raised.value.problems
    assert sentence.startswith(words)


def test_a_table_with_a_quoted_name() -> None:
    """What is quoted is taken as it is, dots included, the rest in lower case; fields without a place are counted."""
    sample = observe([json.dumps({"id": 1, "a\nb": 2, "c\\d": 3}).encode()])
    lines, make = _made('Raw."ev.Alpha"', sample, ())
    assert make.startswith(
        'CREATE SCHEMA IF NOT EXISTS "raw";\nCREATE TABLE "raw"."ev.Alpha" (\n    "id" bigint NOT NULL'
    )
    assert lines[-1].startswith("# Fields that go nowhere: 2 whose names")
