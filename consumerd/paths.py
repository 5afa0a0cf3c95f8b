"""Where a value comes from, as `[columns]` and `where` write it.

A path, `customer.name`, `items[0].sku`, `["a.b"].c`, leads into the message's value. `@topic`, `@partition`, `@offset`,
`@timestamp`, `@key` and `@value` are the message's own; `@key.customer.id` leads into a JSON key; `@headers.trace-id`
is the last header of that name, which may hold dots, and is written `@headers["a b"]` where it holds others.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple, cast, get_args

Path = tuple[str | int, ...]
"""Names of objects and indexes of arrays, from the top down."""
Place = Literal["field", "@topic", "@partition", "@offset", "@timestamp", "@key", "@value", "@headers"]
Unit = Literal["s", "ms", "us", "ns"]
KeyFormat = Literal["bytes", "text", "json"]

MAX_INDEX: Final = 255
"""The last element of an array that a path may name: each one before it is looked at, too."""

_RULE = 'must be a path such as "customer.name"'
_STEP = re.compile(r"""(?P<dot>\.?)(?P<name>[^.\[\]]+)|\[(?:(?P<index>[0-9]+)|"(?P<q>[^"]+)"|'(?P<p>[^']+)')\]""")


class Source(NamedTuple):
    """One place of a message and the path within it; a header's path is its name."""

    place: Place
    path: Path = ()

    def __str__(self) -> str:
        """As TOML may write it."""
        if self.place == "field":
            return shown(self.path)
        return shown((self.place, *self.path))


def parse(text: str) -> Source:
    """Read where a value comes from; raises ValueError with a sentence."""
    if not text.startswith("@"):
        return Source("field", _steps(text))
    name = re.split(r"[.\[]", text, maxsplit=1)[0]
    if name not in get_args(Place):
        raise ValueError(
            f"there is no {name}: a source is one of {', '.join(get_args(Place)[1:])}; a field of that name is written "
            f'["{name}"]'
        )
    place, rest = cast("Place", name), text[len(name) :]
    if place == "@headers":
        quoted = re.fullmatch(r"""\["([^"]+)"\]|\['([^']+)'\]""", rest)
        header = (quoted[1] or quoted[2]) if quoted else rest[1:]
        if not header:
            raise ValueError("lacks the header's name: write @headers.NAME")
        return Source(place, (header,))
    if rest and place != "@key":
        raise ValueError(f"{place} has nothing below it")
    return Source(place, _steps(rest.removeprefix(".")) if rest else ())


def _steps(text: str) -> Path:
    steps: list[str | int] = []
    position = 0
    while position < len(text) or not steps:
        step = _STEP.match(text, position)
        if step is None or (step["name"] and (step["dot"] == ".") != bool(steps)):
            raise ValueError(_RULE)
        if step["index"] and (len(step["index"]) > len(str(MAX_INDEX)) or int(step["index"]) > MAX_INDEX):
            raise ValueError(f"an index is a number from 0 to {MAX_INDEX}")
        steps.append(int(step["index"]) if step["index"] else step["name"] or step["q"] or step["p"])
        position = step.end()
    return tuple(steps)


def shown(path: Path) -> str:
    """Write a path as it is told: `items[0].sku`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
