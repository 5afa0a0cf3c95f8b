"""Lines as systemd's journal takes them, read back from a socket in journald's place."""

import io
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumerd import log
from consumerd.config import LogConfig
from consumerd.log import JournalHandler, JsonFormatter, journal_entry, set_up
from tests.unit.test_log import failed, record


class Journal:
    """journald's end."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(5)

    def entry(self) -> dict[str, str]:
        """Return the next entry, of a datagram or of the file that came in its place."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        for descriptor in descriptors:
            with os.fdopen(descriptor, "r+b") as file:
                with pytest.raises(PermissionError):
                    file.truncate(1)  # journald takes no file that may change
                file.seek(0)
                data = file.read()
        return parsed(data)

    def close(self) -> None:
        """Be gone."""
        self._socket.close()
        Path(self.path).unlink()


def parsed(data: bytes) -> dict[str, str]:
    """Read the journal's native form."""
    entry = {}
    while data:
        head, _, data = data.partition(b"\n")
        name, binary, value = head.partition(b"=")
        if not binary:
            size = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        entry[name.decode()] = value.decode()
    return entry


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Listen as journald does."""
    made = Journal(tmp_path / "journal")
    yield made
    made._socket.close()


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Give the root logger, and put it back as it was."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers[:] = []
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_fields_of_an_entry() -> None:
    """An entry has the line as people read it, syslog's priority, its place in the code, and each field by its name."""
    entry = parsed(journal_entry(record("waiting: %s", "down", handler="orders", source="kafka", seconds=1.5)))
    assert entry == {
        "MESSAGE": "orders: waiting: down source=kafka seconds=1.5",
        "PRIORITY": "4",
        "HANDLER": "orders",
        "SOURCE": "kafka",
        "SECONDS": "1.5",
        "LOGGER": "consumerd.test",
        "SYSLOG_IDENTIFIER": "consumerd",
        "CODE_FILE": "file.py",
        "CODE_LINE": "1",
        "CODE_FUNC": "None",
    }


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("partition", "shop.orders-2:3", {"TOPIC": "shop.orders-2", "PARTITION": "3"}),
        ("latest", "orders:3@17", {"TOPIC": "orders", "PARTITION": "3", "OFFSET": "17"}),
        ("at", "orders:3 offset 17", {"TOPIC": "orders", "PARTITION": "3", "OFFSET": "17"}),
        ("listen", "localhost:9464", {"LISTEN": "localhost:9464"}),
        ("latest", "unclear", {"LATEST": "unclear"}),
        ("topic", "orders", {"TOPIC": "orders"}),
    ],
)
def test_a_partition_is_topic_and_number(field: str, value: str, place: dict[str, str]) -> None:
    """What names a partition or a message becomes TOPIC, PARTITION and OFFSET; an address does not."""
    entry = parsed(journal_entry(record("m", level=logging.INFO, **{field: value})))
    keys = {"TOPIC", "PARTITION", "OFFSET", "LISTEN", "LATEST", "AT"}
    assert place == {key: entry[key] for key in keys & entry.keys()}


def test_no_field_replaces_the_entrys_own() -> None:
    """A field whose name is the journal's own, or none that it takes, changes nothing."""
    entry = parsed(journal_entry(record("m", priority="0", _trusted="x", **{"a b": 1})))
    assert ("4", "m priority=0 _trusted=x a b=1") == (entry["PRIORITY"], entry["MESSAGE"])
    assert not {"_TRUSTED", "A B"} & entry.keys()


def test_lines_of_several_lines() -> None:
    """A traceback, or a value of several lines, comes whole."""
    entry = parsed(journal_entry(failed()))
    assert entry["MESSAGE"].startswith("died\nTraceback")
    assert entry["MESSAGE"].endswith("invalid literal for int() with base 10: 'why'")
    assert parsed(journal_entry(record("m", frames="a\nb=c\n")))["FRAMES"] == "a\nb=c\n"


def test_what_is_no_text() -> None:
    """A name that is not Unicode is written with escapes."""
    assert parsed(journal_entry(record("x\udcff")))["MESSAGE"] == "x\\udcff"


@pytest.mark.parametrize("size", [10, 300_000])
def test_journald_gets_it(journal: Journal, size: int) -> None:
    """An entry comes as a datagram, and one that no datagram holds in a sealed file."""
    handler = JournalHandler(journal.path)
    handler.handle(record("m", filling="x" * size))
    assert journal.entry()["FILLING"] == "x" * size
    handler.close()


def test_journald_that_is_away(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """While journald does not listen a line goes to standard error, whole."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = JournalHandler(journal.path)
    handler.setFormatter(JsonFormatter())
    handler.handle(record("first"))
    assert journal.entry()["MESSAGE"] == "first"
    journal.close()
    handler.handle(record("second", handler="orders"))
    assert {"second", "orders"} <= set(json.loads(screen.getvalue()).values())
    again = Journal(Path(journal.path))
    handler.handle(record("third"))
    assert again.entry()["MESSAGE"] == "third"
    handler.close()
    again._socket.close()


def test_auto_finds_the_journal(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, root: logging.Logger, tmp_path: Path
) -> None:
    """Auto takes the journal where $JOURNAL_STREAM is what standard error is connected to, and nowhere else."""
    monkeypatch.setattr(log, "JOURNAL", journal.path)
    with (tmp_path / "stderr").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        status = os.fstat(stream.fileno())
        for value, journals in ((f"{status.st_dev}:{status.st_ino}", True), (f"{status.st_dev}:1", False), ("", False)):
            monkeypatch.setenv("JOURNAL_STREAM", value)
            set_up(LogConfig())
            assert [journals] == [isinstance(handler, JournalHandler) for handler in root.handlers]
        set_up(LogConfig(format="journal"))
        logging.getLogger("consumerd.test").warning("told", extra={"handler": "orders"})
    assert journal.entry()["HANDLER"] == "orders"
