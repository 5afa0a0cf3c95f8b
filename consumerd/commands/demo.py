"""`consumerd demo`: the real daemon on an embedded broker and Postgres, killed half-way, and every record checked.

`_perform` is the story, from top to bottom. What it is made of is in `demo_parts`; what decides is `check.compare`.
Everything lives in one temporary folder and in processes that die with this one; SIGINT, SIGTERM and SIGHUP end the
demo by an exception, and from there on are ignored until all is cleaned up.
"""

from __future__ import annotations

import gc
import signal
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consumerd.commands.demo_parts import files, orders
from consumerd.commands.demo_parts.broker import Broker
from consumerd.commands.demo_parts.check import compare
from consumerd.commands.demo_parts.database import Database
from consumerd.commands.demo_parts.process import Daemon, DemoFailed, tail
from consumerd.commands.demo_parts.screen import Screen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from consumerd.commands.demo_parts.check import Produced, Verdict

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LETTER_PARTITIONS = 4
POLL_INTERVAL = 0.02
"""Seconds between two looks at the checkpoints: 4,000 messages at 200,000 a second."""
CHECK_INTERVAL = 0.5
"""Seconds between two looks whether the daemon still runs."""
STANDSTILL = 30.0
"""Seconds without progress after which the demo gives up."""
LAG_TIMEOUT = 5.0
"""Seconds for the daemon to see that it has caught up; it looks at the ends of the logs once a second."""
CRASHES = 1

SWITCHED_OFF = (
    "Switched off, because the embedded broker cannot do it: admin calls (kafka.admin = false: topic ids and the "
    "dead-letter topic's settings are not looked at) and starting at a time."
)


class Stopped(BaseException):
    """A signal ended the demo; the argument is its number. Not an Exception: nothing on the way may swallow it."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """What runs, and what it runs on."""

    screen: Screen
    folder: Path
    broker: Broker
    database: Database
    daemon: Daemon
    expected: Mapping[str, list[Produced]]
    began: float = 0.0
    seconds: float = 0.0
    """Time in which the daemon was seen to write."""
    messages: int = 0
    """What it settled in that time."""


def play(*, keep: bool) -> int:
    """Run the demo; return the exit status: 0 only if every record is where it must be."""
    gc.disable()  # a million objects that live to the end: looking through them again and again takes seconds
    screen = Screen()
    try:
        with _signals():
            return _play(screen, keep=keep)
    except Stopped as stopped:
        screen.say("Stopped; everything is cleaned up.")
        return 128 + int(stopped.args[0])


def _play(screen: Screen, *, keep: bool) -> int:
    with ExitStack() as stack:
        try:
            began = time.monotonic()
            stage = _set(screen, stack)
            stage.began = began
            try:
                code = _perform(stage, keep=keep)
                if keep:
                    _wait_for_end(stage)
            except DemoFailed as failure:
                return _report(screen, failure, stage.daemon)
        except DemoFailed as failure:
            return _report(screen, failure, None)
        finally:
            _ignore_signals()
    return code


def _report(screen: Screen, failure: DemoFailed, daemon: Daemon | None) -> int:
    if daemon is not None:
        screen.say(f"\nThe end of the daemon's log:\n{tail(daemon.log)}\n")
    screen.say(f"FAILED: {failure}")
    return 1


def _set(screen: Screen, stack: ExitStack) -> Stage:
    """Start broker and Postgres, produce, write the daemon's files."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="consumerd-demo-")))
    screen.say(f"Starting an embedded broker and an embedded Postgres in {folder}")
    database = Database(_made(folder / "postgres"))
    stack.callback(database.close)
    database.initialise()
    letters = {_letters_of(name): LETTER_PARTITIONS for name in orders.HANDLERS}
    broker = Broker({orders.TOPIC: orders.PARTITIONS, **letters})
    stack.callback(broker.close)
    screen.say(SWITCHED_OFF)
    made = orders.make(orders.ORDERS, int(time.time() * 1000))
    with screen.bar(f"Producing {len(made):,} orders to {orders.PARTITIONS} partitions, lz4", len(made)) as progress:
        broker.produce(orders.TOPIC, [(order.source, order.message) for order in made], progress)
    if sum(broker.bounds(orders.TOPIC).values()) != len(made):
        raise DemoFailed("the broker does not have what was produced")
    database.start()
    for statement in orders.TABLES:
        database.execute(statement)
    daemon = Daemon(files.write(folder, broker.address, database.dsn), folder / "consumerd.log")
    stack.callback(daemon.kill)
    return Stage(
        screen=screen,
        folder=folder,
        broker=broker,
        database=database,
        daemon=daemon,
        expected=orders.expected(made),
    )


def _perform(stage: Stage, *, keep: bool) -> int:
    """Run the daemon, crash it, run it again, compare; return the exit status."""
    say, total = stage.screen.say, orders.ORDERS * len(orders.HANDLERS)
    with stage.screen.bar("Running `consumerd run`: orders are appended, customers upserted", total) as progress:
        stage.daemon.start()
        _until_settled(stage, total // 2, progress)
        stage.daemon.kill()
        settled = sum(stage.database.settled().values())
        if settled >= total:
            raise DemoFailed("the daemon was through before it could be killed")
        say(f"Killed it by SIGKILL with {settled:,} of {total:,} messages settled; starting it again")
        stage.daemon.start()
        _until_settled(stage, total, progress)
    lags = _lags(stage)
    if not keep:
        say("Caught up; stopping it by SIGTERM")
        stage.daemon.stop()
    say("Comparing tables and dead-letter topics with what was produced, record by record")
    verdicts = {name: _verdict(stage, name) for name in orders.HANDLERS}
    return _judge(stage, verdicts, lags)


def _until_settled(stage: Stage, goal: int, progress: Callable[[int], None]) -> None:
    """Wait until the checkpoints say that so many messages are settled; raises DemoFailed when the daemon stops."""
    begun: tuple[float, int] | None = None
    last = (time.monotonic(), -1)
    next_check = 0.0
    while True:
        now = time.monotonic()
        settled = sum(stage.database.settled().values())
        if settled != last[1]:
            progress(settled)
            # The first change is where a stretch of writing begins: what came before was starting up.
            begun = begun or ((now, settled) if last[1] >= 0 else None)
            last = (now, settled)
        if settled >= goal:
            break
        if now >= next_check:
            stage.daemon.check()
            next_check = now + CHECK_INTERVAL
        if now - last[0] > STANDSTILL:
            raise DemoFailed(f"the daemon stands still at {settled:,} of {goal:,} messages")
        time.sleep(POLL_INTERVAL)
    if begun is not None:
        stage.seconds += last[0] - begun[0]
        stage.messages += last[1] - begun[1]


def _lags(stage: Stage) -> dict[str, int]:
    """Return each handler's lag as the daemon tells it, which must come down to 0 in a moment."""
    deadline = time.monotonic() + LAG_TIMEOUT
    while True:
        lags = {name: int(handler["lag_messages"]) for name, handler in (stage.daemon.status() or {}).items()}
        if (lags and not any(lags.values())) or time.monotonic() > deadline:
            return {name: lags.get(name, -1) for name in orders.HANDLERS}
        time.sleep(POLL_INTERVAL)


def _verdict(stage: Stage, name: str) -> Verdict:
    letters = stage.broker.letters(_letters_of(name), orders.TOPIC)
    return compare(stage.expected[name], stage.database.rows(name), letters, crashes=CRASHES)


def _judge(stage: Stage, verdicts: dict[str, Verdict], lags: dict[str, int]) -> int:
    """Show the result; return the exit status."""
    refused = sum(verdict.found_letters.total() for verdict in verdicts.values())
    share = 1 - refused / (orders.ORDERS * len(verdicts))
    rate = stage.messages * share / stage.seconds if stage.seconds else 0.0
    found = list(verdicts.values())
    stage.screen.table(["", *verdicts], [*_lines(found), ["lag", *(f"{lags[name]:,}" for name in verdicts)]])
    stage.screen.say(
        f"rows/s: {rate:,.0f}, both tables together, while the daemon was writing; "
        f"{time.monotonic() - stage.began:.1f} s in all"
    )
    faults = [f"{name}: {fault}" for name, verdict in verdicts.items() for fault in verdict.faults]
    faults += [f"{name}: the daemon tells a lag of {lag:,} messages" for name, lag in lags.items() if lag]
    stage.screen.faults(faults)
    lost, doubled = sum(len(verdict.lost) for verdict in found), sum(len(verdict.doubled) for verdict in found)
    wrong = sum(len(verdict.wrong) for verdict in found)
    stage.screen.say(f"lost {lost}, doubled {doubled}" + (f", wrong {wrong}" if wrong else ""))
    return 1 if faults else 0


def _lines(verdicts: list[Verdict]) -> list[list[str]]:
    """Return the lines of the final table: a name, and a number for each handler."""
    reasons = sorted({reason for verdict in verdicts for reason in verdict.expected_letters | verdict.found_letters})

    def line(name: str, *numbers: int) -> list[str]:
        return [name, *(f"{number:,}" for number in numbers)]

    return [
        line("produced", *(verdict.produced for verdict in verdicts)),
        line("rows in the table", *(verdict.written for verdict in verdicts)),
        *(
            [
                f"dead-lettered: {reason} (expected)",
                *(f"{v.found_letters[reason]:,} ({v.expected_letters[reason]:,})" for v in verdicts),
            ]
            for reason in reasons
        ),
        line("letters repeated by the crash", *(verdict.repeated for verdict in verdicts)),
        line("lost", *(len(verdict.lost) for verdict in verdicts)),
        line("doubled", *(len(verdict.doubled) for verdict in verdicts)),
        line("wrong", *(len(verdict.wrong) for verdict in verdicts)),
    ]


def _wait_for_end(stage: Stage) -> None:
    """Leave everything running until a signal; then stop the daemon in order."""
    address, tables = stage.daemon.address, ", ".join(orders.HANDLERS)
    stage.screen.say(
        f"""
Everything is left running:
  tables    {stage.database.psql}    (tables {tables}; consumerd.checkpoint)
  metrics   http://{address}/metrics
  status    http://{address}/status
  broker    {stage.broker.address}    (topics {orders.TOPIC}, {", ".join(map(_letters_of, orders.HANDLERS))})
  log       {stage.daemon.log}
  config    {stage.folder / "consumerd.toml"}
Ctrl-C ends and removes all of it."""
    )
    try:
        while True:
            time.sleep(CHECK_INTERVAL)
            stage.daemon.check()
    except Stopped:
        _ignore_signals()
        stage.daemon.stop()


def _letters_of(handler: str) -> str:
    """Return the dead-letter topic of a handler, by the daemon's default."""
    return f"consumerd.{handler}.dlq"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@contextmanager
def _signals() -> Iterator[None]:
    """Let a signal end the demo by an exception."""

    def stop(number: int, _: object) -> None:
        _ignore_signals()
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
