"""`attnbench taxonomy`."""

from enum import StrEnum
from pathlib import Path
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
    costs: Annotated[
        bool, typer.Option("--costs", help="What each method reads and costs at --n; with --results, its time and distance from softmax.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="STEM", help="Draw the methods on two dimensions: STEM.pdf, .png and .csv.")
    ] = None,
    across: Annotated[str, typer.Option("--across", help="Dimension from left to right, for --figure.")] = "construction",
    down: Annotated[str, typer.Option("--down", help="Dimension from top to bottom, for --figure.")] = "topology",
    colour: Annotated[str, typer.Option("--colour", metavar="METRIC", help="Measured number as colour, as latency; needs --results.")] = "",
    size: Annotated[str, typer.Option("--size", metavar="METRIC", help="Measured number as size, as peak_memory; needs --results.")] = "",
    results: Annotated[Path | None, typer.Option("--results", metavar="PATH", help="Records that numbers are taken from.")] = None,
    n: Annotated[int, typer.Option("--n", help="Sequence length of the numbers of --costs and --figure.")] = 65536,
    plugin: Plugins = [],
) -> None:
    """Print the paper's table: each method's place along the five dimensions. Or draw it, with --figure."""
    with_plugins(plugin)
    wanted = {"scaling": scaling, "expert": expert, "count": count, "construction": construction, "topology": topology}
    names = _matching({key: text for key, text in wanted.items() if text is not None})
    if figure is not None:
        for path in _drawn(names, figure, across, down, (colour, size), results, n):
            print(path)
        return
    if costs:
        _write(_costs(names, n, results), format_)
        return
    rows, complaints = _verified(names) if verify else (_table(names), [])
    _write(rows, format_)
    for line in complaints:
        complain(line)
    if complaints:
        raise typer.Exit(1)


def _costs(names: list[str], n: int, results: Path | None) -> Rows:
    """A row a method; what the columns are goes to the log."""
    from attnbench import frame, overview, registry

    table, notes = frame.load(results) if results is not None else (None, [])
    rows, told = overview.rows([registry.get(name) for name in names], n, table)
    for line in [*notes, *told]:
        complain(line)
    return rows


def _drawn(names: list[str], stem: Path, across: str, down: str, shown: tuple[str, str], results: Path | None, n: int) -> list[Path]:
    """Draw the picture and write its files."""
    from attnbench import frame, registry
    from attnbench.figures import _taxonomy, write
    from attnbench.figures._style import paper

    metrics = [name for name in shown if name]
    if metrics and results is None:
        raise UserError("--colour and --size need --results PATH, the records that numbers are taken from")
    numbers, note = {}, ""
    if results is not None and metrics:
        table, notes = frame.load(results)
        for line in notes:
            complain(line)
        numbers = _taxonomy.measured(table, metrics, n)
        note = _taxonomy.conditions(table[(table["status"] == "ok") & (table["n"] == n)], n)
    drawn = _taxonomy.data([registry.get(name) for name in names], across, down, numbers)
    with paper():
        return write(_taxonomy.build(drawn.copy(), across, down, colour=shown[0], size=shown[1], note=note), drawn, stem)


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


def _verified(names: list[str]) -> tuple[Rows, list[str]]:
    """Declared beside measured, and what is wrong with them."""
    from attnbench.registry import get
    from attnbench.verify import verify

    found = [row for name in names for row in verify(get(name))]
    conflicts, broken = sum(row.conflict for row in found), dict.fromkeys(f"{row.method}: {row.why}" for row in found if row.broken)
    told = [f"{conflicts} declared coordinates conflict with the measured ones"] if conflicts else []
    return [row.as_dict() for row in found], [*told, *broken]


def _write(rows: Rows, form: Format) -> None:
    if form is Format.RICH:
        emit_table(rows)
    elif form is Format.JSON:
        emit_json(list(rows))
    else:
        print({Format.MARKDOWN: markdown, Format.LATEX: latex, Format.CSV: comma_separated}[form](rows))
