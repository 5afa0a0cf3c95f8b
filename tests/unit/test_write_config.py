"""The keys of [table] that say how rows are written: what goes together, and the sentence for what does not."""

from typing import Any

import pytest

from consumerd.config import HandlerConfig, PoisonConfig, TableConfig
from tests.unit.test_config import HANDLER, from_toml, mistakes

UPSERT: dict[str, Any] = {"name": "t", "write": "upsert", "key": ["id"]}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"name": "t", "write": "skip-existing"}, (None, None, "ignore", {})),
        (UPSERT, (None, None, "ignore", {})),
        (UPSERT | {"update": ["a", "b"]}, (("a", "b"), None, "ignore", {})),
        (UPSERT | {"update": ["a", "v"], "version": "v"}, (("a", "v"), "v", "ignore", {})),
        (UPSERT | {"version": "v", "tombstones": "dead-letter"}, (None, "v", "dead-letter", {})),
        (
            UPSERT | {"tombstones": "delete", "tombstone_key": {"id": "@key.a.b"}},
            (None, None, "delete", {"id": "@key.a.b"}),
        ),
    ],
)
def test_what_goes_together(table: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """Each key is taken as it is; without them all columns change, whatever the version, and tombstones are ignored."""
    it = from_toml(TableConfig, table)
    assert (it.update, it.version, it.tombstones, it.tombstone_key) == expected


@pytest.mark.parametrize(
    ("more", "key", "words"),
    [
        ({"update": []}, "update", "is empty: leave it out"),
        ({"update": ["a", "a"]}, "update", "names the same twice"),
        ({"update": ["a", "id"]}, "update", "names id, which is in table.key"),
        ({"version": "id"}, "version", "names id, which is in table.key"),
        ({"update": ["a"], "version": "v"}, "version", "is not in table.update"),
        ({"version": ""}, "version", "must be a name"),
        ({"tombstones": "drop"}, "tombstones", ""),
        ({"tombstones": "delete"}, "tombstone_key", 'write { id = "@key" }'),
        ({"tombstones": "delete", "tombstone_key": {"a": "@key"}}, "tombstone_key", 'write { id = "@key" }'),
        (
            {"key": ["a", "b"], "tombstones": "delete", "tombstone_key": {"a": "@key"}},
            "tombstone_key",
            'write { a = "@key.a", b = "@key.b" }',
        ),
        ({"tombstone_key": {"id": "@key"}}, "tombstone_key", 'goes with tombstones = "delete" alone'),
        ({"tombstones": "delete", "tombstone_key": {"id": "id"}}, "tombstone_key.id", 'must be "@key"'),
        ({"tombstones": "delete", "tombstone_key": {"id": "@key."}}, "tombstone_key.id", 'must be "@key"'),
        ({"tombstones": "delete", "tombstone_key": {"id": "@keys"}}, "tombstone_key.id", 'must be "@key"'),
    ],
)
def test_what_does_not_go_with_upsert(more: dict[str, Any], key: str, words: str) -> None:
    """What contradicts itself is one sentence at its key, with what to write."""
    ((found, sentence),) = mistakes(TableConfig, UPSERT | more).items()
    assert found == key
    assert words in sentence


@pytest.mark.parametrize("write", ["append", "skip-existing"])
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("update", ["a"], "changes no row"),
        ("version", "v", "changes no row"),
        ("tombstones", "delete", "deletes no row"),
        ("key", ["id"], 'take it out, or write = "upsert"'),
    ],
)
def test_what_goes_with_upsert_alone(write: str, key: str, value: object, words: str) -> None:
    """Where no row is ever changed, nothing says how."""
    found = mistakes(TableConfig, {"name": "t", "write": write, key: value})
    assert words in found[key]
    assert list(found) == [key] if key != "tombstones" else key in found


@pytest.mark.parametrize(("key", "value"), [("update", ["a", "v"]), ("version", "v")])
def test_they_are_among_the_columns(key: str, value: object) -> None:
    """A column that is named and that nothing writes is a mistake of the file."""
    found = mistakes(HandlerConfig, {**HANDLER, "table": UPSERT | {key: value}, "columns": {"id": "id", "a": "a"}})
    assert found == {"columns": f"lacks v, which table.{key} names"}


def test_a_path_into_the_key_needs_json() -> None:
    """A key that is bytes or text has nothing within."""
    table = UPSERT | {"tombstones": "delete", "tombstone_key": {"id": "@key.id"}}
    found = mistakes(HandlerConfig, {**HANDLER, "table": table})
    assert 'key_format = "json"' in found["table"]
    assert mistakes(HandlerConfig, {**HANDLER, "table": table, "key_format": "text"}) == found
    assert from_toml(HandlerConfig, {**HANDLER, "table": table, "key_format": "json"}).key_format == "json"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (UPSERT, "upsert without `version`"),
        (UPSERT | {"version": "v", "tombstones": "delete", "tombstone_key": {"id": "@key"}}, "bring back"),
        (UPSERT | {"version": "v"}, None),
        ({"name": "t", "write": "skip-existing"}, None),
    ],
)
def test_at_least_once(table: dict[str, Any], words: str | None) -> None:
    """Where a batch may be repeated, only what a repeat does not undo is written."""
    data = {**HANDLER, "checkpoint": "kafka", "table": table}
    if words is None:
        assert from_toml(HandlerConfig, data).checkpoint == "kafka"
    else:
        assert words in mistakes(HandlerConfig, data)["table"]


def test_actions() -> None:
    """Poison goes to the dead-letter topic unless another action is written."""
    assert [from_toml(PoisonConfig, {"action": action}).action for action in ("skip", "halt")] == ["skip", "halt"]
    assert from_toml(PoisonConfig, {}).action == "dead-letter"
    assert list(mistakes(PoisonConfig, {"action": "drop"})) == ["action"]
