"""`attnbench compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._options import Json, Plugins, note_strangers, with_plugins
from attnbench.cli._output import complain, emit_json

if TYPE_CHECKING:
    import pandas as pd

    from attnbench.compare import Comparison
    from attnbench.drift import Drift


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A results folder or records file; or a method, as softmax@flash.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="Where two methods are looked up.")] = Path("results"),
    drift: Annotated[bool, typer.Option("--drift", help="List instead how far cells measured again later came out.")] = False,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """Say of each cell whether B is faster than A, slower, or not separable from it.

    A and B are two results, paired by suite, device and case, or two methods within the results of --results. How far cells drifted
    that one environment measured more than once is told on stderr, and listed by --drift.
    """
    from attnbench import stats
    from attnbench.compare import lines
    from attnbench.drift import summary

    with_plugins(plugin)
    compared = _compare(a, b, results)
    drifted = _drift(a, b, results)
    if drifted and not drift:
        complain(summary(drifted) + "; --drift lists them")
    found: list[Comparison] | list[Drift] = drifted if drift else compared
    if json:
        return emit_json([row.as_dict() for row in found])
    for line in map(str, drifted) if drift else lines(compared):
        print(line)
    if any(row.floor for row in found):
        complain(stats.FLOOR)
    return None


def _drift(a: str, b: str, results: Path) -> "list[Drift]":
    """Drift within both results, or of the two methods."""
    from pandas import concat

    from attnbench import drift, frame

    if Path(a).exists() and Path(b).exists():
        return drift.find(concat([frame.load(Path(side), attempts=True)[0] for side in (a, b)], ignore_index=True))
    table = frame.load(results, attempts=True)[0]
    return drift.find(table[table["label"].isin([a, b])])


def _compare(a: str, b: str, results: Path) -> "list[Comparison]":
    from attnbench import compare as comparing

    if Path(a).exists() and Path(b).exists():
        sides = _load(Path(a)), _load(Path(b))
        note_strangers(*sides)
        return comparing.results(*sides)
    table = _load(results)
    note_strangers(table)
    return comparing.methods(table, a, b)


def _load(results: Path) -> "pd.DataFrame":
    from attnbench import frame

    table, notes = frame.load(results)
    for note in notes:
        complain(note)
    return table
