"""`where`, compiled: which of some messages are taken.

Each test is an expression in one comprehension over the messages. Of the value only what the tests read is decoded, and
that as it comes: a message that is not taken may hold anything elsewhere, if it is JSON. A value of another kind than
what it is compared with cannot be told to fit or not: that message is refused, unless a test before it has decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from consumerd.errors import ConfigError, Poison
from consumerd.formats.json import UNREAD, Node
from consumerd.formats.values import refusal, refuse
from consumerd.paths import Source, shown
from consumerd.types import Message
from consumerd.where import Both, IsNull, OneOf, fields, leaves

if TYPE_CHECKING:
    from consumerd.paths import KeyFormat, Path, Place
    from consumerd.where import Leaf, Test

Select = Callable[[Sequence[Message]], list[int]]
"""From messages to the positions of those that are taken; raises what `refusal` understands."""

_NUMBERS: Final = frozenset({int, float})
_KINDS: Final = {str: frozenset({str}), bool: frozenset({bool}), int: _NUMBERS, float: _NUMBERS}
"""What a value must be to be compared with a literal."""

_OF_THE_MESSAGE: Final[dict[Place, str]] = {
    "@topic": "m.topic()",
    "@partition": "m.partition()",
    "@offset": "m.offset()",
    "@timestamp": "stamp(m.timestamp())",
    "@value": "v",
}


def selector(test: Test, key_format: KeyFormat) -> Select:
    """Return the function that selects messages; if it reads fields, it raises TypeError for one without a value."""
    compiler = _Compiler(key_format)
    clauses = "for i, m in enumerate(messages) for v in [m.value()]"
    if paths := fields(test):
        root = Node()
        for path in paths:
            node = root
            for step in path:
                node = node.below.setdefault(step, Node())
        compiler.names["decode"] = msgspec.json.Decoder(compiler.struct(root, ())).decode
        clauses += " for w in [decode(v)]"
    if any(leaf.source.place == "@headers" for leaf in leaves(test)):
        clauses += " for h in [dict(m.headers() or ())]"
    select = f"lambda messages: [i {clauses} if {compiler.condition(test)}]"
    selecting: Select = eval(select, compiler.names)  # noqa: S307 - all names in it are made here
    return selecting


class _Compiler:
    """Makes the Structs of what is read of a value, and the expressions of the tests."""

    def __init__(self, key_format: KeyFormat) -> None:
        self._key_format = key_format
        self._structs: dict[Path, type[msgspec.Struct]] = {}
        self._members: dict[Path, str] = {}
        self.names: dict[str, Any] = {
            "__builtins__": {},
            "enumerate": enumerate,
            "dict": dict,
            "other": _other,
            "text": _text,
            "stamp": _stamp,
        }

    def struct(self, node: Node, path: Path) -> type[msgspec.Struct]:
        """Make the Struct of what is below a node: anything may be in it, or nothing."""
        indexes = [step for step in node.below if isinstance(step, int)]
        if indexes and len(indexes) < len(node.below):
            raise ConfigError(f"`where` reads {shown(path)} both as an object and as an array")
        steps = list(range(max(indexes) + 1)) if indexes else list(node.below)
        members: list[tuple[Any, ...]] = []
        for position, step in enumerate(steps):
            child, name = node.below.get(step), f"f{position}"
            self._members[*path, step] = name
            members.append((name, self._type(child, (*path, step)), None) if child else (name, *UNREAD))
        rename = None if indexes else {name: str(step) for (name, *_), step in zip(members, steps, strict=True)}
        try:
            struct = msgspec.defstruct("Fields", members, rename=rename, array_like=bool(indexes), frozen=True)
        except ValueError as error:
            raise ConfigError(
                f"`where` reads a name below {shown(path) or 'the value'} that JSON must escape"
            ) from error
        self._structs[path] = struct
        return struct

    def _type(self, node: Node, path: Path) -> Any:  # noqa: ANN401 - a type form
        if not node.below:
            return Any
        other = dict if isinstance(next(iter(node.below)), int) else list
        return self.struct(node, path) | str | int | float | bool | other | None

    def condition(self, test: Test) -> str:
        """Return the expression of a test."""
        if not isinstance(test, Both):
            return self._leaf(test)
        return f"({(' or ' if test.any_of else ' and ').join(map(self.condition, test.tests))})"

    def _leaf(self, test: Leaf) -> str:
        value = self._value(test.source)
        if isinstance(test, IsNull):
            return f"({value} is {'not ' if test.negated else ''}None)"
        literals = test.literals if isinstance(test, OneOf) else (test.literal,)
        if isinstance(test, OneOf):
            operator = ("!=" if test.negated else "==") if len(literals) == 1 else "not in" if test.negated else "in"
        else:
            operator = test.operator
        kinds = self._named("kinds", frozenset().union(*(_KINDS[type(literal)] for literal in literals)))
        literal = self._named("literal", literals[0] if len(literals) == 1 else frozenset(literals))
        source = self._named("source", str(test.source))
        return f"(t {operator} {literal} if (t := {value}).__class__ in {kinds} else other(t, {source}))"

    def _value(self, source: Source) -> str:
        """Return the expression of a value: None where it is null or absent."""
        match source.place:
            case "field" if len(source.path) == 1:
                return f"w.{self._members[source.path]}"
            case "field":
                return f"{self._named('at', self._at(source.path))}(w)"
            case "@key" if self._key_format == "json":
                return f"{self._named('key', _key(source))}(m.key())"
            case "@key":
                return "text(m.key())" if self._key_format == "text" else "m.key()"
            case "@headers":
                return f"text(h.get({self._named('name', source.path[0])}))"
            case place:
                return _OF_THE_MESSAGE[place]

    def _named(self, kind: str, value: object) -> str:
        """Give a value a name that the expressions know."""
        name = f"{kind}{len(self.names)}"
        self.names[name] = value
        return name

    def _at(self, path: Path) -> Callable[[object], object]:
        """Return what goes down to a value that is not at the top; what is no object on the way cannot be told."""
        steps = [
            (self._structs[path[:end]], self._members[path[: end + 1]], shown(path[:end])) for end in range(len(path))
        ]

        def at(found: object) -> object:
            for struct, member, above in steps:
                if found.__class__ is not struct:
                    return _nothing(found, above)
                found = getattr(found, member)
            return found

        return at


def _key(source: Source) -> Callable[[bytes | None], object]:
    """Return what reads a JSON key, or goes down in one."""
    decode = msgspec.json.Decoder().decode

    def key(data: bytes | None) -> object:
        if data is None:
            return None
        try:
            found = decode(data)
        except (ValueError, RecursionError) as error:
            refused = refusal(error)
            raise Poison(replace(refused, column="@key", message=f"@key: {refused.message}")) from error
        for step in source.path:
            if isinstance(found, list) and isinstance(step, int):
                found = found[step] if step < len(found) else None
            elif isinstance(found, dict) and isinstance(step, str):
                found = found.get(step)
            else:
                return _nothing(found, str(source))
        return found

    return key


def _nothing(found: object, name: str) -> object:
    """Go no further: below a null all is null, and what is below a value that has nothing there cannot be told."""
    if found is None:
        return found
    raise Poison(refuse("type", "`where` reads what is below a value that has nothing there", name))


def _other(value: object, name: str) -> bool:
    """Say of a value that is of none of the kinds it is compared with: null is not true, and the rest is refused."""
    if value is None:
        return False
    raise Poison(refuse("type", "`where` compares a value with one of another kind", name))


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode()


def _stamp(stamp: tuple[int, int]) -> int | None:
    kind, milliseconds = stamp
    return milliseconds if kind else None
