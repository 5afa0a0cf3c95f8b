"""What the commands have in common: options, exit codes, and how a mistake becomes a sentence and a code."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
import uvloop

from consumerd.errors import ConfigError, ConsumerdError, Outage, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from consumerd.config import Config, DaemonConfig, HandlerConfig

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_REACHED = 75
EXIT_CONFIG = 78

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


def load(path: Path | None, properties: list[str] | None, log_level: str | None, *, first: bool = False) -> Config:
    """Read the configuration and set up the logs; exits with every mistake."""
    from consumerd import log  # noqa: PLC0415 - keeps `--help` quick

    try:
        config = reader(path, properties, log_level, first=first)()
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    log.set_up(config.log)
    return config


def reader(
    path: Path | None, properties: list[str] | None, log_level: str | None, *, first: bool = False
) -> Callable[[], Config]:
    """Return what reads the configuration, now or again, with what was typed; exits with a mistake of that."""
    from consumerd import loader  # noqa: PLC0415 - keeps `--help` quick

    overrides = {}
    for entry in properties or []:
        name, separator, value = entry.partition("=")
        if not separator:
            fail(f"-X {entry}: write NAME=VALUE", EXIT_USAGE)
        overrides[name] = value
    level = {} if log_level is None else {"level": _level(log_level)}

    def read() -> Config:
        config = loader.load(path, overrides=overrides, first=first)
        return config.model_copy(update={"log": config.log.model_copy(update=level)})

    return read


def running(path: Path | None) -> DaemonConfig:
    """Read where the running daemon is; exits with the mistakes of [daemon], and of nothing else."""
    from consumerd import loader  # noqa: PLC0415 - keeps `--help` quick

    try:
        return loader.load_daemon(path)
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)


def chosen(config: Config, name: str) -> HandlerConfig:
    """Return a handler by its name; exits with those that there are."""
    handlers = {handler.name: handler for handler in config.handlers}
    if name not in handlers:
        fail(f"there is no handler {name}; there are: {', '.join(sorted(handlers))}", EXIT_USAGE)
    return handlers[name]


def _level(name: str) -> str:
    if name not in {"debug", "info", "warning", "error"}:
        fail(f"--log-level {name}: one of debug, info, warning, error", EXIT_USAGE)
    return name


def complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end; an error of ours becomes a sentence and an exit code."""
    try:
        return uvloop.run(coroutine)
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    except UsageError as error:
        fail(str(error), EXIT_USAGE)
    except Outage as error:
        fail(str(error), EXIT_NOT_REACHED)
    except ConsumerdError as error:
        fail(str(error), EXIT_FAILED)


def fail(sentence: str, code: int) -> NoReturn:
    """Print a sentence and exit."""
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
