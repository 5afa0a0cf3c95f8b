"""What the demo shows: bars on a terminal, a plain line for each step elsewhere, and the table at the end."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FAULTS_SHOWN = 10


class Screen:
    """Standard output."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def say(self, sentence: str = "") -> None:
        """Print a line."""
        self._console.print(sentence)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show progress: the function takes how much of `total` is done."""
        self.say(what)
        if not self._console.is_terminal:
            yield lambda _: None
            return
        columns = (TextColumn(" "), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is text, the others numbers."""
        table = Table()
        table.add_column(columns[0])
        for name in columns[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def faults(self, sentences: Sequence[str]) -> None:
        """Print the first faults, and how many there are."""
        for sentence in sentences[:FAULTS_SHOWN]:
            self.say(f"  {sentence}")
        if len(sentences) > FAULTS_SHOWN:
            self.say(f"  and {len(sentences) - FAULTS_SHOWN:,} more")
