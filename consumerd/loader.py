"""Finds and reads consumerd.toml and handlers/*.toml, and tells every mistake of all of them at once.

    find ─► read ─► parse ─► `${NAME}` ─► validate (config.py) ─► conflicts between handlers ─► one Config
                      └─────────┴────────────┴──────────────────────┴─► problems, told as `file:line: key: sentence`

A step that finds mistakes does not end the reading: the next steps go on with what is sound, so that one run tells all.
A key path that has a problem already is not told twice. Lines are `key_lines`'; a path that is in no table
of its own (an inline table's key, a list's item, a missing key) gets the line of its nearest ancestor.
"""

import difflib
import json
import os
import re
import shlex
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from consumerd import file_trust
from consumerd.config import Config, DaemonConfig, HandlerConfig
from consumerd.credentials import dsn_password_key, looks_secret, parse_property
from consumerd.errors import ConfigError
from consumerd.scalars import TOPIC_PLACE, folded, table_parts
from consumerd.toml_lines import KeyPath, key_lines

SYSTEM_FILE = Path("/etc/consumerd/consumerd.toml")
LOCAL_FILE = Path("consumerd.toml")

Model = TypeVar("Model", Config, HandlerConfig)

ANY: Final = "*"
"""Any one part of a key path."""

OWN_TABLES: Final = ("checkpoint", "claims", "store", "letters", "replays", "replay_checkpoint")
"""The tables of `postgres.schema` that are the daemon's."""

REQUIRED: Final[Mapping[KeyPath, str]] = {
    ("kafka", "bootstrap_servers"): 'bootstrap_servers = "localhost:9092"',
    ("postgres", "dsn"): 'dsn = "postgresql://loader@db/warehouse"',
    ("topics",): 'topics = ["orders"]',
    ("table", "name"): 'name = "sales.orders"',
    ("table", "write"): 'write = "append"',
    ("columns", ANY, "from"): 'from = "customer.name"',
    ("transform", "function"): 'function = "orders:transform"',
}
"""Keys without a default: what to write."""

_SENTENCES: Final[Mapping[str, str]] = {
    "string_type": "must be a string, in quotes",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "tuple_type": 'must be a list, such as ["a", "b"]',
    "dict_type": "must be a table",
    "model_type": "must be a table",
}

_VARIABLE = re.compile(r"\$\$|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: the key it is at, a sentence that goes on from the key's name, the line where none is known."""

    path: KeyPath
    sentence: str
    line: int | None = None


@dataclass(slots=True, kw_only=True)
class _File:
    """One TOML file on its way to a model, with the problems found so far."""

    path: Path
    sound: bool = True
    data: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def failed(self, sentence: str, line: int | None = None) -> Self:
        """Note why this file cannot be read at all."""
        self.sound = False
        self.problems.append(Problem(path=(), sentence=sentence, line=line))
        return self

    def told(self) -> Iterator[str]:
        """Word the problems in the order of their lines: `handlers/orders.toml:12: table.wirte: unknown key`."""
        located = [(problem.line or _line_of(problem.path, self.lines), problem) for problem in self.problems]
        for line, problem in sorted(located, key=lambda pair: pair[0] or 0):
            place = f"{_shown(self.path)}:{line}" if line else _shown(self.path)
            yield ": ".join(filter(None, [place, dotted(problem.path), problem.sentence]))


def load(
    path: Path | None,
    *,
    overrides: Mapping[str, str] = MappingProxyType({}),
    environ: Mapping[str, str] = os.environ,
    first: bool = False,
) -> Config:
    """Read the daemon's config and its handlers; ConfigError tells all their mistakes.

    `path` None takes the search order: $CONSUMERD_CONFIG, ./consumerd.toml, /etc/consumerd/consumerd.toml.
    `overrides` are librdkafka properties (`-X prop=value`), which win over `[kafka.properties]`. That there is no
    handler is no mistake where the first is to be written.
    """
    environ = {"HOSTNAME": socket.gethostname(), **environ}  # shells and systemd have it, and do not export it
    main = _read(_find(path, environ), environ)
    config = _validate(Config, main, main.path.parent, path=main.path)
    properties, refused = _overrides(overrides)
    handlers = _handlers(main, environ, first=first)
    models = [
        _validate(HandlerConfig, file, main.path.parent, name=file.path.stem, path=file.path) for file in handlers
    ]
    sound = [(file, model) for file, model in zip(handlers, models, strict=True) if model]
    for file, problem in [*conflicts(sound), *(own_tables(config.postgres.schema_name, sound) if config else ())]:
        file.problems.append(problem)
    told = [*refused, *(line for file in (main, *handlers) for line in file.told())]
    if told or config is None:
        raise ConfigError(*told)
    kafka = config.kafka.model_copy(update={"properties": {**config.kafka.properties, **properties}})
    return config.model_copy(update={"kafka": kafka, "handlers": tuple(model for model in models if model)})


def load_daemon(path: Path | None, *, environ: Mapping[str, str] = os.environ) -> DaemonConfig:
    """Read [daemon] of the daemon's file, for who only asks the one that runs; ConfigError tells its mistakes.

    A mistake elsewhere keeps nobody from asking, nor does a variable that only the daemon's environment has.
    """
    main = _read(_find(path, environ), environ)
    main.problems = [problem for problem in main.problems if problem.path[:1] in {(), ("daemon",)}]
    section, folder = main.data.get("daemon", {}), main.path.parent
    config = None
    try:
        config = DaemonConfig.model_validate(section, by_name=False, by_alias=True, context={"folder": folder})
    except ValidationError as error:
        _note(Config, main, error, ("daemon",))
    if main.problems or config is None:
        raise ConfigError(*main.told())
    return config


def _find(path: Path | None, environ: Mapping[str, str]) -> Path:
    """Give the config file's absolute path; a file that was named must exist, whatever lies elsewhere."""
    named = path or (Path(environ["CONSUMERD_CONFIG"]) if environ.get("CONSUMERD_CONFIG") else None)
    for place in [named] if named else [LOCAL_FILE, SYSTEM_FILE]:
        if _is_there(place):
            return place.absolute()
    if named:
        source = "-c" if path else "$CONSUMERD_CONFIG"
        raise ConfigError(f"{_shown(named)}: there is no such file (named by {source})")
    raise ConfigError(
        f"no config found: neither ./{LOCAL_FILE} nor {SYSTEM_FILE}; name one with -c or $CONSUMERD_CONFIG"
    )


def control_of(path: Path | None, *, environ: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
    """Return the daemon's file and its control socket, as `load_daemon` reads it; raises ConfigError."""
    return _find(path, environ), load_daemon(path, environ=environ).control


def leads_to(path: Path) -> str:
    """Return what a command needs to be told to find a config file, wherever it is typed."""
    return "" if path == SYSTEM_FILE else f" -c {shlex.quote(str(path))}"


def _is_there(path: Path) -> bool:
    """Tell a file, also one that is out of reach: it is told as unreadable, not passed over."""
    try:
        return path.is_file()
    except OSError:
        return True


def _handlers(main: _File, environ: Mapping[str, str], *, first: bool) -> list[_File]:
    """Read the files of the handlers folder, sorted by name, hidden ones left out.

    The folder is taken from unchecked data, so that mistakes of handlers are told beside mistakes of the daemon's file.
    """
    section = main.data.get("daemon", {})
    name = section.get("handlers", "handlers") if isinstance(section, dict) else "handlers"
    if not isinstance(name, str):
        return []
    folder = main.path.parent / name
    try:
        paths = [path for path in sorted(folder.glob("*.toml")) if not path.name.startswith(".")]
        found = "holds no *.toml file" if folder.is_dir() else "is not a folder"
    except OSError as error:
        paths, found = [], f"cannot be read: {error.strerror}"
    if not paths and main.sound and not first:
        sentence = f"no handlers: {_shown(folder)} {found}; write one file for each handler there"
        main.problems.append(Problem(path=("daemon", "handlers"), sentence=sentence))
    return [_read(path, environ) for path in paths]


def _overrides(overrides: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Check `-X` by the rules of `[kafka.properties]`."""
    properties, refused = {}, []
    for name, value in overrides.items():
        try:
            properties[name] = parse_property(name, value, None)
        except ValueError as error:
            refused.append(f"-X {name}: {error}")
    return properties, refused


def _read(path: Path, environ: Mapping[str, str]) -> _File:  # noqa: PLR0911 - one for each mistake
    """Read, parse and fill in one file; `sound` is false when there is nothing to validate."""
    file = _File(path=path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        found = not isinstance(error, FileNotFoundError)
        return file.failed(f"cannot be read: {error.strerror if found else 'it is a symbolic link to nothing'}")
    except UnicodeDecodeError as error:
        return file.failed("is not UTF-8 text", error.object.count(b"\n", 0, error.start) + 1)
    if sentence := file_trust.writable(path):
        return file.failed(sentence)
    try:
        data = tomllib.loads(text)
    except RecursionError:
        return file.failed("is nested too deeply")
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        last = text.rstrip("\n").count("\n") + 1
        return file.failed(f"is not TOML: {error}", int(place[1]) if place else last)
    except ValueError as error:  # from int(), of a number of thousands of digits
        return file.failed(f"is not TOML: {error}")
    file.lines = key_lines(text)
    file.data = {key: _filled((key,), value, environ, file.problems) for key, value in data.items()}
    return file


def _filled(path: KeyPath, value: Any, environ: Mapping[str, str], problems: list[Problem]) -> Any:  # noqa: ANN401 (TOML)
    """Fill `${NAME}`, `${NAME:-default}` and `$$` into every string below `value`, but for the topic in a table's name.

    A password that should not be there is left as it is: it is refused later, and no part of it is taken for a name.
    """
    if isinstance(value, dict):
        return {key: _filled((*path, key), item, environ, problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled((*path, index), item, environ, problems) for index, item in enumerate(value)]
    if not isinstance(value, str) or looks_secret(str(path[-1])) or (path[-1] == "dsn" and dsn_password_key(value)):
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match[0] == "$$":
            return "$"
        if name is None:
            sentence = 'after "${" stand a name and "}"; a dollar itself is written "$$"'
            problems.append(Problem(path=path, sentence=sentence))
            return match[0]
        if match[0] == TOPIC_PLACE and path == ("table", "name"):
            return match[0]
        found = environ.get(name)
        if found is None and default is None:
            sentence = f"the environment variable {name} is not set; a default is written ${{{name}:-…}}"
            problems.append(Problem(path=path, sentence=sentence))
        return (found or default) if default is not None else (found or "")

    return _VARIABLE.sub(fill, value)


def _validate(model: type[Model], file: _File, folder: Path, **from_file: object) -> Model | None:
    """Make the model of a file, or note its problems; None when there is no sound model."""
    if not file.sound:
        return None
    reserved = [key for key in file.data if key in model.from_file]
    file.problems += [Problem(path=(key,), sentence=_unknown(model, (key,))) for key in reserved]
    sections: dict[str, object] = {name: {} for name in ("kafka", "postgres", "table") if name in model.model_fields}
    data = {**sections, **file.data, **from_file}
    try:
        return model.model_validate(data, by_name=False, by_alias=True, context={"folder": folder})
    except ValidationError as error:
        _note(model, file, error)
    return None


def _note(model: type[BaseModel], file: _File, error: ValidationError, within: KeyPath = ()) -> None:
    """Note what a model says of a file, or of a table in it, where nothing is known to be wrong yet."""
    noted = {problem.path for problem in file.problems}
    for details in error.errors(include_url=False, include_input=False):
        path = within + tuple(part for part in details["loc"] if part != "[key]")
        if not any(path[:length] in noted for length in range(1, len(path) + 1)):
            file.problems.append(Problem(path=path, sentence=_sentence(model, path, details)))


def _matches(path: KeyPath, pattern: KeyPath) -> bool:
    return len(path) == len(pattern) and all(part in {ANY, key} for key, part in zip(path, pattern, strict=True))


def _sentence(model: type[BaseModel], path: KeyPath, details: ErrorDetails) -> str:
    """Word one of pydantic's errors in our own terms."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown(model, path)
    if kind == "literal_error":
        return f"must be {context['expected']}".replace("'", '"')
    if kind == "missing":
        example = next((line for pattern, line in REQUIRED.items() if _matches(path, pattern)), None)
        table = f" under [{dotted(path[:-1])}]" if path[:-1] else ""
        return f"is missing: put {example}{table}" if example else "is missing"
    return _SENTENCES.get(kind, "is not valid here")


def _unknown(model: type[BaseModel], path: KeyPath) -> str:
    """Name the nearest valid key, or else all that are valid there."""
    for part in path[:-1]:
        known = _keys(model)
        model = (known.get(str(part)) if str(part) in known else model) or model
    names = sorted(set(_keys(model)) - getattr(model, "from_file", frozenset()))
    near = difflib.get_close_matches(str(path[-1]), names, n=1)
    return f'unknown key; did you mean "{near[0]}"?' if near else f"unknown key; valid here: {', '.join(names)}"


def _keys(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Give the TOML keys of a model, each with the model of its table if it is one."""
    return {str(info.validation_alias or name): _inner(info.annotation) for name, info in model.model_fields.items()}


def _inner(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_inner, get_args(annotation))), None)


def conflicts(handlers: Sequence[tuple[_File, HandlerConfig]]) -> Iterator[tuple[_File, Problem]]:
    """Find a group id used twice and a dead-letter topic that is read; a pattern never takes those (rules.md, 24)."""
    groups: dict[str, str] = {}
    letters = {handler.dead_letter.topic: handler.name for _, handler in handlers}
    for file, handler in handlers:
        first = groups.setdefault(handler.group_id, handler.name)
        if first != handler.name:
            sentence = f'"{handler.group_id}" is the group of handler {first} already: each needs its own'
            yield file, Problem(path=("group_id",), sentence=sentence)
        for index, topic in enumerate(handler.topics):
            if topic in letters:
                sentence = (
                    f'"{topic}" is the dead-letter topic of handler {letters[topic]}: it would read letters again'
                )
                yield file, Problem(path=("topics", index), sentence=sentence)


def own_tables(schema: str, handlers: Sequence[tuple[_File, HandlerConfig]]) -> Iterator[tuple[_File, Problem]]:
    """Find a handler that would write into the daemon's own tables."""
    for file, handler in handlers:
        within, *table = map(folded, table_parts(handler.table.name))
        if within == schema and table in [[name] for name in OWN_TABLES]:
            sentence = "is a table of the daemon's own: name another"
            yield file, Problem(path=("table", "name"), sentence=sentence)


def _line_of(path: KeyPath, lines: Mapping[KeyPath, int]) -> int | None:
    return next((lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in lines), None)


def dotted(path: KeyPath) -> str:
    """Write a key path as TOML does: `kafka.properties."sasl.password"`, a list's item as `topics[0]`."""
    bare = re.compile(r"[A-Za-z0-9_-]+")
    names = (part if isinstance(part, int) or bare.fullmatch(part) else json.dumps(part) for part in path)
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")


def _shown(path: Path) -> str:
    """Write a path from the working directory where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
