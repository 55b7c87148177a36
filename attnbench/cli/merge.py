"""`attnbench merge`."""

from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli._output import complain


def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCES...", help="Results folders.")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="The folder that receives them; made where it is absent.")],
) -> None:
    """Join results folders, as of several machines, into one. Each attempt is taken once; sources are left as they are."""
    from attnbench import store

    added = store.merge(sources, into)
    complain(f"{added} new records")
    print(into)
