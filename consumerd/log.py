"""Logs: readable lines on a terminal, JSON elsewhere. A line is a constant message with fields (`extra`)."""

from __future__ import annotations

import datetime as dt
import logging
import sys
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from consumerd.config import LogConfig

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(config: LogConfig) -> None:
    """Send all logs to standard error, in the configured form."""
    handler = logging.StreamHandler()
    text = config.format == "text" or (config.format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
    # psycopg logs the server's words when a COPY fails; they hold values of rows.
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was given as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`12:30:01 warning orders: waiting: ... source=kafka`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, with a traceback below it if there is one."""
        given = fields(record)
        who = given.pop("handler", None)
        clock = dt.datetime.fromtimestamp(record.created, dt.UTC).astimezone().strftime("%H:%M:%S")
        parts = [clock, record.levelname.lower(), *([f"{who}:"] if who else []), record.getMessage()]
        parts += [f"{name}={value}" for name, value in given.items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line; `time` is RFC 3339 in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        entry = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()
