"""`consumerd init`: a handler's file from a sample of its topic and the table as it is, or the table that would fit.

What is proposed is read back by the handler's own mapping, with the sample: what would be refused is told before
anything is made.
"""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from psycopg import sql
from pydantic import ValidationError

from consumerd import catalog, postgres
from consumerd.checkpoint import ensure_schema
from consumerd.commands import from_connect
from consumerd.commands.infer import Sample, match, new_columns, observe, written
from consumerd.commands.sample import sample
from consumerd.config import HandlerConfig
from consumerd.errors import ConfigError, Halt
from consumerd.live_table import LiveTables
from consumerd.loader import dotted
from consumerd.scalars import TOPIC_PLACE, folded, is_table, is_topic, table_parts
from consumerd.topics import Topics
from consumerd.types import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from psycopg import AsyncConnection

    from consumerd.config import Config

THERE = "SELECT to_regclass(%(name)s) IS NOT NULL"

FILE = """\
# Topic {topic} into table {table}: made by `consumerd init` from {count} messages. docs/configuration.md has every key.
# What the next steps are: consumerd check; consumerd try {name}; consumerd run
{notes}topics = [{topic}]
# group_id = "consumerd.{name}"
# start = "earliest"    # where there is no checkpoint yet: earliest, latest, or a time with its zone

[table]
name = {table}
{write}

[columns]
{columns}

[dead_letter]
create = true    # consumerd.{name}.dlq, for messages that cannot be rows, is made when it is missing
"""

APPEND = 'write = "append"    # each message is a new row; "upsert" with key = ["..."] keeps the last of each key'


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What would be made."""

    path: Path
    toml: str
    sql: str | None
    """What makes the table, where there is none."""
    handler: HandlerConfig

    def text(self) -> str:
        """Return all of it for a terminal."""
        table = (
            f"-- There is no table {self.handler.table.name}; this would make it:\n{self.sql}\n\n" if self.sql else ""
        )
        return f"{table}# {self.path}\n{self.toml}"

    def line(self) -> str:
        """Return it as JSON."""
        return json.dumps({"path": str(self.path), "toml": self.toml, "sql": self.sql})


async def propose(
    config: Config, topic: str, table: str, *, key: Sequence[str], name: str | None, count: int
) -> Proposal:
    """Look at topic and table, and return what would join them; raises ConfigError, Outage, Halt. Makes nothing."""
    if TOPIC_PLACE in table:
        raise ConfigError(f"{table}: init looks at one table; name that of {topic}, and write {TOPIC_PLACE} afterwards")
    if not is_table(table):
        raise ConfigError(f'{table}: TABLE must be "table" or "schema.table", in double quotes what has dots in it')
    name = name or table_parts(table)[-1].strip('"')
    if not is_topic(name):
        raise ConfigError(f"{name}: no handler can have this name: give it another with --name, of A-Z a-z 0-9 . _ -")
    path = config.daemon.handlers / f"{name}.toml"
    if path.exists():
        raise ConfigError(f"{path} is there already, and is never overwritten: give the new one another --name")
    found = await Topics(config.kafka).find([topic], [])
    partitions = [TopicPartition(topic, number) for number in range(found[topic].partitions)]
    messages: list[Any] = await asyncio.to_thread(sample, config.kafka, partitions, count, first=False)
    seen = observe(message.value() for message in messages)
    if not seen.objects:
        what = f"none of its last {len(messages)} messages is a JSON object" if messages else "it holds no message"
        raise Halt("topic", f"topic {topic}: {what}, so there is nothing to learn from")
    conn = await postgres.connect(config.postgres, "consumerd/init")
    try:
        statement = None
        ((there,),) = await postgres.call(conn, THERE, {"name": table})
        if there:
            async with postgres.errors_of(conn):
                columns = _matched(await catalog.load(conn, table, ()), seen)
        else:
            columns, statement = _made(table, seen, key)
        file = partial(_file, path.stem, topic, table, columns=columns, key=key, count=len(messages))
        notes = await _refused(config, _proposal(path, file(notes=()), statement), conn, messages)
        return _proposal(path, file(notes=notes), statement)
    finally:
        await conn.close()


async def propose_from_connect(config: Config, sink: Path, name: str | None) -> Proposal:
    """Return the handler of a Kafka Connect JDBC sink's file; raises ConfigError, Outage, Halt. Makes nothing."""
    keys = from_connect.read(sink)
    columns: list[str] = []
    if table := from_connect.table_of(keys):
        conn = await postgres.connect(config.postgres, "consumerd/init")
        try:
            async with postgres.errors_of(conn):
                found = await catalog.load(conn, table, ())
        finally:
            await conn.close()
        columns = [column.name for column in found.columns if not column.automatic]
    converted = from_connect.convert(keys, columns)
    path = config.daemon.handlers / f"{name or converted.name}.toml"
    if path.exists():
        raise ConfigError(f"{path} is there already, and is never overwritten: give the new one another --name")
    return _proposal(path, converted.toml, None)


def _matched(table: catalog.Table, seen: Sample) -> list[str]:
    """Return the lines of [columns] for a table that is there; raises Halt when nothing matches."""
    found = match(table.columns, seen)
    if not found:
        fields = ", ".join(written(path) for path in list(seen.fields)[:20])
        raise Halt("table", f"no column of {table.name} has the name of a field; the fields are: {fields}")
    lines = []
    for column in table.columns:
        if column.name in found:
            path, unit = found[column.name]
            source = _quoted(written(path))
            source = f'{{ from = {source}, unit = "{unit}" }}' if unit else source
            lines.append(f"{_key(column.name)} = {source}    # {column.type_name}")
        elif not column.automatic:
            must = ", which must have a value" if column.not_null and not column.has_default else ""
            lines.append(f'# {_key(column.name)} = ""    # {column.type_name}{must}: no field of the sample is it')
    used = {path for path, _ in found.values()}
    left = [path for path in seen.fields if not any(path[: len(other)] == other for other in used)]
    left = [path for path in left if "object" not in seen.fields[path].values]
    return lines + _nowhere([written(path) for path in left], seen)


def _nowhere(names: list[str], seen: Sample) -> list[str]:
    """Return the line that tells of fields that no column takes."""
    if seen.unnamed:
        names = [*names, f"{len(seen.unnamed)} whose names (quotes, control characters, a $) cannot be written here"]
    return [f"# Fields that go nowhere: {', '.join(names)}"] if names else []


def _made(table: str, seen: Sample, key: Sequence[str]) -> tuple[list[str], str]:
    """Return the lines of [columns] for a table that is to be made, and what makes it."""
    columns = new_columns(seen)
    absent = [name for name in key if name not in columns]
    if absent:
        raise ConfigError(f"--key {', '.join(absent)}: the columns would be {', '.join(columns)}")
    parts = []
    for name, (path, kind) in columns.items():
        must = " NOT NULL" if name in key or seen.always(path) else ""
        parts.append(f"    {sql.Identifier(name).as_string()} {kind}{must}")
    if key:
        parts.append(f"    PRIMARY KEY ({', '.join(sql.Identifier(name).as_string() for name in key)})")
    names = [folded(part) for part in table_parts(table)]
    target = sql.Identifier(*names).as_string()
    lines = ",\n".join(parts)
    make = f"CREATE TABLE {target} (\n{lines}\n);"
    if len(names) > 1:
        make = f"CREATE SCHEMA IF NOT EXISTS {sql.Identifier(names[0]).as_string()};\n{make}"
    mapped = [f"{_key(name)} = {_quoted(written(path))}    # {kind}" for name, (path, kind) in columns.items()]
    return mapped + _nowhere([], seen), make


def _file(
    name: str, topic: str, table: str, *, columns: Sequence[str], key: Sequence[str], count: int, notes: Sequence[str]
) -> str:
    """Return the text of a handler's file."""
    write = f'write = "upsert"\nkey = [{", ".join(map(_quoted, key))}]' if key else APPEND
    return FILE.format(
        topic=_quoted(topic),
        table=_quoted(table),
        name=name,
        count=count,
        write=write,
        columns="\n".join(columns),
        notes="".join(f"# {note}\n" for note in notes),
    )


def _proposal(path: Path, toml: str, statement: str | None) -> Proposal:
    """Make the handler of a file's text."""
    data = {**tomllib.loads(toml), "name": path.stem, "path": path}
    try:
        handler = HandlerConfig.model_validate(data, by_name=False, by_alias=True, context={"folder": path.parent})
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        said = [f"{dotted(each['loc'])} {each.get('ctx', {}).get('error', each['msg'])}" for each in found]
        raise ConfigError(*(f"{path.name} would not do: {sentence}" for sentence in said)) from error
    return Proposal(path=path, toml=toml, sql=statement, handler=handler)


async def _refused(
    config: Config, proposal: Proposal, conn: AsyncConnection[Any], messages: Sequence[Any]
) -> list[str]:
    """Return what the handler would refuse of the sample, with the table as it is or would be."""
    connect = partial(postgres.connect, config.postgres, "consumerd/init")
    table = LiveTables(proposal.handler, connect).of(proposal.handler.topics[0])
    async with postgres.transaction(conn, probe=True):
        if proposal.sql is not None:
            await conn.execute(proposal.sql.encode())
        try:
            await table.make_ready(conn)
        except Halt as halt:
            return [f"Before it can run: {halt}"]
    refused: dict[int, Any] = {}
    table.mapping.encoder.encode(messages, refused)
    counts = Counter((why.reason, why.column) for why in refused.values())
    return [
        f"Of the sample {number} messages would be refused: {reason}{f' at {column}' if column else ''}"
        for (reason, column), number in counts.most_common()
    ]


async def make(config: Config, proposal: Proposal) -> list[str]:
    """Make what is missing: table, daemon's schema, dead-letter topic, and the file last; say what was made."""
    made = []
    conn = await postgres.connect(config.postgres, "consumerd/init")
    try:
        if proposal.sql is not None:
            async with postgres.transaction(conn):
                await conn.execute(proposal.sql.encode())
            made.append(f"made table {proposal.handler.table.name}")
        await ensure_schema(conn, config.postgres.schema_name)
    finally:
        await conn.close()
    made.append(f"schema {config.postgres.schema_name} is there")
    if proposal.handler.poison.action == "dead-letter":
        topics = Topics(config.kafka)
        letters = proposal.handler.dead_letter
        await topics.ensure_dead_letter(letters, await topics.find(proposal.handler.topics, [letters.topic]))
        made.append(f"dead-letter topic {letters.topic} is there")
    proposal.path.parent.mkdir(exist_ok=True)
    with proposal.path.open("x", encoding="utf-8") as file:
        file.write(proposal.toml)
    return [*made, f"wrote {proposal.path}"]


def _quoted(text: str) -> str:
    """Write a string as TOML does."""
    return json.dumps(text, ensure_ascii=False)


def _key(name: str) -> str:
    """Write a key as TOML does."""
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _quoted(name)
