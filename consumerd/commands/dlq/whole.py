"""`consumerd dlq show` and `export`: letters whole.

What was sent (key, value, and the values of the message's own headers) is shown when it is asked for alone. Bytes that
are UTF-8 are text; others are base64, in a field whose name says so.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from consumerd.commands.dlq.survey import chosen, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.commands.dlq.survey import Filter, Standing
    from consumerd.commands.dlq.topic import Letter
    from consumerd.config import Config, HandlerConfig
    from consumerd.letters import Letters

Entry = dict[str, Any]


async def last(
    config: Config, handler: HandlerConfig, letters: Letters, which: Filter, *, count: int, values: bool
) -> list[Entry]:
    """Return the last letters that a filter takes, as the topic has them."""
    found: deque[Entry] = deque(maxlen=count)
    await each(config, handler, letters, which, found.append, values=values)
    return list(found)


async def each(
    config: Config,
    handler: HandlerConfig,
    letters: Letters,
    which: Filter,
    emit: Callable[[Entry], None],
    *,
    values: bool,
) -> None:
    """Hand over each letter that a filter takes, in the topic's order."""
    found, topic = await survey(config, handler, letters)
    try:
        more = chosen(topic, handler.group_id, {(each.place, each.offset): each for each in found.standings(which)})
        while some := await asyncio.to_thread(more):
            for letter, standing in some:
                emit(entry(letter, standing, values=values))
    finally:
        topic.close()


def entry(letter: Letter, standing: Standing, *, values: bool) -> Entry:
    """Return a letter as a JSON object."""
    kind, timestamp = letter.timestamp()
    made: Entry = {
        "source": {"topic": letter.topic(), "partition": letter.partition(), "offset": letter.offset()},
        "letter": {"topic": letter.raw.topic(), "partition": letter.raw.partition(), "offset": letter.raw.offset()},
        "status": standing.status,
        "attempts": standing.attempts,
        "failed_at": letter.failed_at,
        **letter.why._asdict(),
        "timestamp": timestamp if kind else None,
    }
    if standing.state is not None:
        state = standing.state
        made["since"] = {
            name: value
            for name in ("status", "target", "reason", "error", "message", "sqlstate", "column", "changed_by")
            if (value := getattr(state, name)) is not None
        } | {"changed_at": state.changed_at}
    if not values:
        sizes = {"key_bytes": letter.key(), "value_bytes": letter.value()}
        made |= {name: None if data is None else len(data) for name, data in sizes.items()}
        return made | {"header_names": [name for name, _ in letter.headers()]}
    own = [{"name": name, **_told("value", value)} for name, value in letter.headers()]
    return made | _told("key", letter.key()) | _told("value", letter.value()) | {"headers": own}


def line(made: Entry) -> str:
    """Return an entry as a line of JSON."""
    return msgspec.json.encode(made).decode()


def text(made: Entry) -> str:
    """Return an entry for people."""
    where, letter = made["source"], made["letter"]
    lines = [f"{where['topic']}:{where['partition']}@{where['offset']}  {made['status']}"]
    told = {
        "why": _why(made),
        "error": made["error"],
        "failed at": f"{made['failed_at'].isoformat()}, tried {made['attempts']} times by now",
        "letter": f"{letter['topic']}:{letter['partition']}@{letter['offset']}",
        "timestamp": made["timestamp"],
    }
    if "since" in made:
        since = made["since"]
        into = f" into {since['target']}" if since["status"] == "redriven" else ""
        again = " again" if since["status"] == "failed" else ""
        why = f": {_why(since)}" if "reason" in since else ""
        told["since"] = (
            f"{since['status']}{again}{into} {since['changed_at'].isoformat()} by {since['changed_by']}{why}"
        )
    if "headers" in made:
        told |= {name: made[name] for name in ("key", "key_base64", "value", "value_base64") if name in made}
        own = [(each["name"], each.get("value", each.get("value_base64"))) for each in made["headers"]]
        told["headers"] = ", ".join(f"{name}={value}" for name, value in own)
    else:
        sizes = (made["key_bytes"], made["value_bytes"])
        told["key, value"] = ", ".join("none" if size is None else f"{size} bytes" for size in sizes)
        told["headers"] = ", ".join(made["header_names"])
    lines += [f"  {name:<12}{_shown(value)}" for name, value in told.items() if value not in {None, ""}]
    return "\n".join(lines)


def _shown(value: object) -> str:
    """Return text as a terminal can have it: what was sent may hold its control characters."""
    return "".join(character if character.isprintable() else " " for character in str(value))


def _why(made: Entry) -> str:
    details = [f"column {made['column']}"] if made.get("column") else []
    details += [f"SQLSTATE {made['sqlstate']}"] if made.get("sqlstate") else []
    return f"{made['reason']}: {made['message']}" + (f" ({', '.join(details)})" if details else "")


def _told(name: str, data: bytes | None) -> Entry:
    """Return bytes as text, or as base64 under a name that says so."""
    try:
        return {name: data if data is None else data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data or b"").decode()}
