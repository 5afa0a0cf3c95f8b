"""`python -m tests.bench.report`: the tables that the benchmarks printed last, put into docs/performance.md."""

from __future__ import annotations

import io
import re
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

MEASURED = Path("build/bench")
PAGE = Path("docs/performance.md")
BLOCK = re.compile(r"(<!-- (\w+) -->\n```\n).*?(```\n)", re.DOTALL)


class _Both:
    """A stream that writes to two."""

    def __init__(self, *streams: IO[str]) -> None:
        self._streams = streams

    def write(self, text: str) -> None:
        """Write to both."""
        for stream in self._streams:
            stream.write(text)

    def flush(self) -> None:
        """Flush both."""
        for stream in self._streams:
            stream.flush()


@contextmanager
def kept(name: str) -> Iterator[None]:
    """Keep what is printed within, if it comes to its end, for the page."""
    printed = io.StringIO()
    with redirect_stdout(cast("IO[str]", _Both(sys.stdout, printed))):
        yield
    MEASURED.mkdir(parents=True, exist_ok=True)
    (MEASURED / f"{name}.txt").write_text(printed.getvalue(), encoding="utf-8")


def main() -> None:
    """Replace each table of the page that was measured since."""

    def table(block: re.Match[str]) -> str:
        printed = MEASURED / f"{block[2]}.txt"
        if not printed.exists():
            return block[0]
        return block[1] + printed.read_text(encoding="utf-8").strip("\n") + "\n" + block[3]

    PAGE.write_text(BLOCK.sub(table, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
