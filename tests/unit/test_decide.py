"""Who wins at an assignment: rules.md, rule 10, row by row; C is the checkpoint, K Kafka's committed offset."""

from dataclasses import dataclass, field

import pytest

from consumerd.decide import LOG_START, Committed, Decision, Stamp, Stored, decide, decide_by_kafka, decode_stamp
from consumerd.errors import Halt
from consumerd.types import TopicPartition

PARTITION = TopicPartition("orders", 3)
STORE, OTHER_STORE = "1c1ab3f7-6a33-4a2c-8f9e-000000000001", "1c1ab3f7-6a33-4a2c-8f9e-000000000002"
GROUP, TARGET, TOPIC_ID = "consumerd.orders", "public.orders", "topic-id-1"


def stored(
    next_offset: int | None, *, topic_id: str | None = TOPIC_ID, target: str = TARGET, max_offset: int | None = None
) -> Stored:
    """Make C."""
    return Stored(epoch=4, next_offset=next_offset, max_offset=max_offset, topic_id=topic_id, target=target)


def stamp(offset: int, *, mode: str = "postgres", store: str = STORE, group: str = GROUP) -> Stamp:
    """Make a stamp."""
    return Stamp(mode=mode, store=store, group=group, topic_id=TOPIC_ID, offset=offset)


def committed(offset: int | None, given: Stamp | None = None) -> Committed:
    """Make K."""
    return Committed(offset=offset, stamp=given)


def settle(c: Stored, k: Committed, *, topic_id: str | None = TOPIC_ID) -> Decision:
    """Decide for this test's group, store, topic and table."""
    return decide(PARTITION, c, k, store=STORE, group=GROUP, topic_id=topic_id, target=TARGET)


@dataclass(frozen=True)
class Row:
    """One row of the table: C, K, and then."""

    name: str
    c: Stored
    k: Committed
    kind: str
    offset: int | None = None
    late: bool = False
    said: tuple[str, ...] = field(default=())
    """Words of the note; empty: nothing is said."""


GOES_ON = [
    Row("none, none: start", stored(None), committed(None), "start"),
    Row("none of a later partition, none: the log's start", stored(LOG_START), committed(None), "start", late=True),
    Row("none, unstamped: adopt K", stored(None), committed(70), "adopt", 70, said=("70",)),
    Row("none, K at 0: adopt K", stored(None), committed(0), "adopt", 0, said=("0",)),
    Row("none of a later partition, unstamped: adopt K", stored(LOG_START), committed(70), "adopt", 70, said=("70",)),
    Row(
        "none, stamped by kafka mode: adopt K",
        stored(None),
        committed(70, stamp(70, mode="kafka")),
        "adopt",
        70,
        said=("70",),
    ),
    Row("any, none: C wins, said", stored(50), committed(None), "resume", 50, said=("no committed offset",)),
    Row("C 0, none: C wins, said", stored(0), committed(None), "resume", 0, said=("no committed offset",)),
    Row("any, unstamped ahead: adopt K, range skipped", stored(50), committed(70), "adopt", 70, said=("skips 50..69",)),
    Row(
        "any, unstamped behind: adopt K, range repeated",
        stored(50),
        committed(20),
        "adopt",
        20,
        said=("repeats 20..49",),
    ),
    Row("any, unstamped and equal: adopt K, nothing to tell", stored(50), committed(50), "adopt", 50),
    Row(
        "any, stamp for another offset, K ahead: adopt K",
        stored(50),
        committed(70, stamp(50)),
        "adopt",
        70,
        said=("skips 50..69",),
    ),
    Row(
        "any, stamp for another offset, K behind: adopt K",
        stored(50),
        committed(20, stamp(50)),
        "adopt",
        20,
        said=("repeats 20..49",),
    ),
    Row("any, stamped right, K at C: C wins", stored(50), committed(50, stamp(50)), "resume", 50),
    Row("any, stamped right, K behind: C wins", stored(50), committed(20, stamp(20)), "resume", 50),
    Row(
        "any, stamped right, K ahead: C wins, the range is named",
        stored(50),
        committed(70, stamp(70)),
        "resume",
        50,
        said=("Postgres went back", "50..69"),
    ),
]


@pytest.mark.parametrize("row", GOES_ON, ids=lambda row: row.name)
def test_rule_10_goes_on(row: Row) -> None:
    """Each row of rule 10 that goes on does so at its offset, and says what it names."""
    decision = settle(row.c, row.k)
    assert (decision.kind, decision.offset, decision.late) == (row.kind, row.offset, row.late)
    assert bool(decision.note) == bool(row.said)
    assert [word for word in row.said if word not in (decision.note or "")] == []


HALTS = [
    ("none, stamped by us in postgres mode", stored(None), committed(70, stamp(70)), "checkpoint", "up to 70"),
    ("a later partition, stamped by us", stored(LOG_START), committed(70, stamp(70)), "checkpoint", "up to 70"),
    ("any, another store's stamp", stored(50), committed(50, stamp(50, store=OTHER_STORE)), "checkpoint", OTHER_STORE),
    ("none, another store's", stored(None), committed(50, stamp(50, store=OTHER_STORE)), "checkpoint", OTHER_STORE),
    ("any, another group's stamp", stored(50), committed(50, stamp(50, group="g2")), "checkpoint", "group g2"),
    ("another store's, wrong offset", stored(50), committed(7, stamp(5, store=OTHER_STORE)), "checkpoint", OTHER_STORE),
    ("C of another topic id, K none", stored(50, topic_id="old"), committed(None), "topic", "made again"),
    ("C of another topic id, K unstamped", stored(50, topic_id="old"), committed(7), "topic", "made again"),
    ("C of another topic id, K stamped", stored(50, topic_id="old"), committed(50, stamp(50)), "topic", "made again"),
    (
        "rule 12: C of another table",
        stored(50, target="public.old"),
        committed(50, stamp(50)),
        "checkpoint",
        "public.old",
    ),
]


@pytest.mark.parametrize(("c", "k", "reason", "words"), [row[1:] for row in HALTS], ids=[row[0] for row in HALTS])
def test_rule_10_halts(c: Stored, k: Committed, reason: str, words: str) -> None:
    """Each row of rule 10 that halts says so with its reason, and names what it found."""
    with pytest.raises(Halt) as caught:
        settle(c, k)
    assert caught.value.reason == reason
    assert words in str(caught.value)


@pytest.mark.parametrize(("ours", "theirs"), [(None, TOPIC_ID), (TOPIC_ID, None), (None, None)])
def test_unknown_topic_id(ours: str | None, theirs: str | None) -> None:
    """Topic ids are compared only when both are known (rule 31)."""
    decision = settle(stored(50, topic_id=ours), committed(50, stamp(50)), topic_id=theirs)
    assert (decision.kind, decision.offset) == ("resume", 50)


def test_stamp_round_trip() -> None:
    """A stamp reads back from its metadata as it was, without a topic id too."""
    for topic_id in (TOPIC_ID, None):
        it = Stamp(store=STORE, group="gröup", topic_id=topic_id, offset=2**62)
        assert decode_stamp(it.encode()) == it


def test_stamp_holds() -> None:
    """A stamp says version, mode, store, group, topic id and offset."""
    assert Stamp(store="s", group="g", topic_id="t", offset=7).encode() == (
        '{"v":1,"mode":"postgres","store":"s","group":"g","topic_id":"t","offset":7}'
    )


@pytest.mark.parametrize(
    "metadata",
    [
        *(
            None,
            "",
            " ",
            "connect-1",
            "{}",
            "[]",
            "null",
            "7",
            '{"offset":7}',
            '{"v":1,"store":"s"}',
            "\x00",
            "{" * 100,
        ),
        '{"v":"1","mode":"postgres","store":"s","group":"g","topic_id":"t","offset":7}',
        '{"v":1,"mode":"postgres","store":"s","group":"g","topic_id":"t","offset":"7"}',
        '{"x":' + "[" * 4000,
    ],
)
def test_foreign_metadata(metadata: str | None) -> None:
    """Metadata that somebody else wrote is no stamp."""
    assert decode_stamp(metadata) is None


def settle_by_kafka(k: Committed, *, topic_id: str | None = TOPIC_ID) -> Decision:
    """Decide without a checkpoint in Postgres."""
    return decide_by_kafka(PARTITION, k, group=GROUP, topic_id=topic_id, bootstrap="broker:9092")


def test_at_least_once() -> None:
    """Rule 28: without a checkpoint in Postgres Kafka's offset is the checkpoint, an operator's too; none: start."""
    assert settle_by_kafka(committed(None)) == Decision(kind="start")
    assert settle_by_kafka(committed(70)) == Decision(kind="adopt", offset=70)
    assert settle_by_kafka(committed(70, stamp(70, mode="kafka"))) == Decision(kind="resume", offset=70)


def test_at_least_once_after_exactly_once() -> None:
    """An offset that was committed behind a checkpoint in Postgres halts, with what to type."""
    with pytest.raises(Halt, match="--reset-offsets --to-current --topic orders --execute"):
        settle_by_kafka(committed(70, stamp(70)))


def test_at_least_once_of_another_topic() -> None:
    """Without a checkpoint in Postgres, too, a topic that was made again halts."""
    with pytest.raises(Halt, match="deleted and made again"):
        settle_by_kafka(committed(70, stamp(70, mode="kafka")), topic_id="topic-id-2")
    assert settle_by_kafka(committed(70, stamp(70, mode="kafka")), topic_id=None).kind == "resume"


def test_exactly_once_after_at_least_once() -> None:
    """Going back to a checkpoint in Postgres adopts what Kafka has: the old checkpoint is behind it."""
    assert settle(stored(50), committed(70, stamp(70, mode="kafka", store=""))).offset == 70
