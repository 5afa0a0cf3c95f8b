"""JSON values into rows, by types generated from the table.

The columns' paths become a tree of msgspec Structs, so that one pass over the bytes both decodes and checks: types,
ranges and lengths are in the Structs' annotations, and a value that does not fit is refused with its path. jsonb
columns keep the bytes as they were sent (`msgspec.Raw`): no number is rounded on the way.

One comprehension, compiled once, decodes values and turns each Struct into the row tuple: a call of ours for each would
cost as much as the row. All names in it are made here (`f0`, `f1`, ...), none comes from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from consumerd.errors import ConfigError, Poison
from consumerd.formats.values import ABSENT, FORMS, JSON, JSONB_VERSION, Field, annotation, default_of, pick, refusal

_NULL: Final = b"null"


@dataclass(slots=True)
class _Node:
    """One name in the value: the fields that end here, and the names below it."""

    fields: list[int] = field(default_factory=list)
    below: dict[str, _Node] = field(default_factory=dict)


Decode = Callable[[Iterable[bytes]], list[tuple[Any, ...]]]
"""From messages' values to rows of Python values; raises what `refusal` understands, of the first that is refused."""


def decoder(fields: tuple[Field, ...]) -> Decode:
    """Return the function that decodes into the given columns.

    Raises ConfigError when a default does not fit its column.
    """
    compiler = _Compiler(fields)
    decode = msgspec.json.Decoder(compiler.struct(_tree(fields), "r", ())).decode
    row = "".join(f"{compiler.expressions[index]}, " for index in range(len(fields)))
    rows = f"lambda values: [({row}) for v in values for r in [decode(v)]]"
    decoding: Decode = eval(rows, compiler.names | {"decode": decode})  # noqa: S307 - all names in it are made here
    return decoding


def _tree(fields: tuple[Field, ...]) -> _Node:
    root = _Node()
    for index, entry in enumerate(fields):
        node = root
        for name in entry.path:
            node = node.below.setdefault(name, _Node())
        node.fields.append(index)
    return root


class _Compiler:
    """Makes the Structs, and for each field the expression that picks its value from a decoded one."""

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self._fields = fields
        self._defaults = {index: default_of(entry) for index, entry in enumerate(fields)}
        self.expressions: dict[int, str] = {}
        self.names: dict[str, Any] = {
            "__builtins__": {},
            "version": JSONB_VERSION,
            "plain": FORMS[JSON],
            "null": msgspec.Raw(_NULL),
        } | {f"default{index}": value for index, value in self._defaults.items()}

    def struct(self, node: _Node, source: str, guards: tuple[str, ...]) -> type[msgspec.Struct]:
        """Make the Struct of what is below a node; `guards` are the expressions that must not be None to get there."""
        members: list[tuple[Any, ...]] = []
        rename: dict[str, str] = {}
        for name, child in node.below.items():
            member = f"f{len(members)}"
            rename[member] = name
            members.append((member, *self._member(child, f"{source}.{member}", guards)))
        try:
            return msgspec.defstruct("Value", members, rename=rename, gc=False, frozen=True, kw_only=True)
        except ValueError as error:
            names = ", ".join(map(repr, node.below))
            raise ConfigError(
                f"one of the names {names} has a quote, a backslash or a control character in it, which "
                "cannot be read from JSON by this version: map the column to another name"
            ) from error

    def _member(self, node: _Node, source: str, guards: tuple[str, ...]) -> tuple[Any, ...]:
        """Return type and default of one name of a Struct."""
        if node.below and not node.fields:
            if any(self._required(index) for index in _indexes(node)):
                return (self.struct(node, source, guards),)
            return (self.struct(node, source, (*guards, source)) | None, None)
        if not node.below and len(node.fields) == 1:
            return self._leaf(node.fields[0], source, guards)
        return self._shared(node, source, guards)

    def _leaf(self, index: int, source: str, guards: tuple[str, ...]) -> tuple[Any, ...]:
        column = self._fields[index].column
        self._note(index, pick(self._fields[index], source, self.names, index), guards)
        kind = annotation(column)
        if column.oid in FORMS:
            default = self._defaults[index]
            raw = msgspec.Raw(_NULL if default is None else default[len(FORMS[column.oid]) :])
            return (kind,) if self._required(index) else (kind, raw)
        if not column.not_null:
            kind |= None
        return (kind,) if self._required(index) else (kind, self._defaults[index])

    def _shared(self, node: _Node, source: str, guards: tuple[str, ...]) -> tuple[Any, ...]:
        """Several columns read one name, in different shapes: keep its bytes, and let each decode them for itself."""
        depth = source.count(".")
        for index in _indexes(node):
            entry = self._fields[index]
            self.names[f"alone{index}"] = _alone(entry, depth)
            self._note(index, f"(alone{index}({source}) if {source} != absent else default{index})", guards)
        self.names["absent"] = msgspec.Raw(b"")
        required = any(self._required(index) for index in _indexes(node))
        return (msgspec.Raw,) if required else (msgspec.Raw, msgspec.Raw(b""))

    def _note(self, index: int, expression: str, guards: tuple[str, ...]) -> None:
        if guards:
            there = " and ".join(f"{guard} is not None" for guard in guards)
            expression = f"({expression} if {there} else default{index})"
        self.expressions[index] = expression

    def _required(self, index: int) -> bool:
        return self._fields[index].column.not_null and self._fields[index].default is ABSENT


def _alone(entry: Field, depth: int) -> Callable[[msgspec.Raw], Any]:
    """Return a function that decodes one column from the bytes of a name above it, at `depth` of its path."""
    decode = decoder((Field(column=entry.column, path=("value", *entry.path[depth:]), default=entry.default),))
    above = ".".join(entry.path[:depth])

    def alone(raw: msgspec.Raw) -> Any:  # noqa: ANN401 - of the column's type
        try:
            ((found,),) = decode([b"".join((b'{"value":', raw, b"}"))])
        except (ValueError, RecursionError, Poison) as error:
            refused = refusal(error)
            column = above + (refused.column or "").removeprefix("value")
            message = refused.message.replace("$.value", f"$.{above}")
            raise Poison(replace(refused, column=column, message=message)) from error
        else:
            return found

    return alone


def _indexes(node: _Node) -> list[int]:
    """Return the fields at and below a node."""
    return [*node.fields, *(index for child in node.below.values() for index in _indexes(child))]
