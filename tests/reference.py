"""`python -m tests.reference`: docs/configuration.md, made from the config's own types, and docs/metrics.md.

A key's description is the docstring below its field in `consumerd/config.py`, a table's that of its class; defaults and
the words that a key may be are the fields'.
"""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from consumerd import config, scalars
from tests import reference_metrics
from tests.servers.daemon import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

PAGE = REPOSITORY / "docs" / "configuration.md"
HEAD = """\
# Configuration: every key

`consumerd.toml` is the daemon; each `*.toml` in its `handlers` folder is one handler, named by the file. The first is
looked for at `-c`, `$CONSUMERD_CONFIG`, `./consumerd.toml`, `/etc/consumerd/consumerd.toml`. `${NAME}` in a string is
the environment's value, `${NAME:-default}` has a default, `$$` is a dollar.

A duration is a whole number and a unit, `500ms 5s 1m 2h 1d`; a size `512KiB 8MiB 1GiB`. Every mistake is told at once,
with file, line and key, before anything is consumed. This page is made from `consumerd/config.py` by `make docs`.
"""
UNITS: dict[str, list[tuple[str, float]]] = {
    "Duration": [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1), ("ms", 0.001)],
    "Size": [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)],
}
REQUIRED = "must be there"
DERIVED = {"group_id": "`consumerd.<handler>`", "topic": "`<group_id>.dlq`"}
"""Defaults that follow from other keys (`HandlerConfig._names_follow_the_file`)."""


def page() -> str:
    """Return the page."""
    files = (("consumerd.toml", config.Config), ("handlers/NAME.toml", config.HandlerConfig))
    return "\n".join([HEAD, *(part for name, model in files for part in (f"## {name}\n", *_tables(model, "")))])


def _tables(model: type[BaseModel], name: str) -> Iterator[str]:
    """Describe a table of TOML and those within it."""
    described = descriptions(model)
    keys, tables = [], []
    for field, info in model.model_fields.items():
        if field in getattr(model, "from_file", ()):
            continue
        key = str(info.validation_alias or field)
        if inner := _model(info):
            within = f"{name}.{key}" if name else key
            tables.append((within, described.get(field), inner))
        else:
            keys.append(f"| `{key}` | {_default(model, field, info)} | {_meaning(described[field], info)} |")
    if name and model.__doc__:
        yield f"{_paragraph(model.__doc__).partition('. ')[0].removesuffix('.')}.\n"
    if keys:
        yield "\n".join(["| key | default | what it is |", "|---|---|---|", *keys, ""])
    for within, described_as, inner in tables:
        many = inner is config.ColumnConfig
        yield f"### `[{within}]`{', a table for each column' if many else ''}\n"
        if described_as:
            yield f"{_paragraph(described_as)}\n"
        yield from _tables(inner, within)


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings below a model's fields; a table's field may do without."""
    (tree,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[statement.target.id] = text
                case _:
                    pass
    return found


def _model(info: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a table, or a table of tables."""
    return next((part for part in _parts(info.annotation) if _is_model(part)), None)


def _is_model(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _parts(annotation: Any) -> Iterator[Any]:  # noqa: ANN401 - a type form
    """Return what an annotation is made of."""
    yield annotation
    if get_origin(annotation) in {types.UnionType, Union, Annotated, dict, tuple}:
        for part in get_args(annotation):
            yield from _parts(part)


def _default(model: type[BaseModel], field: str, info: FieldInfo) -> str:
    if field in DERIVED:
        return DERIVED[field]
    default = info.default
    if default is PydanticUndefined:
        return REQUIRED
    if default in (None, scalars.UNSET, (), {}):
        return "none"
    if isinstance(default, int | float) and (unit := _unit(model, field)):
        return f"`{_with_unit(default, UNITS[unit])}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def _unit(model: type[BaseModel], field: str) -> str | None:
    """Return whether a field is a duration or a size, as its annotation is written."""
    (tree,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(tree, ast.ClassDef)
    for statement in tree.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id=kind)) if name == field:
                return kind if kind in UNITS else None
            case _:
                pass
    return None


def _with_unit(value: float, units: list[tuple[str, float]]) -> str:
    name, unit = next((name, unit) for name, unit in units if round(value / unit, 6) == max(1, round(value / unit)))
    return f"{value / unit:.0f}{name}"


def _meaning(text: str, info: FieldInfo) -> str:
    words = [word for part in _parts(info.annotation) if get_origin(part) is Literal for word in get_args(part)]
    listed = ", ".join(f"`{word}`" for word in words)
    told = all(f"`{word}`" in text for word in words)
    return _paragraph(text).replace("|", "\\|") + ("" if told else f" {listed}.")


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Write the pages."""
    Path(PAGE).write_text(page(), encoding="utf-8")
    metrics = reference_metrics.PAGE
    metrics.write_text(reference_metrics.page(metrics.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
