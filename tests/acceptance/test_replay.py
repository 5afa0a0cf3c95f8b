"""`consumerd replay`: a range of messages written once more, each exactly once, and what it refuses to undo."""

import json
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from tests.acceptance.events import handler
from tests.acceptance.stream import Stream, doubled, make_table, rows
from tests.conftest import MakeTopic
from tests.servers.daemon import consumerd, write_config
from tests.servers.kafka import KafkaServer
from tests.servers.sql import execute

OK, FAILED, USAGE = 0, 1, 2


class Scene:
    """A stream, a handler that appends it to `events`, a table `copy` beside it, and no daemon."""

    def __init__(self, stream: Stream, dsn: str, folder: Path) -> None:
        self.stream, self.dsn, self.folder = stream, dsn, folder

    def configure(self, **keys: Any) -> None:  # noqa: ANN401 - TOML
        """Write the files."""
        config = {"kafka": {"bootstrap_servers": self.stream.bootstrap}, "postgres": {"dsn": self.dsn}}
        write_config(self.folder, config, {"events": handler(self.stream.topic, "events", write="append") | keys})

    def replay(self, *arguments: str, code: int = OK) -> dict[str, Any]:
        """Run the command; return what it tells as JSON, or with a failure's code what it says."""
        done = consumerd("replay", "events", "-o", "json", *arguments, cwd=self.folder)
        assert code == done.returncode, done.stderr
        said: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return said | {"said": done.stderr}


@pytest.fixture
def scene(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Scene:
    """Set up topic, tables and files."""
    for table in ("events", "copy"):
        make_table(database, table)
    made = Scene(Stream(kafka.bootstrap, topic(2), 2), database, tmp_path)
    made.configure()
    return made


def test_a_range_is_written_once(scene: Scene) -> None:
    """P2: what an offset range holds is in another table, each good record once; what is refused is named."""
    scene.stream.produce(1_000)
    topic = scene.stream.topic
    asked = ("--from", f"{topic}:0@100", "--to", f"{topic}:0@300", "--into", "copy")
    tried = scene.replay(*asked)
    assert {} == dict(rows(scene.dsn, "copy"))
    done = scene.replay(*asked, "--execute")
    sent = {offset: number for (partition, offset), number in scene.stream.sent.items() if partition == 0}
    expected = {sent[offset] for offset in range(100, 300)} & scene.stream.good()
    assert expected == set(rows(scene.dsn, "copy"))
    assert {} == doubled(rows(scene.dsn, "copy"))
    assert {"rows": len(expected), "refused": 200 - len(expected), "skipped": 0} == done["totals"]
    assert (tried["rows"], tried["refused"]) == (done["rows"], done["refused"])
