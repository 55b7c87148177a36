"""`attnbench paper`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli import _filters
from attnbench.cli._options import Plugins, with_plugins
from attnbench.cli._progress import following
from attnbench.cli.report import _lengths

if TYPE_CHECKING:
    import pandas as pd

    from attnbench.paper import Picture


def paper(
    results: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="A results folder, or one records file.")] = Path("results"),
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the folder goes.")] = Path("paper"),
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Columns of tables. Default: four, from shortest to longest.")] = "",
    suite: _filters.Suites = [],
    method: _filters.Methods = [],
    device: _filters.Devices = [],
    plugin: Plugins = [],
) -> None:
    """Make a folder for a paper: figures one or two columns wide, LaTeX tables, captions, BibTeX, provenance; print the paths."""
    from attnbench import files
    from attnbench import paper as texts

    files.hold_folder(out)
    with_plugins(plugin)
    table = _filters.load(results, suite, method, device)
    wanted = _lengths(lengths, table)
    pictures = _draw(table, out / "figures")
    written = texts.contents(table, pictures, wanted) | {"commands.txt": texts.commands(table)}
    for name, text in written.items():
        files.write(out / name, text)
    made = {p.relative_to(out).as_posix(): p.read_bytes() for picture in pictures for p in (out / "figures").glob(f"{picture.name}.*")}
    extra = [*_filters.words(suite, method, device), *(word for path in plugin for word in ("--plugin", str(path)))]
    command = shlex.join(["attnbench", "paper", str(results), "--out", str(out), *(["--lengths", lengths] if lengths else []), *extra])
    files.write(out / "provenance.json", texts.provenance(results, table, made | {n: t.encode() for n, t in written.items()}, command))
    for name in sorted({*made, *written, "provenance.json"}):
        print(out / name)


def _draw(table: "pd.DataFrame", folder: Path) -> "list[Picture]":
    """Draw what the results allow, and say what each figure shows."""
    from attnbench.figures import drawn, told, write
    from attnbench.paper import Picture

    found = []
    for one in drawn(table, columns=1, follow=lambda plan: following(plan, told)):
        write(one.figure, one.module.data(one.rows), folder / one.stem, suffixes=(".pdf", ".csv"))
        title = " ".join((one.module.__doc__ or "").split("\n\n")[0].split())
        found.append(Picture(one.stem, title, one.rows, one.columns, " ".join(one.figure.get_supxlabel().split())))
    return found
