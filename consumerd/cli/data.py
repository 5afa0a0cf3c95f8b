"""Where the data stands: how far behind it is, and the offsets that decide where it goes on."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer looks at it
from typing import Annotated

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

app = typer.Typer()
offsets = typer.Typer(help="The checkpoint and Kafka's committed offset of each partition: shown, and set.")
app.add_typer(offsets, name="offsets")


@app.command()
def lag(
    handlers: Annotated[
        list[str] | None, typer.Argument(metavar="[HANDLER]...", help="These handlers; all when none is named.")
    ] = None,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=0, metavar="N", help="Exit status 1 above this time lag.")
    ] = None,
) -> None:
    """Show how far behind each partition is, in messages and in time, whether or not the daemon runs.

    Time lag is the age of the oldest message that is not yet written. Exit status: 0; 1 when a partition is further
    behind than --max-seconds, or its lag cannot be told; 75 when broker or database is not reached.
    """
    loaded = load(config, properties, log_level)
    names = handlers or [handler.name for handler in loaded.handlers]
    wanted = [chosen(loaded, name) for name in names]
    from consumerd.commands.lag import lags_of_all, text  # noqa: PLC0415 - what only `lag` needs

    lags, problems = complete(lags_of_all(loaded, wanted))
    for line in [text(lags)] if output is Output.text and lags else [each.line() for each in lags]:
        typer.echo(line)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems or (max_seconds is not None and any(each.exceeds(max_seconds) for each in lags)):
        sys.exit(EXIT_FAILED)


@offsets.command()
def show(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show where each partition stands: checkpoint, Kafka's committed offset and whose it is, log, topic."""
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.offsets import lines, shown, table  # noqa: PLC0415 - what only `offsets` needs

    stands = complete(shown(loaded, one))
    typer.echo(table(stands) if output is Output.text else "\n".join(lines(stands)))


@offsets.command()
def reset(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", metavar="TOPIC[:0,1]", help="A topic, or some of its partitions; may be repeated."),
    ] = None,
    all_topics: Annotated[bool, typer.Option("--all-topics", help="All topics of the handler.")] = False,
    to_datetime: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="The first offset at or after a time: 2026-01-31T00:00:00.000, UTC or +01:00."
        ),
    ] = None,
    by_duration: Annotated[
        str | None, typer.Option(metavar="DURATION", help="The first offset of the last PnDTnHnMnS, or 90s 5m 1h 1d.")
    ] = None,
    to_earliest: Annotated[bool, typer.Option("--to-earliest", help="The start of the log.")] = False,
    to_latest: Annotated[bool, typer.Option("--to-latest", help="The end of the log.")] = False,
    to_current: Annotated[bool, typer.Option("--to-current", help="Where it stands.")] = False,
    to_offset: Annotated[int | None, typer.Option(min=0, metavar="OFFSET", help="An offset.")] = None,
    shift_by: Annotated[int | None, typer.Option(metavar="N", help="N further, or back where N is negative.")] = None,
    from_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines of topic,partition,offset, as --export prints them.")
    ] = None,
    export: Annotated[bool, typer.Option("--export", help="Print the new offsets as CSV, for --from-file.")] = False,
    execute: Annotated[bool, typer.Option("--execute", help="Set the offsets.")] = False,
) -> None:
    """Set where a handler that is stopped goes on, as kafka-consumer-groups does: checkpoint and Kafka's offset both.

    Exactly one of --to-datetime, --by-duration, --to-earliest, --to-latest, --to-current, --to-offset, --shift-by and
    --from-file, and --topic or --all-topics (not with --from-file). A dry run without --execute.
    """
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands import aim as aims  # noqa: PLC0415 - what only `offsets` needs
    from consumerd.commands.offsets import planned  # noqa: PLC0415
    from consumerd.commands.reset import execute as set_offsets  # noqa: PLC0415

    try:
        aim = aims.aim(
            {
                "to-datetime": to_datetime,
                "by-duration": by_duration,
                "to-earliest": to_earliest or None,
                "to-latest": to_latest or None,
                "to-current": to_current or None,
                "to-offset": to_offset,
                "shift-by": shift_by,
                "from-file": from_file,
            }
        )
        scope = aims.scope(topic or (), all_topics=all_topics, aim=aim)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    plan = complete(planned(loaded, one, aim, scope))
    if export:
        typer.echo(plan.csv())
    else:
        typer.echo(plan.text() if output is Output.text else "\n".join(plan.lines()))
    for warning in plan.warnings:
        typer.echo(warning, err=True)
    if not execute:
        typer.echo("Nothing was changed; --execute sets these offsets.", err=True)
        return
    for told in complete(set_offsets(loaded, one, plan)):
        typer.echo(told, err=True)
