"""`attnbench taxonomy`."""

from enum import StrEnum
from typing import Annotated

import typer

from attnbench.cli._options import Plugins, with_plugins
from attnbench.cli._output import Rows, comma_separated, complain, emit_json, emit_table, latex, markdown
from attnbench.errors import UserError


class Format(StrEnum):
    """How a table is written."""

    RICH = "rich"
    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"
    JSON = "json"


def taxonomy(
    scaling: Annotated[str | None, typer.Option("--scaling", help="Only this scaling strategy, as routing.")] = None,
    expert: Annotated[str | None, typer.Option("--expert", help="Only this type of expert.")] = None,
    count: Annotated[str | None, typer.Option("--count", help="Only this number of experts.")] = None,
    construction: Annotated[str | None, typer.Option("--construction", help="Only experts made this way.")] = None,
    topology: Annotated[str | None, typer.Option("--topology", help="Only this routing topology.")] = None,
    format_: Annotated[Format, typer.Option("--format")] = Format.RICH,
    verify: Annotated[bool, typer.Option("--verify", help="Measure each coordinate; exit 1 where it is not the declared one.")] = False,
    plugin: Plugins = [],
) -> None:
    """Print the paper's table: each method's place along the five dimensions."""
    with_plugins(plugin)
    wanted = {"scaling": scaling, "expert": expert, "count": count, "construction": construction, "topology": topology}
    names = _matching({key: text for key, text in wanted.items() if text is not None})
    rows, conflicts = _verified(names) if verify else (_table(names), 0)
    _write(rows, format_)
    if conflicts:
        complain(f"{conflicts} declared coordinates conflict with the measured ones")
        raise typer.Exit(1)


def _matching(wanted: dict[str, str]) -> list[str]:
    """Names of the methods that have every wanted coordinate. Raises `UserError`."""
    from attnbench import registry
    from attnbench.taxonomy import parse, select

    try:
        members = {key: parse(key, text) for key, text in wanted.items()}
    except ValueError as error:
        raise UserError(str(error)) from None
    return [m.name for m in select(map(registry.get, registry.methods()), **members)]


def _table(names: list[str]) -> Rows:
    from attnbench.registry import get
    from attnbench.taxonomy import TITLES, rows

    return [{TITLES.get(key, key): value for key, value in row.items()} for row in rows([get(name) for name in names])]


def _verified(names: list[str]) -> tuple[Rows, int]:
    """Declared beside measured, and how many conflict."""
    from attnbench.registry import get
    from attnbench.verify import verify

    found = [row for name in names for row in verify(get(name))]
    return [row.as_dict() for row in found], sum(row.conflict for row in found)


def _write(rows: Rows, form: Format) -> None:
    if form is Format.RICH:
        emit_table(rows)
    elif form is Format.JSON:
        emit_json(list(rows))
    else:
        print({Format.MARKDOWN: markdown, Format.LATEX: latex, Format.CSV: comma_separated}[form](rows))
