"""`attnbench plot`."""

from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli._output import complain


def plot(
    results: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="A results folder, or one records file.")] = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where figures go. Default: RESULTS/figures.")] = None,
) -> None:
    """Draw every figure that the results allow, each as .pdf, .png and a .csv of exactly what was drawn; print their paths."""
    from attnbench import frame
    from attnbench.figures import draw_all

    table, notes = frame.load(results)
    for note in notes:
        complain(note)
    for path in draw_all(table, out or (results.parent if results.is_file() else results) / "figures"):
        print(path)
