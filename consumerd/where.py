"""`where`: which messages a handler takes. Its text becomes a tree of tests here; `formats/selection.py` compiles that.

    any  := all ("or" all)*        all := not ("and" not)*        not := "not" not | "(" any ")" | test
    test := path ("==" | "!=" | "<" | "<=" | ">" | ">=") literal
          | path ["not"] "in" "(" literal, ... ")" | path "is" ["not"] "null" | path

A comparison with null is not true, and neither is its opposite, as in SQL. So `not` is carried down to the tests (`not
(a == 1 or b < 2)` is `a != 1 and b >= 2`), of which each is true or not by itself. "=" and "<>" are taken, too. Paths
are not compared with each other: `kind == buy` is nearly always a string without its quotes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from consumerd import paths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from consumerd.paths import KeyFormat, Path, Source

Literal = str | int | float | bool

MAX_LENGTH: Final = 4_000
"""Characters of a `where`."""
MAX_DEPTH: Final = 30
"""Parentheses within each other: Python, which compiles the tests, reads no more than 200."""
OPPOSITE: Final = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_ALIASES: Final = {"=": "==", "<>": "!="}
_WORDS: Final = {"true": True, "false": False}
_KEYWORDS: Final = {"and", "or", "not", "in", "is", "null", *_WORDS}

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<number>-?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,3})?(?![\w.]))
    | (?P<operator>==|!=|<>|<=|>=|=|<|>)
    | (?P<mark>[(),])
    | (?P<word>(?:@?[^\W\d][\w$-]*|\["[^"]+"\])(?:\.[\w$-]+|\[[0-9]+\]|\["[^"]+"\]|\['[^']+'\])*)
    | (?P<end>$)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class OneOf:
    """A value is one of some literals, or none of them."""

    source: Source
    literals: tuple[Literal, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Ordered:
    """A value stands in an order to a literal."""

    source: Source
    operator: str
    literal: str | float


@dataclass(frozen=True, slots=True)
class IsNull:
    """A value is null or absent, or is neither."""

    source: Source
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Both:
    """All of some tests hold, or (`any_of`) one of them does."""

    tests: tuple[Test, ...]
    any_of: bool = False


Leaf = OneOf | Ordered | IsNull
Test = Leaf | Both


def parse(text: str) -> Test:
    """Read a `where`; raises ValueError with a sentence."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"must not be longer than {MAX_LENGTH:,} characters")
    return _Parser(text).whole()


def leaves(test: Test) -> Iterator[Leaf]:
    """Return the single tests, from left to right."""
    if isinstance(test, Both):
        for each in test.tests:
            yield from leaves(each)
    else:
        yield test


def fields(test: Test) -> tuple[Path, ...]:
    """Return the paths into the value that tests read, which a message without one does not have."""
    return tuple(leaf.source.path for leaf in leaves(test) if leaf.source.place == "field")


def negation(test: Test) -> Test:
    """Return the test that is true where this one is false, and neither where something is null."""
    match test:
        case Both():
            return Both(tuple(map(negation, test.tests)), any_of=not test.any_of)
        case OneOf() | IsNull():
            return replace(test, negated=not test.negated)
        case Ordered():
            return replace(test, operator=OPPOSITE[test.operator])


class _Parser:
    """Reads the tokens of one text, from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = self._depth = 0
        self._step()

    def _step(self) -> None:
        """Go on to the next token."""
        found = _TOKEN.match(self._text, self._end)
        self._start = len(self._text) - len(self._text[self._end :].lstrip())
        if found is None:
            raise self._wrong("a path, an operator, a string in quotes or a number")
        self._kind, self._token = found.lastgroup or "", found[found.lastgroup or 0]
        self._end = found.end()
        if self._kind == "word" and self._token.lower() in _KEYWORDS:
            self._kind, self._token = "keyword", self._token.lower()

    def _taken(self, token: str) -> bool:
        """Go over the next token if it is this keyword or mark."""
        there = self._kind in {"keyword", "mark"} and self._token == token
        if there:
            self._step()
        return there

    def _wrong(self, expected: str) -> ValueError:
        return ValueError(f"cannot be read at character {self._start + 1}, where {expected} is expected")

    def whole(self) -> Test:
        test = self._any()
        if self._kind != "end":
            raise self._wrong('"and", "or" or the end')
        return test

    def _any(self) -> Test:
        tests = [self._all()]
        while self._taken("or"):
            tests.append(self._all())
        return tests[0] if len(tests) == 1 else Both(tuple(tests), any_of=True)

    def _all(self) -> Test:
        tests = [self._not()]
        while self._taken("and"):
            tests.append(self._not())
        return tests[0] if len(tests) == 1 else Both(tuple(tests))

    def _not(self) -> Test:
        negated = False
        while self._taken("not"):
            negated = not negated
        if self._taken("("):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise ValueError(f"has more than {MAX_DEPTH} parentheses within each other")
            test = self._any()
            self._depth -= 1
            if not self._taken(")"):
                raise self._wrong('")"')
        else:
            test = self._test()
        return negation(test) if negated else test

    def _test(self) -> Test:
        if self._kind != "word":
            raise self._wrong("a path (a name without quotes)")
        source = paths.parse(self._token)
        self._step()
        if self._kind == "operator":
            return self._comparison(source)
        if self._taken("is"):
            negated = self._taken("not")
            if not self._taken("null"):
                raise self._wrong('"null"')
            return IsNull(source, negated)
        negated = self._taken("not")
        if self._taken("in"):
            return OneOf(source, self._list(), negated)
        if negated:
            raise self._wrong('"in"')
        return OneOf(source, (True,))

    def _comparison(self, source: Source) -> Test:
        operator = _ALIASES.get(self._token, self._token)
        self._step()
        literal = self._literal()
        if operator in {"==", "!="}:
            return OneOf(source, (literal,), operator == "!=")
        if isinstance(literal, bool):
            raise ValueError("true and false have no order: write ==, or the path alone")  # noqa: TRY004
        return Ordered(source, operator, literal)

    def _list(self) -> tuple[Literal, ...]:
        if not self._taken("("):
            raise self._wrong("a list such as ('a', 'b')")
        literals = [self._literal()]
        while self._taken(","):
            literals.append(self._literal())
        if not self._taken(")"):
            raise self._wrong('"," or ")"')
        if any(isinstance(literal, bool) for literal in literals):
            raise ValueError("a list after `in` holds strings and numbers")
        return tuple(literals)

    def _literal(self) -> Literal:
        kind, token = self._kind, self._token
        literal: Literal
        if kind == "string":
            literal = token[1:-1].replace(2 * token[0], token[0])
        elif kind == "number":
            literal = int(token) if token.lstrip("-").isdigit() else float(token)
            if literal in {float("inf"), -float("inf")}:
                raise ValueError("has a number that is too large")
        elif kind == "keyword" and token in _WORDS:
            literal = _WORDS[token]
        elif kind == "keyword" and token == "null":  # noqa: S105 - no password
            raise ValueError('compares with null, which is never true: write "is null" or "is not null"')
        else:
            raise self._wrong("a string in quotes, a number, true or false")
        self._step()
        return literal


def check(test: Test, key_format: KeyFormat) -> None:
    """Refuse comparisons that can never be; raises ValueError with a sentence."""
    for leaf in leaves(test):
        kind = _kind(leaf.source, key_format)
        literals = leaf.literals if isinstance(leaf, OneOf) else (leaf.literal,) if isinstance(leaf, Ordered) else ()
        if not literals or not kind:
            continue
        if kind == "bytes":
            mend = ', unless key_format is "text" or "json"' if leaf.source.place == "@key" else ""
            raise ValueError(f'{leaf.source} is bytes, and goes with "is null" and "is not null" alone{mend}')
        if any(isinstance(each, bool) or (kind == "text") != isinstance(each, str) for each in literals):
            raise ValueError(f"{leaf.source} is {kind}, and is compared with something else")


def _kind(source: Source, key_format: KeyFormat) -> str:
    """Return what a source is; '' where any value may come."""
    match source.place:
        case "@topic" | "@headers":
            return "text"
        case "@partition" | "@offset":
            return "a number"
        case "@timestamp":
            return "a number (milliseconds since 1970)"
        case "@key" if source.path and key_format != "json":
            raise ValueError(f'{source} needs key_format = "json"')
        case "@key":
            return "" if key_format == "json" else key_format
        case "@value":
            return "bytes"
        case "field":
            return ""
