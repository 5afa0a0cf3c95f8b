"""The commands, a file for each occasion on which they are typed. The only place that prints or exits."""

from __future__ import annotations

from typing import Annotated

import typer

from consumerd import __version__
from consumerd.cli import data, letters, replaying, running, setting_up

app = typer.Typer(
    name="consumerd",
    help="Kafka topics into Postgres, exactly once, in batches.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"consumerd {__version__}")
        raise typer.Exit


app.add_typer(running.app)
app.add_typer(setting_up.app)
app.add_typer(data.app)
app.add_typer(replaying.app)
app.add_typer(letters.app, name="dlq")
