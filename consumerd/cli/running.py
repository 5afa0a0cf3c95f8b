"""The daemon, and what is typed beside it while it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from consumerd.cli.options import EXIT_USAGE, ConfigOption, LevelOption, PropertyOption, complete, fail, load

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
