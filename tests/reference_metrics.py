"""The table of docs/metrics.md, made from `consumerd/metrics.py`: its declarations, and the docstrings below them."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise
from typing import TYPE_CHECKING

from prometheus_client import Info
from prometheus_client.metrics import MetricWrapperBase

from consumerd import metrics
from tests.servers.daemon import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = REPOSITORY / "docs" / "metrics.md"
BEGIN, END = "<!-- made from consumerd/metrics.py by `make docs` -->\n", "<!-- until here -->\n"


def page(text: str) -> str:
    """Return the page with its table made anew; the rest is as it is written."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE.name} has lost the lines around its table"
    return before + BEGIN + "\n" + "\n".join([*_table(), *_values()]) + "\n" + END + after


def declared() -> dict[str, MetricWrapperBase]:
    """Return each metric by the name that it has in the module."""
    return {name: it for name, it in vars(metrics).items() if isinstance(it, MetricWrapperBase)}


def uses() -> dict[str, str]:
    """Return the docstrings below the metrics."""
    body = ast.parse(inspect.getsource(metrics)).body
    found = {}
    for statement, below in pairwise(body):
        match statement, below:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
            case _:
                pass
    return found


def exposed(metric: MetricWrapperBase) -> str:
    """Return a metric's name as Prometheus has it."""
    ending = "_total" if metric._type == "counter" else "_info" if isinstance(metric, Info) else ""
    return f"{metric._name}{ending}"


def _table() -> Iterator[str]:
    used = uses()
    yield "| metric | type | labels | what it is, and what to do with it |"
    yield "|---|---|---|---|"
    for name, metric in declared().items():
        kind = "gauge" if isinstance(metric, Info) else metric._type
        labels = ", ".join(metric._labelnames) or ("version" if isinstance(metric, Info) else "")
        text = re.sub(r"\|", r"\\|", f"{metric._documentation} {used[name]}")
        yield f"| `{exposed(metric)}` | {kind} | {labels} | {text} |"


def _values() -> Iterator[str]:
    yield ""
    yield "| metric | values of its other label |"
    yield "|---|---|"
    for metric, values in metrics.VALUES.items():
        yield f"| `{exposed(metric)}` | `{metric._labelnames[1]}`: {', '.join(f'`{value}`' for value in values)} |"
