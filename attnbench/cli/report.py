"""`attnbench report`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._output import complain, latex, markdown
from attnbench.errors import UserError

if TYPE_CHECKING:
    from attnbench.report import Section


class Format(StrEnum):
    """How a report is written."""

    MARKDOWN = "markdown"
    LATEX = "latex"


def report(
    results: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="A results folder, or one records file.")] = Path("results"),
    format_: Annotated[Format, typer.Option("--format")] = Format.MARKDOWN,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write there, and print the path. Default: stdout.")] = None,
) -> None:
    """Write the results as tables: a row a method, a column a length, failures in their place."""
    from attnbench import frame
    from attnbench.report import sections

    table, notes = frame.load(results)
    for note in notes:
        complain(note)
    text = "\n\n".join(_section(section, format_) for section in sections(table))
    if out is None:
        print(text)
    else:
        _write(out, text + "\n")
        print(out)


def _section(section: "Section", form: Format) -> str:
    if form is Format.MARKDOWN:
        return f"### {section.title}\n\n{section.conditions}\n\n{markdown(section.rows)}"
    return f"% {section.title}; {section.conditions}\n{latex(section.rows)}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
