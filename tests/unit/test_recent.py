"""The last errors, each once, and nothing of writes that are over for a while."""

from consumerd.recent import ERRORS, RATE_WINDOW, Errors, Writes
from consumerd.types import TopicPartition

A, B = TopicPartition("orders", 0), TopicPartition("orders", 1)


def test_no_errors() -> None:
    """Without an error there is none to be told."""
    assert (Errors().last, Errors().told()) == (None, [])


def test_the_oldest_error_is_forgotten() -> None:
    """Of many errors the last are kept; one that is met again is among the last, however old its first time is."""
    errors = Errors()
    errors.add("the first", 0.0)
    for number in range(1, ERRORS + 1):
        if number == ERRORS:
            errors.add("the first", 50.0)
        errors.add(str(number), float(number))
    told = errors.told()
    assert (len(told), errors.last) == (ERRORS, str(ERRORS))
    assert told[1] == {"message": "the first", "first": 0.0, "last": 50.0, "count": 2}
    assert "1" not in {each["message"] for each in told}


def test_rates_are_of_the_last_seconds() -> None:
    """A write counts for its partition as long as the window is, and then no more."""
    writes = Writes()
    writes.add(0.0, A, rows=100, messages=200, seconds=1.0)
    writes.add(5.0, B, rows=50, messages=50, seconds=3.0)
    assert writes.rates(RATE_WINDOW) == {A: 100 / RATE_WINDOW, B: 50 / RATE_WINDOW}
    assert writes.means(RATE_WINDOW) == (125.0, 2.0)
    assert writes.rates(RATE_WINDOW + 1) == {B: 50 / RATE_WINDOW}
    assert writes.means(RATE_WINDOW + 6) is None
