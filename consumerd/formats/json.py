"""JSON values into rows, by types generated from the table.

The columns' paths become a tree of msgspec Structs, so that one pass over the bytes both decodes and checks: types,
ranges and lengths are in the Structs' annotations, and a value that does not fit is refused with its path. jsonb
columns keep the bytes as they were sent (`msgspec.Raw`): no number is rounded on the way. An array of which a path
names an element is a Struct too, of its elements up to the last that is named.

One comprehension, compiled once, decodes values and turns each Struct into the row tuple: a call of ours for each would
cost as much as the row. All names in it are made here (`f0`, `f1`, ...), none comes from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from consumerd.errors import ConfigError, Poison
from consumerd.formats import epoch
from consumerd.formats.values import (
    ABSENT,
    FORMS,
    JSON,
    JSONB_VERSION,
    Field,
    annotation,
    default_of,
    kept,
    pick,
    raw_default,
    refusal,
)
from consumerd.paths import Path, shown

_ESCAPED = re.compile(r'["\\\x00-\x1f]')
"""What msgspec takes no name with: in JSON it is escaped."""
_NULL: Final = b"null"
UNREAD: Final = (msgspec.Raw, msgspec.Raw(b""))
"""Type and default of what no column reads."""


@dataclass(slots=True)
class Node:
    """One name or index in the value: the fields that end here, and what is below it."""

    fields: list[int] = field(default_factory=list)
    below: dict[str | int, Node] = field(default_factory=dict)


Decode = Callable[[Iterable[bytes]], list[tuple[Any, ...]]]
"""From messages' values to rows of Python values; raises what `refusal` understands, of the first that is refused."""


def decoder(fields: tuple[Field, ...], known: tuple[Path, ...] | None = None) -> Decode:
    """Return the function that decodes into the given columns, which all read fields of the value.

    With `known` paths, a field that neither a column nor they name is refused. Raises ConfigError when a default does
    not fit its column.
    """
    compiler = Compiler(fields, strict=known is not None)
    decode = msgspec.json.Decoder(compiler.struct(tree(fields, known or ()), "r", ())).decode
    rows = f"lambda values: [({compiler.row()}) for v in values for r in [decode(v)]]"
    decoding: Decode = eval(rows, compiler.names | {"decode": decode})  # noqa: S307 - all names in it are made here
    return decoding


def tree(fields: tuple[Field, ...], known: Iterable[Path] = ()) -> Node:
    """Return the tree of the paths into the value; a known one is in it up to the first name that no column reads."""
    root = Node()
    for index, entry in enumerate(fields):
        if entry.place == "field":
            node = root
            for step in entry.path:
                node = node.below.setdefault(step, Node())
            node.fields.append(index)
    for path in known:
        node = root
        for step in path:
            if step not in node.below:
                node.below[step] = Node()
                break
            node = node.below[step]
            if node.fields or not node.below:
                break
    return root


class Compiler:
    """Makes the Structs, and for each field the expression that picks its value from a decoded one.

    `strict` Structs refuse names that are not theirs.
    """

    def __init__(self, fields: tuple[Field, ...], *, strict: bool = False) -> None:
        self._fields = fields
        self._strict = strict
        self.defaults = {
            index: epoch.default_of(entry) if entry.unit else default_of(entry) for index, entry in enumerate(fields)
        }
        self.expressions: dict[int, str] = {}
        self.names: dict[str, Any] = {
            "__builtins__": {},
            "version": JSONB_VERSION,
            "plain": FORMS[JSON],
            "null": msgspec.Raw(_NULL),
        } | {f"default{index}": value for index, value in self.defaults.items()}

    def row(self) -> str:
        """Return the expressions of all fields, as a tuple is written."""
        return "".join(f"{self.expressions[index]}, " for index in range(len(self._fields)))

    def struct(self, node: Node, source: str, guards: tuple[str, ...]) -> type[msgspec.Struct]:
        """Make the Struct of what is below a node; `guards` are the expressions that must not be None to get there."""
        indexes = [step for step in node.below if isinstance(step, int)]
        if indexes and len(indexes) < len(node.below):
            named = ", ".join(map(repr, node.below))
            raise ConfigError(f"a path reads the same value as an object and another as an array: {named}")
        if indexes:
            return self._array(node, source, guards)
        members: list[tuple[Any, ...]] = []
        rename: dict[str, str] = {}
        for name, child in node.below.items():
            member = f"f{len(members)}"
            rename[member] = str(name)
            members.append((member, *self._member(child, f"{source}.{member}", guards)))
        try:
            return msgspec.defstruct(
                "Value",
                members,
                rename=rename,
                gc=False,
                frozen=True,
                kw_only=True,
                forbid_unknown_fields=self._strict,
            )
        except ValueError as error:
            names = ", ".join(repr(name) for name in rename.values() if _ESCAPED.search(name))
            raise ConfigError(
                f"the message's field {names} has a double quote, a backslash or a control character in its name, "
                "which cannot be read from JSON by this version: leave the column out under [columns], take all of "
                '"@value", or rename the field in a [transform]'
            ) from error

    def _array(self, node: Node, source: str, guards: tuple[str, ...]) -> type[msgspec.Struct]:
        """Make the Struct of an array up to the last element that is read."""
        members: list[tuple[Any, ...]] = []
        for position in range(1 + max(step for step in node.below if isinstance(step, int))):
            child, member = node.below.get(position), f"f{position}"
            members.append((member, *(self._member(child, f"{source}.{member}", guards) if child else UNREAD)))
        return msgspec.defstruct("Value", members, array_like=True, gc=False, frozen=True, kw_only=True)

    def _member(self, node: Node, source: str, guards: tuple[str, ...]) -> tuple[Any, ...]:
        """Return type and default of one name of a Struct."""
        if node.below and not node.fields:
            if self._needed(node):
                return (self.struct(node, source, guards),)
            return (self.struct(node, source, (*guards, source)) | None, None)
        if not node.below and len(node.fields) == 1:
            return self._leaf(node.fields[0], source, guards)
        return self._shared(node, source, guards) if node.fields else UNREAD

    def _leaf(self, index: int, source: str, guards: tuple[str, ...]) -> tuple[Any, ...]:
        entry = self._fields[index]
        column = entry.column
        if entry.unit:
            self.names[f"epoch{index}"] = epoch.reader(entry)
            self._note(index, f"epoch{index}({source})", guards)
            return UNREAD[:1] if self._required(index) else UNREAD
        self._note(index, pick(entry, source, self.names, index), guards)
        kind = annotation(column)
        if kept(column):
            return (kind,) if self._required(index) else (kind, raw_default(entry))
        if not column.not_null:
            kind |= None
        return (kind,) if self._required(index) else (kind, self.defaults[index])

    def _shared(self, node: Node, source: str, guards: tuple[str, ...]) -> tuple[Any, ...]:
        """Several columns read one name, in different shapes: keep its bytes, and let each decode them for itself."""
        depth = source.count(".")
        for index in _indexes(node):
            entry = self._fields[index]
            self.names[f"alone{index}"] = _alone(entry, depth)
            self._note(index, f"(alone{index}({source}) if {source} != absent else default{index})", guards)
        self.names["absent"] = UNREAD[1]
        return UNREAD[:1] if self._needed(node) else UNREAD

    def _note(self, index: int, expression: str, guards: tuple[str, ...]) -> None:
        if guards:
            there = " and ".join(f"{guard} is not None" for guard in guards)
            expression = f"({expression} if {there} else default{index})"
        self.expressions[index] = expression

    def _required(self, index: int) -> bool:
        return self._fields[index].column.not_null and self._fields[index].default is ABSENT

    def _needed(self, node: Node) -> bool:
        """Whether what is at or below a node must be there."""
        return any(self._required(index) for index in _indexes(node))


def _alone(entry: Field, depth: int) -> Callable[[msgspec.Raw], Any]:
    """Return a function that decodes one column from the bytes of a name above it, at `depth` of its path."""
    decode = decoder((replace(entry, path=("value", *entry.path[depth:])),))
    above = shown(entry.path[:depth])

    def alone(raw: msgspec.Raw) -> Any:  # noqa: ANN401 - of the column's type
        try:
            ((found,),) = decode([b"".join((b'{"value":', raw, b"}"))])
        except Poison:
            raise
        except (ValueError, RecursionError) as error:
            refused = refusal(error)
            column = above + (refused.column or "").removeprefix("value")
            message = refused.message.replace("$.value", f"$.{above}")
            raise Poison(replace(refused, column=column, message=message)) from error
        else:
            return found

    return alone


def _indexes(node: Node) -> list[int]:
    """Return the fields at and below a node."""
    return [*node.fields, *(index for child in node.below.values() for index in _indexes(child))]
