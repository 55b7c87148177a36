"""Filters of commands that read results: which suites, methods and devices they are about."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._options import complete_method, complete_suite, note_strangers
from attnbench.cli._output import complain

if TYPE_CHECKING:
    import pandas as pd

Suites = Annotated[list[str], typer.Option("--suite", metavar="NAME", help="Only this suite. Repeatable.", autocompletion=complete_suite)]
Methods = Annotated[
    list[str], typer.Option("--method", metavar="NAME[@IMPL]", help="Only this method. Repeatable.", autocompletion=complete_method)
]
Devices = Annotated[
    list[str], typer.Option("--device", metavar="TEXT", help="Only this device, as recorded or as in file names. Repeatable.")
]


def load(results: Path, suite: Sequence[str], method: Sequence[str], device: Sequence[str]) -> "pd.DataFrame":
    """The records that the filters leave; what is to be said of them goes to stderr. Raises `UserError` where they leave none."""
    from attnbench import frame

    table, notes = frame.load(results)
    for note in notes:
        complain(note)
    kept = frame.only(table, suite, method, device)
    note_strangers(kept)
    return kept


def words(suite: Sequence[str], method: Sequence[str], device: Sequence[str]) -> list[str]:
    """The options that were given, as a command line has them."""
    return [w for option, names in (("suite", suite), ("method", method), ("device", device)) for n in names for w in (f"--{option}", n)]
