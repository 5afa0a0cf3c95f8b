"""The daemon, and what is typed beside it while it runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumerd.cli.options import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_NOT_REACHED,
    EXIT_USAGE,
    ConfigOption,
    HandlerArgument,
    LevelOption,
    Output,
    OutputOption,
    PropertyOption,
    complete,
    fail,
    load,
    reader,
    running,
)
from consumerd.errors import ConfigError, ConsumerdError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

app = typer.Typer()

GapOption = Annotated[
    list[str] | None,
    typer.Option("--accept-gap", metavar="TOPIC:PARTITION", help="Go on after what is gone from the log."),
]
NewTopicOption = Annotated[
    list[str] | None,
    typer.Option("--accept-new-topic", metavar="TOPIC", help="Read the topic that was made in place of the old one."),
]
SkipOption = Annotated[
    list[str] | None, typer.Option("--skip", metavar="TOPIC:PARTITION@OFFSET", help="Pass over this one message.")
]


@app.command()
def run(
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    handlers: Annotated[
        list[str] | None, typer.Option("--handler", metavar="NAME", help="This handler alone; may be repeated.")
    ] = None,
    *,
    until_end: Annotated[
        bool,
        typer.Option(
            "--until-end",
            help="Stop once all is written that the topics held at the start: status 0, 1 where that could not be.",
        ),
    ] = False,
    exit_on_halt: Annotated[
        bool, typer.Option("--exit-on-halt", help="Leave with status 1 once every handler is halted.")
    ] = False,
) -> None:
    """Run the daemon: every handler, until SIGTERM or Ctrl-C. SIGHUP reads the files again."""
    loaded = load(config, properties, log_level)
    known = {handler.name for handler in loaded.handlers}
    for name in handlers or []:
        if name not in known:
            fail(f"--handler {name}: no such handler; there are {', '.join(sorted(known))}", EXIT_USAGE)
    from consumerd.daemon import Daemon  # noqa: PLC0415 - what only `run` needs

    async def daemon() -> int:
        read = reader(loaded.path, properties, log_level)
        return await Daemon(loaded, handlers or (), until_end=until_end, exit_on_halt=exit_on_halt, read=read).run()

    sys.exit(complete(daemon()))


@app.command()
def status(
    handler: Annotated[
        str | None, typer.Argument(metavar="[HANDLER]", help="This handler alone, with its partitions.")
    ] = None,
    config: ConfigOption = None,
    properties: PropertyOption = None,  # noqa: ARG001 - as every command
    log_level: LevelOption = None,  # noqa: ARG001
    output: OutputOption = Output.text,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show what the running daemon does: states, lag, rates, errors, and after a halt the command that goes on.

    It is asked at daemon.listen. Exit status 1: none answers.
    """
    daemon = running(config)
    from consumerd.commands import status as it  # noqa: PLC0415 - what only `status` needs

    look = partial(it.ask, daemon, handler)
    terminal = sys.stdout.isatty()
    show = partial(it.text, whole=handler is not None) if terminal or not watch else it.line
    try:
        if not watch:
            typer.echo(it.as_json(look()) if output is Output.json else show(look()))
        elif output is Output.json:
            _follow(it.watch(look, it.as_json))
        else:
            _follow(it.watch(look, show, screen=terminal), *([it.ENTER, it.LEAVE] if terminal else ["", ""]))
    except it.NoSuchHandler as error:
        fail(str(error), EXIT_USAGE)
    except ConsumerdError as error:
        fail(str(error), EXIT_FAILED)


def _follow(frames: Iterator[str], enter: str = "", leave: str = "") -> None:
    """Print what comes until Ctrl-C, which is how it is meant to end."""
    try:
        typer.echo(enter, nl=False)
        with suppress(KeyboardInterrupt):
            for frame in frames:
                typer.echo(frame, nl=False)
    finally:
        typer.echo(leave, nl=False)


@app.command()
def pause(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Have a handler read and write nothing until it is resumed; it stays in its group."""
    _ask(config, properties, log_level, output, command="pause", handler=handler)


@app.command()
def resume(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
    *,
    accept_gap: GapOption = None,
    accept_new_topic: NewTopicOption = None,
    skip: SkipOption = None,
    breaker: Annotated[bool, typer.Option("--breaker", help="Forget what the breaker has counted.")] = False,
) -> None:
    """End a pause, or go on after a halt in the way that the halt names: what it shows is accepted, nothing else.

    Each option but --breaker may be repeated.
    """
    _ask(
        config,
        properties,
        log_level,
        output,
        command="resume",
        handler=handler,
        accept_gap=accept_gap or [],
        accept_new_topic=accept_new_topic or [],
        skip=skip or [],
        breaker=breaker,
    )


@app.command()
def restart(
    handler: HandlerArgument,
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Drain a handler and start it anew, one that is halted too; it halts again while the cause is there."""
    _ask(config, properties, log_level, output, command="restart", handler=handler)


@app.command()
def reload(
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Have the daemon read its files again; a mistake in them changes nothing. SIGHUP does the same.

    Handlers whose files say the same do not notice.
    """
    _ask(config, properties, log_level, output, command="reload")


def _ask(
    config: Path | None,
    properties: list[str] | None,
    log_level: str | None,
    output: Output,
    **request: Any,  # noqa: ANN401 - the fields of a request
) -> None:
    """Send a request to the daemon that runs, print what it says, and exit with what that means."""
    from consumerd import loader  # noqa: PLC0415 - keeps `--help` quick
    from consumerd.commands.control import NotReachedError, ask, line  # noqa: PLC0415 - what only these need
    from consumerd.control import Request  # noqa: PLC0415 - as above

    reader(config, properties, log_level)  # a mistake in what was typed is said here as well
    try:
        path, socket = loader.control_of(config)
        answer = ask(socket, Request(config=str(path), **request))
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    except NotReachedError as error:
        fail(str(error), EXIT_NOT_REACHED)
    if output is Output.json:
        typer.echo(line(answer))
    elif answer.ok:
        typer.echo(answer.message)
    else:
        typer.echo(answer.message, err=True)
    raise typer.Exit(answer.code)
