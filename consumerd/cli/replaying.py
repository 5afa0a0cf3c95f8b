"""What is typed about the messages themselves: to replay them."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from consumerd.cli.options import (
    EXIT_FAILED,
    EXIT_NOT_REACHED,
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
from consumerd.errors import UsageError

app = typer.Typer()


@app.command()
def replay(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    start: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="TIME|T:P@OFFSET", help="Where it begins. Default: at the logs' starts."),
    ] = None,
    end: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TIME|T:P@OFFSET", help="Before what it ends. Default: at the logs' ends."),
    ] = None,
    last: Annotated[str | None, typer.Option("--last", metavar="2h", help="Instead of --from: so long ago.")] = None,
    topics: Annotated[
        list[str] | None, typer.Option("--topic", metavar="T[:0,1]", help="These alone; may be repeated.")
    ] = None,
    into: Annotated[str | None, typer.Option("--into", metavar="TABLE", help="Write to another table.")] = None,
    rate: Annotated[int | None, typer.Option("--rate", min=1, help="Messages/s, at most.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Offsets that a dry run tries.")] = 10_000,
    accept_gap: Annotated[
        bool, typer.Option("--accept-gap", help="Leave out what retention has deleted of the range.")
    ] = False,
    dead_letter: Annotated[
        bool, typer.Option("--dead-letter", help="Send a letter for each message that is refused, once more.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the replays of this handler.")] = False,
    forget: Annotated[
        int | None, typer.Option("--forget", metavar="ID", help="Forget a replay, with --execute.")
    ] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Replay; else nothing is changed.")] = False,
) -> None:
    """Write a range of messages once more, into the handler's table or another, each exactly once; no group is joined.

    A dry run without --execute: it writes the first messages and rolls back. The same command goes on with a replay
    that was stopped or killed. Exit status: 0 it has ended; 1 it has not; 75 broker or database not reached.
    """
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands import ranges  # noqa: PLC0415 - what only `replay` needs
    from consumerd.commands import replay as command  # noqa: PLC0415
    from consumerd.commands import replay_text as told  # noqa: PLC0415
    from consumerd.commands.replay_plan import Wish  # noqa: PLC0415

    text = output is Output.text
    if forget is not None and execute:
        complete(command.forget(loaded, one, forget))
        typer.echo(f"replay {forget} is forgotten", err=True)
    if forget is not None or list_:
        records = complete(command.records(loaded, one))
        for line in [told.listed(records)] if text else map(told.record_json, records):
            typer.echo(line)
        if forget is not None and not execute:
            typer.echo(f"Nothing was changed; --execute forgets replay {forget}.", err=True)
        return
    try:
        asked = ranges.parse(start or (), end or (), last, topics or (), now=dt.datetime.now(dt.UTC))
    except UsageError as error:
        fail(str(error), EXIT_USAGE)
    wish = Wish(asked=asked, into=into, rate=rate, accept_gap=accept_gap, dead_letter=dead_letter)
    prepared = complete(command.plan(loaded, one, wish))
    if text:
        typer.echo(told.planned(prepared))
    teller = told.Teller()
    if not execute:
        result = complete(command.try_out(loaded, prepared, count, teller))
        teller.over()
        typer.echo(told.tried(prepared, result, wish) if text else told.as_json(prepared, result))
    else:
        running = command.execute(loaded, one, wish, prepared, teller)
        number, result, record = complete(running)
        teller.over()
        line = told.as_json(prepared, result, number=number, record=record)
        typer.echo(told.ended(number, result, record) if text else line)
    if result.halt:
        fail(result.halt, EXIT_FAILED)
    if result.stopped:
        sentence = "stopped; the same command goes on" if execute else "stopped"
        fail(sentence, EXIT_FAILED if result.drained else EXIT_NOT_REACHED)
