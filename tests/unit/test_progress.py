"""State, counts, lag and log lines of one handler: one line for each change of state, none for a message."""

import itertools
import logging
import time
from typing import Any

import pytest
from prometheus_client import generate_latest

from consumerd import metrics
from consumerd.accumulator import Batch
from consumerd.errors import Halt, PoisonReason, Refusal
from consumerd.progress import LETTERS_INTERVAL, Progress, total_lag
from consumerd.recent import RATE_WINDOW
from consumerd.types import TopicPartition

A, B = TopicPartition("orders", 0), TopicPartition("orders", 1)
NOW = 1_000_000.0
REASONS: tuple[PoisonReason, ...] = ("type", "type", "missing", "type")

_names = (f"handler-{number}" for number in itertools.count())


class Fake:
    """A message with offset and time."""

    def __init__(self, offset: int, milliseconds: int, length: int = 1) -> None:
        self._offset, self._milliseconds, self._length = offset, milliseconds, length

    def __len__(self) -> int:
        return self._length

    def topic(self) -> str:
        """Give some topic."""
        return "orders"

    def partition(self) -> int:
        """Give some partition."""
        return 0

    def key(self) -> bytes | None:
        """Give none."""
        return None

    def value(self) -> bytes | None:
        """Give one byte."""
        return b"x"

    def offset(self) -> int:
        """Give the offset."""
        return self._offset

    def leader_epoch(self) -> int | None:
        """Give none."""
        return None

    def timestamp(self) -> tuple[int, int]:
        """Give the time."""
        return 1, self._milliseconds

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        """Give none."""
        return None


class Clock:
    """Both clocks of the module, moved by hand."""

    now = NOW

    def monotonic(self) -> float:
        """Tell the time."""
        return self.now

    def time(self) -> float:
        """Tell the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put the module's clocks into the test's hand."""
    clock = Clock()
    monkeypatch.setattr("consumerd.progress.time", clock)
    return clock


@pytest.fixture
def it(clock: Clock, caplog: pytest.LogCaptureFixture) -> Progress:
    """Make the progress of a handler with a name of its own: metrics live as long as the process."""
    caplog.set_level(logging.INFO, "consumerd")
    return Progress(next(_names))


def written(messages: int, first: int = 0, refused: tuple[PoisonReason, ...] = (), ago: float = 5.0) -> Batch:
    """Make a batch of A."""
    return Batch(
        partition=A,
        first_offset=first,
        next_offset=first + messages,
        messages=[Fake(first + i, int((NOW - ago) * 1000)) for i in range(messages)],
        size=messages,
        reason="age",
        gathered_since=0.0,
        refused={i: Refusal(reason=reason, stage="decode", error="E", message="m") for i, reason in enumerate(refused)},
    )


def sample(it: Progress, name: str, **labels: str) -> float | None:
    """Read a metric of the handler."""
    return metrics.registry.get_sample_value(f"consumerd_{name}", {"handler": it.handler, **labels})


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Give what was logged."""
    return [record.getMessage() for record in caplog.records]


def test_starts(it: Progress) -> None:
    """A new handler is starting, not ready, and its state is in the metrics with all others at 0."""
    assert (it.state, it.ready) == ("starting", False)
    assert {state: sample(it, "handler_state", state=state) for state in metrics.STATES} == {
        **dict.fromkeys(metrics.STATES, 0.0),
        "starting": 1.0,
    }


def test_metrics_begin_at_zero(it: Progress) -> None:
    """Every fixed label value is there before the first event."""
    text = generate_latest(metrics.registry).decode()
    for name in (
        f'consumerd_messages_dead_lettered_total{{handler="{it.handler}",reason="rejected"}} 0.0',
        f'consumerd_messages_skipped_total{{handler="{it.handler}",reason="where"}} 0.0',
        f'consumerd_flushes_total{{handler="{it.handler}",reason="drain"}} 0.0',
        f'consumerd_halts_total{{handler="{it.handler}",reason="breaker"}} 0.0',
        f'consumerd_isolations_total{{handler="{it.handler}"}} 0.0',
    ):
        assert name in text


def test_one_line_for_a_change(it: Progress, caplog: pytest.LogCaptureFixture) -> None:
    """A change of state is one line; to the same state again is none."""
    it.joined()
    it.joined()
    it.to("running")
    it.to("stopping")
    assert lines(caplog) == ["running", "stopping"]


def test_empty_assignment_is_ready(it: Progress) -> None:
    """A member that gets no partition has joined."""
    it.rebalanced(0, assigned=[])
    assert (it.ready, it.state) == (True, "running")


def test_revocation_is_not_joining(it: Progress) -> None:
    """Losing partitions makes nothing ready."""
    it.rebalanced(0, revoked=[A])
    assert it.ready is False


def test_outage_and_back(it: Progress, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """An outage is told once while it says the same, shows as waiting with its sentence, and its end is told."""
    it.joined()
    caplog.clear()
    for _ in range(3):
        it.outage("postgres", "down", "one")
        clock.now += 2
    assert (it.state, it.status({})["waiting_for"]) == ("waiting", {"postgres": "down"})
    it.outage("postgres", "starting up", "one")
    it.recovered("one", "kafka")
    assert it.state == "waiting"
    it.recovered("one", "postgres")
    assert (it.state, it.status({})["waiting_for"]) == ("running", {})
    assert it.last_error == "starting up"
    assert lines(caplog) == ["waiting: down", "waiting", "waiting: starting up", "recovered", "running"]
    assert vars(caplog.records[-2])["seconds"] == 6.0


def test_two_outages(it: Progress) -> None:
    """A handler waits until the last of its outages is over."""
    it.joined()
    it.outage("postgres", "down", "one")
    it.outage("kafka", "down", "one")
    it.recovered("one", "kafka")
    states: list[str] = [it.state]
    it.recovered("one")
    states.append(it.state)
    assert states == ["waiting", "running"]


def test_an_outage_is_over_for_those_who_met_it(it: Progress, caplog: pytest.LogCaptureFixture) -> None:
    """One writer's success does not end what another waits for; the same sentence of two is told once."""
    it.joined()
    caplog.clear()
    it.outage("postgres", "down", "one")
    it.outage("postgres", "down", "two")
    it.recovered("one", "postgres")
    assert (it.state, it.status({})["waiting_for"]) == ("waiting", {"postgres": "down"})
    it.recovered("two", "postgres")
    assert lines(caplog) == ["waiting: down", "waiting", "recovered", "running"]


def test_outage_before_joining(it: Progress) -> None:
    """A handler that never joined goes back to starting, not to running."""
    it.outage("kafka", "down", "one")
    it.recovered("one", "kafka")
    assert (it.state, it.ready) == ("starting", False)


def test_outage_while_stopping(it: Progress) -> None:
    """An outage during a stop leaves the state as it is."""
    it.joined()
    it.to("stopping")
    it.outage("postgres", "down", "one")
    it.recovered("one")
    assert it.state == "stopping"


def test_halt(it: Progress, caplog: pytest.LogCaptureFixture) -> None:
    """A halt is one line, is not ready, ends outages, and stands in status and metrics."""
    it.joined()
    it.outage("postgres", "down", "one")
    caplog.clear()
    it.halt(Halt("table", "table t does not exist"))
    ways = f"once its cause is mended: consumerd restart {it.handler}; once its file is: consumerd reload"
    told = f"table t does not exist; {ways}"
    assert lines(caplog) == [f"halted: {told}"]
    status = it.status({})
    assert (status["state"], status["ready"], status["waiting_for"]) == ("halted", False, {})
    commands = [f"consumerd restart {it.handler}", "consumerd reload"]
    assert status["halt"] == {"reason": "table", "message": told, "commands": commands}
    assert (sample(it, "halts_total", reason="table"), sample(it, "handler_state", state="halted")) == (1.0, 1.0)


def test_halt_stays(it: Progress) -> None:
    """Neither an outage nor its end takes a halt back."""
    it.joined()
    it.halt(Halt("table", "gone"))
    it.outage("kafka", "down", "one")
    it.recovered("one")
    assert it.state == "halted"


def test_books(it: Progress) -> None:
    """A written batch counts its rows, its letters by reason, and moves the checkpoint."""
    it.leased(A, 100)
    it.consumed(A, 10)
    batch = written(10, first=100, refused=("type", "type", "range"))
    batch.lettered = {0, 1, 2}
    assert it.written(batch, 0.1) == 0
    assert (it.totals.consumed, it.totals.written) == (10, 7)
    assert it.totals.dead_lettered == {"type": 2, "range": 1}
    assert it.partitions[A].checkpoint == 110
    assert sample(it, "rows_written_total", topic="orders", partition="0") == 7.0
    assert sample(it, "messages_dead_lettered_total", reason="type") == 2.0
    assert sample(it, "messages_consumed_total", topic="orders", partition="0") == 10.0
    assert sample(it, "end_to_end_latency_seconds_sum") == pytest.approx(5.0)
    assert sample(it, "last_commit_timestamp_seconds") == NOW


def test_skipped(it: Progress) -> None:
    """What was skipped is no row; it is counted by reason."""
    it.leased(A, 100)
    batch = written(10, first=100, refused=("type",))
    batch.lettered = {0}
    batch.skipped["where"] = 6
    it.written(batch, 0.1)
    assert (it.totals.written, it.status({})["skipped"]) == (3, {"where": 6})
    assert sample(it, "rows_written_total", topic="orders", partition="0") == 3.0
    assert sample(it, "messages_skipped_total", reason="where") == 6.0


def test_books_of_what_is_skipped(it: Progress) -> None:
    """What the handler passes over, poison and tombstones and what exists, is no row, and is counted by its reason."""
    batch = written(10, refused=("type", "range"))
    batch.lettered = {0}
    batch.skipped.update(tombstone=3)
    assert it.written(batch, 0.1, existing=2) == 2
    assert it.totals.written == 3
    assert it.totals.dead_lettered == {"type": 1}
    assert it.totals.skipped == {"range": 1, "tombstone": 3, "exists": 2}
    assert sample(it, "messages_skipped_total", reason="tombstone") == 3.0
    assert sample(it, "messages_skipped_total", reason="encoding") == 0.0
    assert it.written(written(4), 0.1, existing=7) == 4
    assert it.totals.written == 3


def test_what_is_passed_over_is_told(it: Progress, caplog: pytest.LogCaptureFixture) -> None:
    """Poison that is passed over has a line, with the last one's place, and tombstones have none."""
    it.written(written(5, first=7, refused=("type", "type")), 0.1)
    tombstones = written(5)
    tombstones.skipped.update(tombstone=5)
    it.written(tombstones, 0.1)
    assert lines(caplog) == ["skipped"]
    (told,) = [vars(record) for record in caplog.records]
    assert (told["latest"], told["reasons"]) == ("orders:0@8", {"type": 2})


def test_counters_of_a_partition_are_there_from_its_assignment(it: Progress) -> None:
    """A partition's counters begin at 0 when it is assigned, before it is claimed; its gauges come with its lag."""
    it.rebalanced(1, assigned=[A])
    labels = {"topic": "orders", "partition": "0"}
    assert sample(it, "messages_consumed_total", **labels) == 0.0
    assert sample(it, "rows_written_total", **labels) == 0.0
    assert sample(it, "lag_messages", **labels) is None


def test_put_out_of_its_group(it: Progress) -> None:
    """A member that its group has put out is not ready until it is assigned again; an outage alone changes nothing."""
    it.joined()
    it.outage("kafka", "down", "one")
    ready = [it.ready]
    it.left()
    it.outage("kafka", "has let this member go", "one")
    it.recovered("one")
    ready.append(it.ready)
    it.rebalanced(0, assigned=[])
    ready.append(it.ready)
    assert (ready, it.state) == ([True, False, True], "running")


def test_errors(it: Progress, clock: Clock) -> None:
    """The last errors are in the status, each sentence once, the last first, with its first and last time."""
    it.joined()
    it.outage("postgres", "starting up", "one")
    clock.now += 1
    it.outage("kafka", "no broker", "one")
    clock.now += 1
    it.outage("postgres", "starting up", "two")
    status = it.status({})
    assert (status["last_error"], status["state_since"]) == ("starting up", NOW)
    assert status["errors"] == [
        {"message": "starting up", "first": NOW, "last": NOW + 2, "count": 2},
        {"message": "no broker", "first": NOW + 1, "last": NOW + 1, "count": 1},
    ]


def test_status_of_writes(it: Progress, clock: Clock) -> None:
    """Rows/s are those of each partition; a batch's messages and time are means of the last seconds, else null."""
    for partition in (A, B):
        it.leased(partition, 0)
    it.written(written(100), 0.1)
    it.written(written(300, first=100), 0.3)
    status = it.status({})
    assert [partition["rows_per_second"] for partition in status["partitions"]] == [400 / RATE_WINDOW, 0.0]
    assert (status["batch_messages"], status["batch_write_seconds"]) == (200.0, 0.2)
    clock.now += RATE_WINDOW + 0.1
    status = it.status({})
    assert (status["batch_messages"], status["batch_write_seconds"], status["rows_per_second"]) == (None, None, 0.0)


def test_waits_for_connections_are_measured(it: Progress) -> None:
    """What a batch has waited for a connection is in the metrics, once for each batch with messages."""
    batch = written(3)
    batch.waited = 1.5
    empty = written(0)
    it.taken([batch, empty])
    assert sample(it, "connection_wait_seconds_sum") == 1.5
    assert sample(it, "connection_wait_seconds_count") == 1.0


def test_written_after_release(it: Progress) -> None:
    """A batch that commits while its partition goes is counted, and brings no partition back."""
    it.leased(A, 0)
    it.released(A)
    it.written(written(3), 0.1)
    assert (it.totals.written, it.partitions) == (3, {})


def test_no_line_for_a_message(it: Progress, caplog: pytest.LogCaptureFixture) -> None:
    """Good batches are written without a line."""
    for number in range(50):
        it.written(written(10, first=10 * number), 0.1)
    assert lines(caplog) == []


def test_letters_are_told_at_intervals(it: Progress, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A steady trickle of letters is one line for each interval, with all since the last line."""
    letters = [written(2, refused=(reason,)) for reason in REASONS]
    for letter in letters:
        letter.lettered = {0}
    for letter in letters[:3]:
        it.written(letter, 0.1)
    clock.now += LETTERS_INTERVAL
    it.written(letters[3], 0.1)
    assert lines(caplog) == ["dead-lettered", "dead-lettered"]
    told: list[dict[str, Any]] = [vars(record) for record in caplog.records]
    assert [each["reasons"] for each in told] == [{"type": 1}, {"type": 2, "missing": 1}]


def test_rate(it: Progress, clock: Clock) -> None:
    """Rows/s are those of the last seconds alone."""
    it.written(written(100), 0.1)
    assert it.rate() == 100 / RATE_WINDOW
    clock.now += RATE_WINDOW + 0.1
    assert it.rate() == 0.0


@pytest.mark.parametrize(
    ("checkpoint", "high", "oldest", "expected"),
    [
        (0, None, None, (0, 0.0)),
        (10, 10, None, (0, 0.0)),
        (10, 15, Fake(10, int((NOW - 30) * 1000)), (5, 30.0)),
        (10, 15, Fake(10, int((NOW - 30) * 1000), 0), (5, 30.0)),
        (10, 15, None, (5, 0.0)),
        (20, 15, None, (0, 0.0)),
        (10, 15, Fake(10, int((NOW + 30) * 1000)), (5, 0.0)),
        (10, 15, Fake(10, -1), (5, 0.0)),
    ],
)
def test_lag(it: Progress, checkpoint: int, high: int | None, oldest: Fake | None, expected: tuple[int, float]) -> None:
    """Lag is messages to the high watermark, and the age of the oldest unwritten message; never negative."""
    it.leased(A, checkpoint)
    if high is not None:
        it.high[A] = high
    assert it.lag({A: oldest}) == {A: expected}
    assert sample(it, "lag_messages", topic="orders", partition="0") == expected[0]
    assert sample(it, "lag_seconds", topic="orders", partition="0") == expected[1]


def test_lag_of_what_was_not_received(it: Progress) -> None:
    """With more on the broker and nothing received, the last written message's age is the lag."""
    it.leased(A, 0)
    it.high[A] = 20
    it.written(written(10, ago=40.0), 0.1)
    assert it.lag({A: None}) == {A: (10, 40.0)}


def test_lag_after_idle_times(it: Progress, clock: Clock) -> None:
    """What came after an hour without messages is as old as the moment when it was seen to be there, not an hour."""
    it.leased(A, 0)
    it.written(written(10, ago=3600.0), 0.1)
    it.watermarks({A: 10})
    assert it.lag({A: None}) == {A: (0, 0.0)}
    it.watermarks({A: 12})
    clock.now += 5
    it.watermarks({A: 13})
    assert it.lag({A: None}) == {A: (3, 5.0)}


def test_lag_of_a_halted_handler_grows(it: Progress, clock: Clock) -> None:
    """The oldest message that a halted handler had received stays the oldest that is not written."""
    it.leased(A, 10)
    it.watermarks({A: 15})
    it.lag({A: Fake(10, int((NOW - 30) * 1000))})
    it.halt(Halt("breaker", "too much"))
    clock.now += 60
    assert it.lag({}) == {A: (5, 90.0)}


def test_released(it: Progress) -> None:
    """A partition that went has no gauges any more, and its counters stay."""
    it.leased(A, 0)
    it.consumed(A, 5)
    it.lag({})
    it.released(A)
    it.released(B)
    assert sample(it, "lag_messages", topic="orders", partition="0") is None
    assert sample(it, "messages_consumed_total", topic="orders", partition="0") == 5.0


def test_status(it: Progress) -> None:
    """The status has the totals, and each partition in order."""
    for partition, high in ((B, 9), (A, 7)):
        it.leased(partition, 4)
        it.high[partition] = high
    status = it.status({B: Fake(4, int((NOW - 3) * 1000))})
    assert (status["lag_messages"], status["lag_seconds"]) == (8, 3.0)
    assert [(p["partition"], p["checkpoint"], p["high_watermark"]) for p in status["partitions"]] == [
        (0, 4, 7),
        (1, 4, 9),
    ]


def test_total_lag() -> None:
    """The lag of several partitions is the sum of messages and the largest age."""
    assert total_lag([(3, 1.0), (4, 9.0), (0, 0.0)]) == (7, 9.0)
    assert total_lag([]) == (0, 0.0)


def test_the_real_clock() -> None:
    """Without a test's clock a commit is stamped with the time of day."""
    it = Progress(next(_names))
    it.written(written(1), 0.1)
    assert it.last_commit == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("error_text", [False, True])
def test_the_databases_words(clock: Clock, caplog: pytest.LogCaptureFixture, error_text: bool) -> None:
    """The line about poison has what the database said of the last, in one line, where that is wished alone."""
    clock.now += 1
    it = Progress(next(_names), error_text=error_text)
    poison = written(2)
    poison.refused = {0: Refusal(reason="rejected", stage="write", error="E", message="refused", words="by\na secret")}
    it.written(poison, 0.1)
    (record,) = caplog.records
    assert vars(record).get("error") == ("refused: by a secret" if error_text else None)
    assert ("secret" in str(vars(record))) is error_text
