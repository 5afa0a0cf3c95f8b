"""Every key of the config is changed by some test that sees what it changes: a new key without one is seen here."""

import ast
import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from consumerd import postgres
from consumerd.breaker import Breaker
from consumerd.config import (
    Config,
    DeadLetterConfig,
    HandlerConfig,
    KafkaConfig,
    PoisonConfig,
    PostgresConfig,
    RetryConfig,
)
from consumerd.credentials import Secret
from consumerd.errors import Halt, Outage
from consumerd.loader import load
from consumerd.member import Member
from consumerd.topics import Topics
from tests import reference
from tests.servers.daemon import REPOSITORY
from tests.unit.test_breaker import batch

TESTS: dict[str, str] = {
    "kafka.bootstrap_servers": "acceptance/test_outages.py::test_no_broker_at_the_address",
    "kafka.group_instance_id": "acceptance/test_rebalance.py::test_a_member_that_is_fenced_by_its_own_name_joins_again",
    "kafka.admin": "unit/test_config_keys.py::test_admin",
    "kafka.properties": "unit/test_brokers.py::test_how_long_a_group_waits_for_a_member",
    "postgres.dsn": "acceptance/test_outages.py::test_a_database_that_does_not_exist_is_waited_for",
    "postgres.password": "unit/test_config_keys.py::test_password",
    "postgres.schema": "acceptance/test_config_mistakes.py::test_printed_sql_runs_as_it_is",
    "postgres.settings": "acceptance/test_postgres_slow.py::test_writes_longer_than_statement_timeout_become_smaller",
    "daemon.handlers": "unit/test_config_keys.py::test_handlers",
    "daemon.listen": "acceptance/test_config_mistakes.py::test_a_port_in_use_is_one_sentence",
    "daemon.control": "unit/test_control.py::test_a_socket_is_made_replaced_and_removed",
    "daemon.drain_timeout": "acceptance/test_stop.py::test_a_drain_that_takes_too_long_ends_with_75_and_loses_nothing",
    "daemon.max_buffered": "acceptance/test_stop.py::test_memory_stays_bounded_however_long_the_table_is_locked",
    "log.level": "unit/test_log.py::test_set_up",
    "log.format": "unit/test_log.py::test_set_up",
    "log.heartbeat": "acceptance/test_outside.py::test_the_books_balance_and_no_message_has_a_line",
    "topics": "acceptance/test_halts.py::test_a_mistake_halts_its_handler_alone_and_says_what_to_type",
    "group_id": "acceptance/test_checkpoint_halts.py::test_another_database_or_another_name_halts",
    "start": "acceptance/test_config_keys.py::test_start",
    "key_format": "acceptance/test_mapping.py::test_keys_that_are_text_or_bytes",
    "where": "acceptance/test_mapping.py::test_every_source",
    "checkpoint": "acceptance/test_at_least_once.py::test_a_checkpoint_in_postgres_is_not_forgotten",
    "max_connections": "acceptance/test_config_keys.py::test_max_connections",
    "table.name": "acceptance/test_halts.py::test_a_mistake_halts_its_handler_alone_and_says_what_to_type",
    "table.write": "acceptance/test_bad_input.py::test_good_rows_land_and_bad_ones_are_letters",
    "table.key": "acceptance/test_bad_input.py::test_a_unique_value_that_moves_from_key_to_key",
    "table.update": "integration/test_write_modes.py::test_as_if_one_by_one",
    "table.version": "integration/test_write_modes.py::test_as_if_one_by_one",
    "table.tombstones": "acceptance/test_write_modes.py::test_tombstones",
    "table.tombstone_key": "acceptance/test_write_modes.py::test_tombstones",
    "columns.NAME.from": "acceptance/test_bad_input.py::test_good_rows_land_and_bad_ones_are_letters",
    "columns.NAME.default": "acceptance/test_bad_input.py::test_good_rows_land_and_bad_ones_are_letters",
    "columns.NAME.unit": "unit/test_mapping.py::test_epoch",
    "decode.unknown_fields": "acceptance/test_mapping.py::test_unknown_fields_are_letters",
    "transform.function": "acceptance/test_transform.py::test_each_way_that_a_call_may_end",
    "transform.workers": "acceptance/test_transform.py::test_a_killed_worker_is_replaced_and_a_stop_drains",
    "transform.timeout": "integration/test_transformer.py::test_a_thread_that_does_not_come_back_is_a_halt",
    "batch.max_messages": "acceptance/test_config_keys.py::test_a_batch_has_its_bounds",
    "batch.max_bytes": "acceptance/test_config_keys.py::test_a_batch_has_its_bounds",
    "batch.max_age": "acceptance/test_config_keys.py::test_a_batch_has_its_bounds",
    "retry.initial": "unit/test_config_keys.py::test_retry",
    "retry.max": "unit/test_config_keys.py::test_retry",
    "poison.max_ratio": "acceptance/test_halts.py::test_a_topic_full_of_poison_trips_the_breaker",
    "poison.window": "unit/test_config_keys.py::test_window",
    "poison.min_messages": "acceptance/test_halts.py::test_a_topic_full_of_poison_trips_the_breaker",
    "poison.error_text": "acceptance/test_poison_action.py::test_error_text",
    "poison.action": "acceptance/test_poison_action.py::test_poison_is_passed_over",
    "dead_letter.topic": "acceptance/test_config_keys.py::test_the_dead_letter_topic_is_made_as_told",
    "dead_letter.create": "acceptance/test_halts.py::test_a_mistake_halts_its_handler_alone_and_says_what_to_type",
    "dead_letter.retention_ms": "acceptance/test_config_keys.py::test_the_dead_letter_topic_is_made_as_told",
    "dead_letter.partitions": "acceptance/test_config_keys.py::test_the_dead_letter_topic_is_made_as_told",
    "dead_letter.replication": "acceptance/test_config_keys.py::test_the_dead_letter_topic_is_made_as_told",
}
"""The test that gives a key another value than its default, and fails where that makes no difference."""


def keys(model: type[BaseModel], within: str = "") -> list[str]:
    """Return the keys of a file, as paths; those of a table for each of many have NAME in their path."""
    found = []
    for field, info in model.model_fields.items():
        if field in getattr(model, "from_file", ()) or _has_one_value(info):
            continue
        path = f"{within}{info.validation_alias or field}"
        inner = reference._model(info)
        found += keys(inner, f"{path}.NAME." if _is_many(info) else f"{path}.") if inner else [path]
    return found


def _is_many(info: FieldInfo) -> bool:
    return any(get_origin(part) is dict for part in reference._parts(info.annotation))


def _has_one_value(info: FieldInfo) -> bool:
    """Tell a key that cannot be changed: it has one word to choose from."""
    return get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1


def test_each_key_has_a_test() -> None:
    """A key that no test changes is missing in the table, and the table names no key that is gone."""
    assert set(keys(Config) + keys(HandlerConfig)) == set(TESTS)


@pytest.mark.parametrize("named", sorted(set(TESTS.values())))
def test_each_of_these_tests_is_there(named: str) -> None:
    """Each test that the table names exists, and its file names the keys that it is there for."""
    file, _, function = named.partition("::")
    text = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert function in {each.name for each in ast.parse(text).body if isinstance(each, kinds)}
    here = [key.rpartition(".")[2] for key, test in TESTS.items() if test == named]
    assert [] == [key for key in here if key not in text]


# The keys whose difference is seen without a server.


async def test_admin(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kafka.admin = false` asks for no topic id and no setting, which otherwise are asked for and judged."""

    def topics(*, admin: bool) -> Topics:
        made = Topics(KafkaConfig(bootstrap_servers="127.0.0.1:1", admin=admin))
        monkeypatch.setattr(made, "_partitions", lambda: {"orders": 3, "letters": 1})
        monkeypatch.setattr(made, "_ids", lambda names, *_: {name: f"id of {name}" for name in names})
        settings = {"max.message.bytes": "1000", "cleanup.policy": "compact", "retention.ms": "-1"}
        monkeypatch.setattr(made, "_settings", lambda _: settings)
        return made

    letters = DeadLetterConfig(topic="letters")
    without = topics(admin=False)
    assert (await without.find(["orders"], []))["orders"].topic_id is None
    assert await without.ensure_dead_letter(letters, ["orders"]) is None
    asking = topics(admin=True)
    assert (await asking.find(["orders"], []))["orders"].topic_id == "id of orders"
    with pytest.raises(Halt, match="compacted"):
        await asking.ensure_dead_letter(letters, ["orders"])


def test_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """`postgres.password` is what the connection is opened with, read again each time; without it there is none."""
    config = PostgresConfig(dsn="host=db", password=Secret(env="PG_PASSWORD"))
    for password in ("first", "rotated"):
        monkeypatch.setenv("PG_PASSWORD", password)
        assert password == postgres._parameters(config, "consumerd/orders")["password"]
    assert "password" not in postgres._parameters(PostgresConfig(dsn="host=db"), "consumerd/orders")


def test_handlers(tmp_path: Path) -> None:
    """`daemon.handlers` is the folder whose files are the handlers, and no other is."""
    config = '[kafka]\nbootstrap_servers = "b:9092"\n[postgres]\ndsn = "host=db"\n'
    for folder in ("handlers", "others"):
        (tmp_path / folder).mkdir()
        text = 'topics = ["a"]\n[table]\nname = "t"\nwrite = "append"\n'
        (tmp_path / folder / f"of_{folder}.toml").write_text(text, encoding="utf-8")
    for line, name in (("", "of_handlers"), ('[daemon]\nhandlers = "others"\n', "of_others")):
        (tmp_path / "consumerd.toml").write_text(config + line, encoding="utf-8")
        assert [name] == [each.name for each in load(tmp_path / "consumerd.toml", environ={}).handlers]


@pytest.mark.parametrize(
    ("retry", "waits"),
    [
        (RetryConfig(initial=0.5, max=3.0), [0.5, 1.0, 2.0, 3.0, 3.0]),
        (RetryConfig(initial=0.125, max=3.0), [0.125, 0.25, 0.5, 1.0, 2.0]),
        (RetryConfig(initial=0.5, max=0.75), [0.5, 0.75, 0.75, 0.75, 0.75]),
    ],
)
async def test_retry(monkeypatch: pytest.MonkeyPatch, retry: RetryConfig, waits: list[float]) -> None:
    """The waits between two tries are, at most, `retry.initial`, twice that each time, and `retry.max` in the end."""
    waited: list[float] = []
    fails = iter([True] * len(waits))

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def attempt() -> None:
        if next(fails, False):
            raise Outage("postgres", "away")

    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    member: Any = SimpleNamespace(handler=SimpleNamespace(retry=retry), _on_outage=lambda *_: None)
    await Member.retry(cast("Member", member), "writer 0", attempt)
    assert waits == waited


def test_window() -> None:
    """What is older than `poison.window` counts no more: good messages of a while ago do not outweigh poison."""
    long, short = (Breaker(PoisonConfig(max_ratio=0.1, window=window, min_messages=100)) for window in (30.0, 10.0))
    for breaker in (long, short):
        breaker.judge(batch(1000, 0), 0.0)
    long.judge(batch(100, 11), 20.0)
    with pytest.raises(Halt, match="11 of the last 100"):
        short.judge(batch(100, 11), 20.0)
