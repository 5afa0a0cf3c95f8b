"""A log line is a constant message with fields: readable on a terminal, JSON elsewhere."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from consumerd.config import LogConfig
from consumerd.log import JsonFormatter, TextFormatter, fields, set_up


def record(message: str, *arguments: object, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    """Make a record as a logger does."""
    return logging.getLogger("consumerd.test").makeRecord(
        "consumerd.test", level, "file.py", 1, message, arguments, None, extra=extra
    )


def failed() -> logging.LogRecord:
    """Make a record with a traceback."""
    try:
        int("why")
    except ValueError:
        return logging.getLogger("x").makeRecord("x", logging.ERROR, "file.py", 1, "died", (), sys.exc_info())
    raise AssertionError


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Give the root logger, and put it back as it was."""
    logger, psycopg = logging.getLogger(), logging.getLogger("psycopg")
    handlers, level, psycopg_level = logger.handlers[:], logger.level, psycopg.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)
    psycopg.setLevel(psycopg_level)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


def test_fields() -> None:
    """Fields are what was given as extra, and nothing of logging's own."""
    assert fields(record("waiting", handler="orders", source="kafka")) == {"handler": "orders", "source": "kafka"}


def test_text_line() -> None:
    """A readable line says time, level, handler, message and fields, in this order."""
    line = TextFormatter().format(record("waiting: %s", "down", handler="orders", source="kafka", seconds=1.5))
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning orders: waiting: down source=kafka seconds=1\.5", line)


def test_text_line_without_handler() -> None:
    """A line of no handler has only the message."""
    assert re.fullmatch(r"\d\d:\d\d:\d\d info hello", TextFormatter().format(record("hello", level=logging.INFO)))


def test_text_traceback() -> None:
    """A traceback stands below its line."""
    first, *rest = TextFormatter().format(failed()).splitlines()
    assert first.endswith(" error died")
    assert (rest[0], rest[-1]) == (
        "Traceback (most recent call last):",
        "ValueError: invalid literal for int() with base 10: 'why'",
    )


def test_json_line() -> None:
    """A JSON line is one object with time, level, logger, message and fields."""
    line = JsonFormatter().format(record("waiting: %s", "a\nb", handler="orders", reasons={"type": 3}))
    assert "\n" not in line
    entry: dict[str, Any] = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry.pop("time"))
    assert entry == {
        "level": "warning",
        "logger": "consumerd.test",
        "message": "waiting: a\nb",
        "handler": "orders",
        "reasons": {"type": 3},
    }


def test_json_of_any_field() -> None:
    """A field that JSON has no form for stands there as text."""
    assert json.loads(JsonFormatter().format(record("x", error=ValueError("why"))))["error"] == "why"


def test_json_traceback() -> None:
    """A traceback is one field."""
    entry = json.loads(JsonFormatter().format(failed()))
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ValueError: invalid literal for int() with base 10: 'why'")


@pytest.mark.parametrize(
    ("given", "terminal", "formatter"),
    [
        ("auto", True, TextFormatter),
        ("auto", False, JsonFormatter),
        ("text", False, TextFormatter),
        ("json", True, JsonFormatter),
    ],
)
def test_set_up(
    monkeypatch: pytest.MonkeyPatch, root: logging.Logger, given: str, terminal: bool, formatter: type
) -> None:
    """Auto is text on a terminal and JSON elsewhere; all of it goes to standard error, once."""
    screen = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    config = LogConfig.model_validate({"format": given, "level": "warning"})
    set_up(config)
    set_up(config)
    assert [type(handler.formatter) for handler in root.handlers] == [formatter]
    logging.getLogger("consumerd.test").info("not told")
    logging.getLogger("consumerd.test").warning("told")
    assert screen.getvalue().count("\n") == 1
    assert "told" in screen.getvalue()


def test_words_of_the_server(monkeypatch: pytest.MonkeyPatch, root: logging.Logger) -> None:
    """What psycopg logs of a failed COPY never comes out: it holds values of rows."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    set_up(LogConfig.model_validate({"level": "debug"}))
    logging.getLogger("psycopg").error("error ignored terminating: secret")
    logging.getLogger("psycopg.pool").error("secret")
    assert screen.getvalue() == ""
