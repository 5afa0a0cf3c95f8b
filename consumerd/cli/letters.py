"""What is typed when messages have become letters: `consumerd dlq`."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import uuid
from functools import partial
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from consumerd.cli.options import (
    EXIT_FAILED,
    EXIT_USAGE,
    ConfigOption,
    HandlerArgument,
    LevelOption,
    Output,
    OutputOption,
    PropertyOption,
    chosen,
    complete,
    fail,
    load,
)
from consumerd.errors import PoisonReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from consumerd.commands.dlq.redrive import Waits, Way
    from consumerd.commands.dlq.survey import Filter
    from consumerd.config import Config, HandlerConfig
    from consumerd.letters import Letters, Status

app = typer.Typer(no_args_is_help=True, help="Letters: what could not become a row. List, look, redrive, discard.")

STATUSES: tuple[Status, ...] = ("open", "failed", "redriven", "discarded")

ReasonOption = Annotated[
    list[str] | None, typer.Option("--reason", help="Of this reason (`type`, `rejected`, ...); may be repeated.")
]
ErrorOption = Annotated[
    list[str] | None,
    typer.Option("--error", metavar="CLASS", help="Of this class of error (`UniqueViolation`); may be repeated."),
]
FromOption = Annotated[
    str | None, typer.Option("--from", metavar="TIME", help="Written at this time or later: 2026-01-31T00:00:00Z.")
]
ToOption = Annotated[str | None, typer.Option("--to", metavar="TIME", help="Written before this time.")]
SourceOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="T:P@A-B", help="Of a topic, T:P a partition, T:P@A an offset; may be repeated."),
]
StatusOption = Annotated[
    list[str] | None, typer.Option("--status", help="open, failed, redriven or discarded; may be repeated.")
]


def _filter(  # noqa: PLR0917 - as they are typed
    reasons: list[str] | None,
    errors: list[str] | None,
    start: str | None,
    end: str | None,
    sources: list[str] | None,
    statuses: Sequence[str],
) -> Filter:
    from consumerd.commands.dlq.survey import Filter, moment, source  # noqa: PLC0415 - what only `dlq` needs

    known = get_args(PoisonReason)
    if unknown := set(reasons or ()) - set(known):
        fail(f"--reason {', '.join(sorted(unknown))}: one of {', '.join(known)}", EXIT_USAGE)
    if unknown := set(statuses) - set(STATUSES):
        fail(f"--status {', '.join(sorted(unknown))}: one of {', '.join(STATUSES)}", EXIT_USAGE)
    try:
        return Filter(
            reasons=frozenset(reasons or ()),
            errors=frozenset(errors or ()),
            start=None if start is None else moment(start),
            end=None if end is None else moment(end),
            sources=tuple(map(source, sources or ())),
            statuses=frozenset(statuses),
        )
    except ValueError as error:
        fail(str(error), EXIT_USAGE)


def _movable(statuses: list[str] | None, verb: str) -> tuple[Status, ...]:
    """Return the statuses of letters that are to be moved."""
    if "redriven" in (statuses or ()):
        fail(f"--status redriven: those are written already, and are not {verb}", EXIT_USAGE)
    return tuple(status for status in STATUSES if status in (statuses or ("open", "failed")))


def _letters(config: Config, handler: HandlerConfig) -> Letters:
    from consumerd.letters import Letters  # noqa: PLC0415 - what only `dlq` needs

    guarded = handler.checkpoint == "postgres"
    return Letters(config.postgres.schema_name, handler.group_id, run=str(uuid.uuid4()), who=_who(), guarded=guarded)


@app.command("list")
def list_(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    reasons: ReasonOption = None,
    errors: ErrorOption = None,
    start: FromOption = None,
    end: ToOption = None,
    sources: SourceOption = None,
    statuses: StatusOption = None,
) -> None:
    """Count letters by status, reason and class of error, with the first and the last of each."""
    which = _filter(reasons, errors, start, end, sources, statuses or ())
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.dlq.listing import groups, text  # noqa: PLC0415 - what only `dlq` needs
    from consumerd.commands.dlq.survey import survey  # noqa: PLC0415

    found, topic = complete(survey(loaded, one, _letters(loaded, one)))
    topic.close()
    grouped = groups(found.standings(which))
    for line in [text(grouped, found)] if output is Output.text else [group.line() for group in grouped]:
        typer.echo(line)


@app.command()
def show(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    reasons: ReasonOption = None,
    errors: ErrorOption = None,
    start: FromOption = None,
    end: ToOption = None,
    sources: SourceOption = None,
    statuses: StatusOption = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=10_000, help="Letters to show.")] = 10,
    values: Annotated[
        bool, typer.Option("--values", help="Print what was sent, too: key, value, and its headers' values.")
    ] = False,
) -> None:
    """Show the last letters whole: where they come from, why, and what has become of them."""
    which = _filter(reasons, errors, start, end, sources, statuses or ())
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.dlq.whole import last, line, text  # noqa: PLC0415 - what only `dlq` needs

    found = complete(last(loaded, one, _letters(loaded, one), which, count=count, values=values))
    for entry in found:
        typer.echo(text(entry) if output is Output.text else line(entry))
    if not found and output is Output.text:
        typer.echo("There is no such letter.")


@app.command()
def export(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    *,
    reasons: ReasonOption = None,
    errors: ErrorOption = None,
    start: FromOption = None,
    end: ToOption = None,
    sources: SourceOption = None,
    statuses: StatusOption = None,
) -> None:
    """Print letters whole as JSON, one on each line: key, value, headers, source, reason.

    What is UTF-8 stands there as text (`value`), other bytes as base64 (`value_base64`); so for `key` and headers.
    """
    which = _filter(reasons, errors, start, end, sources, statuses or ())
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.dlq.whole import each, line  # noqa: PLC0415 - what only `dlq` needs

    emit = lambda entry: typer.echo(line(entry))  # noqa: E731
    complete(each(loaded, one, _letters(loaded, one), which, emit, values=True))


@app.command()
def redrive(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    reasons: ReasonOption = None,
    errors: ErrorOption = None,
    start: FromOption = None,
    end: ToOption = None,
    sources: SourceOption = None,
    statuses: StatusOption = None,
    into: Annotated[
        str | None, typer.Option("--into", metavar="TABLE", help="Another table than the handler's.")
    ] = None,
    to_topic: Annotated[
        bool, typer.Option("--to-topic", help="Send the messages back to their topic instead; see --topic.")
    ] = False,
    topic: Annotated[str | None, typer.Option("--topic", help="With --to-topic: to this topic instead.")] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Write; without it nothing is changed.")] = False,
) -> None:
    """Write letters that are open or failed again, by the handler as it is now: rows exactly once, each letter's.

    A dry run without --execute: rows are tried in transactions that are rolled back. Exit status 1 when some failed
    again, or it was stopped.
    """
    takes = _movable(statuses, "redriven a second time")
    which = _filter(reasons, errors, start, end, sources, takes)
    if topic is not None and not to_topic:
        fail("--topic goes with --to-topic", EXIT_USAGE)
    if to_topic and into is not None:
        fail("--into is a table, and --to-topic sends to a topic: one of them", EXIT_USAGE)
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.dlq.redrive import redrive as run  # noqa: PLC0415 - what only `dlq` needs
    from consumerd.commands.dlq.straight import Straight  # noqa: PLC0415
    from consumerd.commands.dlq.to_topic import WARNING, ToTopic  # noqa: PLC0415

    letters = _letters(loaded, one)
    way: Callable[[Waits], Way]
    if to_topic:
        typer.echo(WARNING.format(topic=topic or "the topics that they came from"), err=True)
        way = partial(ToTopic, loaded, one, letters, topic=topic, execute=execute)
    else:
        way = partial(Straight, loaded, one, letters, into=into, execute=execute)

    report = complete(run(loaded, one, letters, which, way))
    told = report.line(execute=execute) if output is Output.json else report.text(execute=execute, rows=not to_topic)
    typer.echo(told)
    if not execute:
        typer.echo("Nothing was changed; --execute does it.", err=True)
    sys.exit(EXIT_FAILED if report.stopped or (execute and report.failed) else 0)


@app.command()
def discard(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    reasons: ReasonOption = None,
    errors: ErrorOption = None,
    start: FromOption = None,
    end: ToOption = None,
    sources: SourceOption = None,
    statuses: StatusOption = None,
    execute: Annotated[bool, typer.Option("--execute", help="Do it; without it nothing is changed.")] = False,
) -> None:
    """Note that letters are not to be redriven, with who and when. Nothing is deleted from the topic."""
    takes = _movable(statuses, "discarded")
    which = _filter(reasons, errors, start, end, sources, takes)
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.dlq.discard import discard as run  # noqa: PLC0415 - what only `dlq` needs

    found, moved = complete(run(loaded, one, _letters(loaded, one), which, execute=execute))
    if output is Output.json:
        typer.echo(f'{{"executed":{str(execute).lower()},"letters":{len(found)},"discarded":{moved}}}')
    else:
        taken = f" {len(found) - moved} were taken by another run meanwhile." if moved < len(found) else ""
        typer.echo(f"{moved} letters discarded.{taken}" if execute else f"{len(found)} letters would be discarded.")
    if not execute:
        typer.echo("Nothing was changed; --execute does it.", err=True)


def _who() -> str:
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # an id without a name, in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
