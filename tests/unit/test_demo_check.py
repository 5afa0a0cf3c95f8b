"""The demo's check: it must be able to fail."""

from collections import Counter

import pytest

from consumerd.commands.demo_parts import orders
from consumerd.commands.demo_parts.check import Letter, Message, Produced, Row, Source, Verdict, compare, newest

MESSAGE = Message(b"key", b"value", (("trace", b"\x00"), ("nothing", None)), 1_700_000_000_000)
PRODUCED = [
    Produced(source=Source(0, 0), message=MESSAGE, row=(1, "a")),
    Produced(source=Source(0, 1), message=MESSAGE, row=(2, None)),
    Produced(source=Source(0, 2), message=MESSAGE, reason="type"),
    Produced(source=Source(1, 0), message=MESSAGE, reason="missing"),
]
ROWS: list[Row] = [(1, "a"), (2, None)]
LETTERS = [
    Letter(source=Source(0, 2), message=MESSAGE, reason="type"),
    Letter(source=Source(1, 0), message=MESSAGE, reason="missing"),
]


def _counts(verdict: Verdict) -> tuple[int, int, int]:
    return len(verdict.lost), len(verdict.doubled), len(verdict.wrong)


def test_everything_in_its_place() -> None:
    """Rows and letters as produced are no fault, in whatever order they are read."""
    verdict = compare(PRODUCED, reversed(ROWS), reversed(LETTERS), crashes=1)
    assert verdict.faults == []
    assert (verdict.produced, verdict.written, verdict.repeated) == (4, 2, 0)
    assert verdict.found_letters == verdict.expected_letters == Counter(type=1, missing=1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(ROWS[:1], (1, 0, 0), id="removed"),
        pytest.param([*ROWS, ROWS[0]], (0, 1, 0), id="doubled"),
        pytest.param([*ROWS, ROWS[0], ROWS[0]], (0, 2, 0), id="tripled"),
        pytest.param([(1, "b"), ROWS[1]], (0, 0, 1), id="changed"),
        pytest.param([ROWS[0], (2, "")], (0, 0, 1), id="empty text for null"),
        pytest.param([*ROWS, (3, "c")], (0, 0, 1), id="never produced"),
        pytest.param([], (2, 0, 0), id="nothing"),
    ],
)
def test_rows(rows: list[Row], expected: tuple[int, int, int]) -> None:
    """A row that is removed, doubled, changed or made up counts as lost, doubled or wrong."""
    assert _counts(compare(PRODUCED, rows, LETTERS, crashes=1)) == expected


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        pytest.param(LETTERS[:1], (1, 0, 0), id="missing"),
        pytest.param(
            [LETTERS[0], Letter(source=Source(1, 0), message=MESSAGE, reason="range")], (0, 0, 1), id="reason"
        ),
        *(
            pytest.param(
                [LETTERS[0], Letter(source=Source(1, 0), message=changed, reason="missing")], (0, 0, 1), id=id_
            )
            for id_, changed in {
                "key": MESSAGE._replace(key=None),
                "value": MESSAGE._replace(value=b"valu"),
                "headers": MESSAGE._replace(headers=MESSAGE.headers[:1]),
                "timestamp": MESSAGE._replace(timestamp=MESSAGE.timestamp + 1),
            }.items()
        ),
        pytest.param(
            [*LETTERS, Letter(source=Source(0, 0), message=MESSAGE, reason="type")], (0, 0, 1), id="of a good record"
        ),
        pytest.param([*LETTERS, *LETTERS[:1]], (0, 0, 0), id="repeated by the crash"),
        pytest.param([*LETTERS, *LETTERS[:1], *LETTERS[:1]], (0, 1, 0), id="repeated more often than it crashed"),
    ],
)
def test_letters(letters: list[Letter], expected: tuple[int, int, int]) -> None:
    """A letter that is missing, changed or of another reason is a fault; one repeated by the crash is none."""
    assert _counts(compare(PRODUCED, ROWS, letters, crashes=1)) == expected


def test_dead_lettered_row() -> None:
    """A good record that became a letter instead of a row is wrong, not lost."""
    letters = [*LETTERS, Letter(source=Source(0, 0), message=MESSAGE, reason="type")]
    assert _counts(compare(PRODUCED, ROWS[1:], letters, crashes=1)) == (0, 0, 1)


def test_newest() -> None:
    """Of an upsert the last row of each key is expected; an older one that stayed is wrong."""
    older, newer = (Produced(source=Source(0, n), message=MESSAGE, row=(1, n)) for n in range(2))
    produced = newest([older, newer])
    assert compare(produced, [(1, 1)], [], crashes=0).faults == []
    assert _counts(compare(produced, [(1, 0)], [], crashes=0)) == (0, 0, 1)


def test_poison_below_the_breaker() -> None:
    """Every kind of poison is produced, and no thousand orders in a row hold 5 % of it."""
    made = orders.make(20_000, 1_700_000_000_000)
    assert {order.kind for order in made if order.kind} == {*orders.KINDS, *orders.REFUSED_BY_DATABASE}
    poison = [order.kind is not None for order in made]
    assert max(sum(poison[start : start + 1000]) for start in range(0, 19_000, 10)) < 50


def test_partitions_are_numbered_without_gaps() -> None:
    """Each order's source is the place that an ordered producer gives it."""
    made = orders.make(1000, 1_700_000_000_000)
    for partition in range(orders.PARTITIONS):
        offsets = [order.source.offset for order in made if order.source.partition == partition]
        assert offsets == list(range(len(offsets)))
