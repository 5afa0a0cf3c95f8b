"""A topic is missed when brokers say so all the time, and not because they are away or have just begun."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace

import pytest

from consumerd import topics
from consumerd.config import KafkaConfig
from consumerd.errors import Halt, Outage
from consumerd.topics import Topic, Topics, _matched, missing

ORDERS = Topic(name="orders", partitions=1, topic_id="a")
Watch = Callable[[Iterable[str]], Awaitable[Halt | None]]
KAFKA = KafkaConfig.model_validate({"bootstrap_servers": "127.0.0.1:1"})


class Over(Exception):  # noqa: N818 - the script's end, no error
    """The script has no more answers."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Give a function that watches a topic whose looks are answered by a script, one a second."""
    now = [1000.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(topics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(topics, "asyncio", SimpleNamespace(sleep=sleep, Lock=asyncio.Lock))

    async def watch(answers: Iterable[str]) -> Halt | None:
        script = iter(answers)

        async def look(_: object) -> tuple[float, dict[str, str]]:
            answer = next(script, None)
            if answer is None:
                raise Over
            if answer == "away":
                raise Outage("kafka", "nobody answers")
            return now[0], {"orders": answer} if answer != "unknown" else {}

        one = Topics(KAFKA)
        monkeypatch.setattr(one, "_look", look)
        return await one.watch({"orders": ORDERS})

    return watch


async def test_a_topic_that_is_unknown_for_long_is_gone(watched: Watch) -> None:
    """P6: ten seconds of brokers that do not know it."""
    assert "orders is gone" in str(await watched(["a"] * 3 + ["unknown"] * 12))


@pytest.mark.parametrize("between", ["away", "a"])
async def test_a_topic_that_is_unknown_around_something_else_is_not_gone(watched: Watch, between: str) -> None:
    """P4: brokers that start may not know it yet, before and after an outage as well."""
    with pytest.raises(Over):
        await watched((["unknown"] * 8 + [between]) * 3)


async def test_another_topic_of_the_same_name_halts(watched: Watch) -> None:
    """Rule 10: an id that is another one is another topic."""
    assert "deleted and made again" in str(await watched(["a", "unknown", "b"]))


def test_what_a_pattern_never_takes() -> None:
    """Rule 24: no dead-letter topic of any handler, no `*.dlq` (another daemon's), none of Kafka's own."""
    there = ["orders", "letters", "orders.dlq", "__consumer_offsets", "__mine", "orders.dlq.v2"]
    assert _matched(there, ["letters", "^.*"], ["letters"]) == {"orders", "__mine", "orders.dlq.v2"}
    assert _matched(there, ["letters"], []) == set()


@pytest.mark.parametrize(("given", "seconds"), [(None, 10.0), ("2500", 2.5), ("10", 0.1), ("-1", None)])
def test_how_often_a_pattern_is_looked_up(given: str | None, seconds: float | None) -> None:
    """As often as librdkafka's own property says, else each ten seconds; never for a negative one."""
    properties = {} if given is None else {"topic.metadata.refresh.interval.ms": given}
    kafka = KafkaConfig.model_validate({"bootstrap_servers": "127.0.0.1:1", "properties": properties})
    assert Topics(kafka).look_interval == seconds


def test_the_way_on_for_a_topic_that_is_gone() -> None:
    """P6: one that a pattern found is not missed after a restart; a named one is to be made again, or taken out."""
    matched = Topic(name="t.1", partitions=1, topic_id="a", matched=True)
    assert str(missing(["t.1"], {"t.1": matched})) == (
        "topic t.1 is gone from the brokers: restart to go on without it"
    )
    assert "make it again and set `group_id` to a new name" in str(missing(["orders"], {"orders": ORDERS}))
