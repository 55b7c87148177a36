"""`attnbench compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._options import Json
from attnbench.cli._output import complain, emit_json

if TYPE_CHECKING:
    import pandas as pd

    from attnbench.compare import Comparison


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A results folder or records file; or a method, as softmax@flash.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="Where two methods are looked up.")] = Path("results"),
    json: Json = False,
) -> None:
    """Say of each cell whether B is faster than A, slower, or not separable from it.

    A and B are two results, paired by suite, device and case, or two methods within the results of --results.
    """
    found = _compare(a, b, results)
    if json:
        return emit_json([row.as_dict() for row in found])
    for row in found:
        print(row)
    return None


def _compare(a: str, b: str, results: Path) -> "list[Comparison]":
    from attnbench import compare as comparing

    if Path(a).exists() and Path(b).exists():
        return comparing.results(_load(Path(a)), _load(Path(b)))
    return comparing.methods(_load(results), a, b)


def _load(results: Path) -> "pd.DataFrame":
    from attnbench import frame

    table, notes = frame.load(results)
    for note in notes:
        complain(note)
    return table
