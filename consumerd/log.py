"""Logs: readable lines on a terminal, fields in systemd's journal, JSON elsewhere.

A line is a constant message with fields (`extra`). journald takes an entry as one datagram of `NAME=value` lines, and
one that is too large for that as a sealed memfd (systemd.io, "Native Journal Protocol").
"""

from __future__ import annotations

import array
import datetime as dt
import errno
import fcntl
import logging
import os
import re
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from consumerd.config import LogConfig

JOURNAL: Final = "/run/systemd/journal/socket"
PRIORITIES: Final = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
"""syslog's numbers of our levels."""
PLACES: Final = ("partition", "latest", "at")
"""Fields that name a partition, or a message: `orders:3`, `orders:3@17`."""

_PLACE = re.compile(r"(?P<TOPIC>[\w.-]+):(?P<PARTITION>\d+)(?:(?:@| offset )(?P<OFFSET>\d+))?")
_JOURNAL_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(config: LogConfig) -> None:
    """Send all logs to standard error, or to journald, in the configured form."""
    form = config.format
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "journal" if _stderr_is_journal() else "json"
    handler = JournalHandler(JOURNAL) if form == "journal" else logging.StreamHandler()
    handler.setFormatter(TextFormatter() if form == "text" else JsonFormatter())
    root = logging.getLogger()
    for before in root.handlers:
        before.close()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
    # psycopg logs the server's words when a COPY fails; they hold values of rows.
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def _stderr_is_journal() -> bool:
    """Whether standard error is the stream that systemd has connected to the journal (systemd.exec(5))."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was given as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`12:30:01 warning orders: waiting: ... source=kafka`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, with a traceback below it if there is one."""
        clock = dt.datetime.fromtimestamp(record.created, dt.UTC).astimezone().strftime("%H:%M:%S")
        return f"{clock} {record.levelname.lower()} {_line(record)}"


def _line(record: logging.LogRecord) -> str:
    """Return handler, message and fields, as people read them."""
    given = fields(record)
    who = given.pop("handler", None)
    parts = [*([f"{who}:"] if who else []), record.getMessage(), *(f"{name}={value}" for name, value in given.items())]
    line = " ".join(parts)
    return f"{line}\n{logging.Formatter().formatException(record.exc_info)}" if record.exc_info else line


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


class JournalHandler(logging.StreamHandler):  # type: ignore[type-arg] # it has none when it runs
    """Sends lines to journald; to standard error while that does not listen."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one entry."""
        try:
            self._send(journal_entry(record))
        except OSError:
            super().emit(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()

    def _send(self, entry: bytes) -> None:
        """Send it as a datagram, or in a file of memory that nobody can change any more."""
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            with os.fdopen(os.memfd_create("consumerd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as file:
                file.write(entry)
                file.flush()
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
                descriptor = array.array("i", [file.fileno()])
                self._socket.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)], 0, self._path)


def journal_entry(record: logging.LogRecord) -> bytes:
    """Return a line as journald takes it: HANDLER=, TOPIC=, PARTITION=, OFFSET=, and each other field by its name."""
    entry: dict[str, Any] = {}
    for name, value in fields(record).items():
        if name in PLACES and (place := _PLACE.fullmatch(str(value))):
            entry |= {key: part for key, part in place.groupdict().items() if part is not None}
        elif _JOURNAL_NAME.fullmatch(name.upper()):
            entry[name.upper()] = value
    entry |= {
        "MESSAGE": _line(record),
        "PRIORITY": PRIORITIES.get(record.levelname, 5),
        "LOGGER": record.name,
        "SYSLOG_IDENTIFIER": "consumerd",
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
    }
    return b"".join(_field(name, str(value).encode(errors="backslashreplace")) for name, value in entry.items())


def _field(name: str, value: bytes) -> bytes:
    """Write one field; what holds a newline comes with its length."""
    if b"\n" not in value:
        return b"%b=%b\n" % (name.encode(), value)
    return b"%b\n%b%b\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
