"""Where each key of a TOML file stands.

tomllib gives no line numbers: `key_lines` walks the text once more, which tomllib has accepted, and notes them.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]

_PART = r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'"""
_KEY = rf"(?:{_PART})(?:[ \t]*\.[ \t]*(?:{_PART}))*"
_STATEMENT = re.compile(rf"[ \t]*(?:\[\[?[ \t]*(?P<table>{_KEY})[ \t]*\]|(?P<key>{_KEY})[ \t]*=|)")
# The pieces of a value. Long strings first; one may end in up to two quotes of its own.
_PIECE = re.compile(
    r'''"""(?:\\.|[^\\])*?"""(?:"{0,2})|\'\'\'.*?\'\'\'(?:'{0,2})|"(?:\\.|[^"\\\n])*"|'[^'\n]*\''''
    r"|\#[^\n]*|[\[{]|[\]}]|\n|[^\"'#\[\]{}\n]+",
    re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Give the line of each key path that valid TOML writes as a table's header or before a `=` at a line's start."""
    lines: dict[KeyPath, int] = {}
    prefix: KeyPath = ()
    position, line = 0, 1
    while position < len(text):
        statement = _STATEMENT.match(text, position)
        if statement is None:  # never: it matches the empty string too
            break
        if header := statement["table"]:
            path = prefix = _parts(header)
        else:
            path = (*prefix, *_parts(statement["key"])) if statement["key"] else ()
        for length in range(1, len(path)):
            lines.setdefault(path[:length], line)
        if path:
            lines[path] = line
        end = _value_end(text, statement.end())
        line += text.count("\n", position, end)
        position = end
    return lines


def _parts(key: str) -> KeyPath:
    """Split a dotted key; quoted parts are read by tomllib itself."""
    return tuple(
        tomllib.loads(f"part = {part}")["part"] if part[0] in "\"'" else part for part in re.findall(_PART, key)
    )


def _value_end(text: str, position: int) -> int:
    """Find where the next line of keys begins: after the first newline outside of strings and brackets."""
    depth = 0
    for piece in _PIECE.finditer(text, position):
        depth += (piece[0] in {"[", "{"}) - (piece[0] in {"]", "}"})
        if piece[0] == "\n" and depth <= 0:
            return piece.end()
    return len(text)
