"""`attnbench report`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli import _filters
from attnbench.cli._options import Plugins, with_plugins
from attnbench.cli._output import complain
from attnbench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


class Format(StrEnum):
    """How a report is written."""

    MARKDOWN = "markdown"
    LATEX = "latex"


def report(
    results: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="A results folder, or one records file.")] = Path("results"),
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Only these lengths. Default: all.")] = "",
    format_: Annotated[Format, typer.Option("--format")] = Format.MARKDOWN,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write there, and print the path. Default: stdout.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with plots instead, for a browser, without network.")
    ] = None,
    suite: _filters.Suites = [],
    method: _filters.Methods = [],
    device: _filters.Devices = [],
    plugin: Plugins = [],
) -> None:
    """Write the results as tables: a row a method, a column a length, speed-ups over the best dense method, failures in their place."""
    from attnbench import files, tables, typeset

    with_plugins(plugin)
    table = _filters.load(results, suite, method, device)
    if html is not None:
        _refuse_other_forms(lengths, format_, out)
        files.write(html, _page(results, table), parents=False)
        print(html)
        return
    made = tables.report(table, _lengths(lengths, table))
    if not made:
        raise UserError(f"{results} holds no record that a table shows: run a suite first")
    text = typeset.render(made, format_.value)
    if out is None:
        print(text)
    else:
        files.write(out, text + "\n", parents=False)
        print(out)


def _refuse_other_forms(lengths: str, format_: Format, out: Path | None) -> None:
    if lengths or out or format_ is not Format.MARKDOWN:
        raise UserError("--html shows all lengths in a form of its own: leave --lengths, --format and --out out")


def _page(results: Path, table: "pd.DataFrame") -> str:
    from attnbench import page, store
    from attnbench.cli._progress import following
    from attnbench.figures import _interactive, told

    if table.empty:
        raise UserError(f"{results} holds no record yet: run a suite first")
    environments = {key: facts for file in store.find(results) for key, facts in store.environments(file).items()}
    plots = _interactive.plots(table, lambda plan: following(plan, told))
    return page.build(table, environments, plots, _interactive.script(), _interactive.legend())


def _lengths(text: str, table: "pd.DataFrame") -> list[int] | None:
    """What `--lengths` names. Raises `UserError` where the table has none of it; some that it lacks are told on stderr."""
    if not text:
        return None
    try:
        wanted = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--lengths {text}: give whole numbers, as --lengths 4096,65536") from None
    known = sorted({int(n) for n in table["n"]}) if len(table) else []
    absent = ", ".join(str(n) for n in wanted if n not in known)
    if absent and known:
        told = f"--lengths {text}: these results have no N = {absent}, but {', '.join(map(str, known))}"
        if not set(wanted) & set(known):
            raise UserError(told)
        complain(told)
    return wanted
