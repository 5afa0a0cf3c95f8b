"""Letters shown, exported, and sent back to a topic: byte for byte, and what was sent only where it is asked for."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from consumerd.commands.dlq.survey import Filter, source
from consumerd.commands.dlq.whole import Entry, each, last, line, text
from consumerd.errors import Halt
from tests.acceptance.stream import letters
from tests.conftest import MakeTopic
from tests.integration.dlq import Dlq
from tests.servers.kafka import KafkaServer
from tests.servers.sql import execute

VALUES = [b'{"id": "secret"}', b"\xff\x00secret", None, b""]


@pytest.fixture
def dlq(kafka: KafkaServer, database: str, topic: MakeTopic, tmp_path: Path) -> Dlq:
    """Make a table, a topic and a dead-letter topic."""
    execute(database, "CREATE TABLE t (id bigint, n bigint)")
    letters_topic = topic(prefix="letters", config={"retention.ms": "-1"})
    return Dlq(kafka, database, tmp_path, topic(2, config={"retention.ms": "-1"}), letters_topic)


async def test_export_is_byte_for_byte(dlq: Dlq) -> None:
    """Each letter is a line with key, value and headers: text where it is UTF-8, else base64 under another name."""
    await dlq.start()
    for offset, value in enumerate(VALUES):
        dlq.write(offset, value)
    made: list[Entry] = []
    await each(dlq.config, dlq.handler, dlq.state(), Filter(), made.append, values=True)
    lines: list[dict[str, Any]] = [json.loads(line(entry)) for entry in made]
    data = [base64.b64decode(e["value_base64"]) if "value_base64" in e else e["value"] for e in lines]
    assert [b'{"id": "secret"}'.decode(), b"\xff\x00secret", None, ""] == data
    first = lines[0]
    assert {"topic": dlq.topic, "partition": 0, "offset": 0} == first["source"]
    assert ("key", [{"name": "trace", "value": "secret-header"}]) == (first["key"], first["headers"])
    assert ("type", "msgspec.ValidationError", "n") == (first["reason"], first["error"], first["column"])
    assert (1_600_000_000_123, 1, "open") == (first["timestamp"], first["attempts"], first["status"])


async def test_show_prints_no_value_unasked(dlq: Dlq) -> None:
    """Source, reason and the names of headers are shown; key, value and the headers' own values with --values alone."""
    await dlq.start()
    for offset, value in enumerate(VALUES):
        dlq.write(offset, value)
    await dlq.redrive()  # all fail again but the tombstone, which is skipped
    found = await last(dlq.config, dlq.handler, dlq.state(), Filter(), count=2, values=False)
    whole = await last(dlq.config, dlq.handler, dlq.state(), Filter(), count=10, values=True)
    for shown in (line, text):
        told = "\n".join(map(shown, found))
        assert "secret" not in told
        assert "trace" in told
        assert "secret-header" in "\n".join(map(shown, whole))
    assert ["redriven", "failed"] == [entry["status"] for entry in found]
    head, why, *_ = text(found[1]).splitlines()
    assert f"{dlq.topic}:0@3  failed" == head
    assert "type: Expected `int` (column n)" in why
    assert "failed again 20" in text(found[1])
    assert "malformed: the message's value is empty" in text(found[1])


async def test_what_is_no_letter_of_this_handler(dlq: Dlq) -> None:
    """A topic may hold another group's letters and anything else: they are left alone."""
    await dlq.start()
    dlq.write(0, {"id": 0})
    dlq.configure(group_id="other")
    dlq.write(1, {"id": 1})
    dlq.configure()
    dlq.write(2, {"id": 2})
    producer = Producer({"bootstrap.servers": dlq.kafka.bootstrap})
    for given in (None, b"consumerd.t", b"\xff"):
        producer.produce(dlq.letters, b"anything", headers=[("consumerd.group", given)])
    assert producer.flush(10) == 0
    assert [0, 2] == [each.offset for each in await dlq.standings()]
    assert 2 == (await dlq.redrive()).redriven


async def test_back_to_the_topic(dlq: Dlq, topic: MakeTopic) -> None:
    """The original messages are in their partition again, once, or in another topic; `attempt` alone is added."""
    await dlq.start()
    dlq.checkpoint(10, partition=1)
    for offset, value in enumerate(VALUES):
        dlq.write(offset, value, partition=1)
    only = Filter(sources=(source(f"{dlq.topic}:1@3"),), statuses=frozenset({"open"}))
    other = topic(config={"message.timestamp.type": "LogAppendTime"})
    assert 1 == (await dlq.to_topic(other, which=only)).redriven
    assert 3 == (await dlq.to_topic()).redriven
    assert 0 == (await dlq.to_topic(run=1)).wanted
    sent = letters(dlq.kafka.bootstrap, dlq.topic)
    assert VALUES[:3] == [message.value() for message in sent]
    assert {(1, b"key", (1, 1_600_000_000_123))} == {(m.partition(), m.key(), m.timestamp()) for m in sent}
    assert [("trace", b"secret-header"), ("consumerd.attempt", b"1")] == sent[0].headers()
    assert [b""] == [message.value() for message in letters(dlq.kafka.bootstrap, other)]
    assert [("topic " + other,), ("topic " + dlq.topic,)] == execute(
        dlq.database, "SELECT target FROM consumerd.letters GROUP BY target ORDER BY count(*)"
    )
    dlq.write(5, b"", partition=1)
    with pytest.raises(Halt, match="is a dead-letter topic"):
        await dlq.to_topic(dlq.letters)
    with pytest.raises(Halt, match="topic nowhere does not exist"):
        await dlq.to_topic("nowhere")
    with pytest.raises(Halt, match=r"would delete it before it is read.*retention.ms=-1"):
        await dlq.to_topic(topic())


async def test_no_dead_letter_topic(dlq: Dlq) -> None:
    """A topic that is not there is said in a sentence, and is not made by asking."""
    dlq.configure(dead_letter={"topic": "nowhere"})
    for _ in range(2):
        with pytest.raises(Halt, match="dead-letter topic nowhere does not exist"):
            await dlq.standings()
