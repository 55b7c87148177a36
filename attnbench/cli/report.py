"""`attnbench report`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How a report is written."""

    MARKDOWN = "markdown"
    LATEX = "latex"


def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A results folder, or one records file.")] = Path("results"),
    format_: Annotated[Format, typer.Option("--format")] = Format.MARKDOWN,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write there. Default: stdout.")] = None,
) -> None:
    """Write the results as tables."""
    raise NotImplementedError
