"""The daemon, and what is typed beside it while it runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from consumerd.cli.options import (
    EXIT_FAILED,
    EXIT_USAGE,
    ConfigOption,
    LevelOption,
    Output,
    OutputOption,
    PropertyOption,
    complete,
    fail,
    load,
    running,
)
from consumerd.errors import ConsumerdError

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer()


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
) -> None:
    """Run the daemon: every handler, until SIGTERM or Ctrl-C."""
    loaded = load(config, properties, log_level)
    known = {handler.name for handler in loaded.handlers}
    for name in handlers or []:
        if name not in known:
            fail(f"--handler {name}: no such handler; there are {', '.join(sorted(known))}", EXIT_USAGE)
    from consumerd.daemon import Daemon  # noqa: PLC0415 - what only `run` needs

    async def daemon() -> int:
        return await Daemon(loaded, handlers or (), until_end=until_end).run()

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
