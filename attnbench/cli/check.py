"""`attnbench check`."""

from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._options import DeviceOption, Json, Plugins, complete_method, with_plugins
from attnbench.cli._output import complain, emit_json, emit_table
from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attnbench.checks import Asked, Finding


def check(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method, or NAME@IMPLEMENTATION.", autocompletion=complete_method)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every method.")] = False,
    device: DeviceOption = None,
    concurrent: Annotated[
        int, typer.Option("--concurrent", metavar="K", help="Checks at once, each in a process of its own where K is above 1.")
    ] = 1,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """Hold a method to its contract: what it declares, its definition, fast weights, coordinates and cost, and every implementation.

    Implementations are held against the method's float64 definition, as every run does before it times one; of NAME@IMPLEMENTATION, that
    one alone is. Exit code 1 on a failure.
    """
    from attnbench.checks import checks
    from attnbench.contract import parts
    from attnbench.environment import pick_device
    from attnbench.registry import get, methods

    with_plugins(plugin)
    if (name is None) != every:
        raise UserError("name a method, or give --all: one of the two")
    if concurrent < 1:
        raise UserError(f"--concurrent {concurrent}: no check would run: give at least 1")
    kind = pick_device(device)
    asked: list[Asked] = []
    for method in map(get, [name] if name else methods()):
        asked += [*parts(method), *checks(method, kind)]
    found = _found(asked, kind, concurrent, plugin)
    emit_json([asdict(row) for row in found]) if json else emit_table([_line(row) for row in found])
    failed = sum(row.verdict == "failed" for row in found)
    complain(f"{len(found)} checks, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def _found(asked: "Sequence[Asked]", device: str, concurrent: int, plugins: "Sequence[Path]") -> "list[Finding]":
    """What the checks found, in their order, whichever ended first."""
    from attnbench.cli._progress import Tally
    from attnbench.dealing import findings

    found: dict[int, Finding] = {}
    with Tally([str(each) for each in asked]) as tally:
        try:
            with closing(findings(asked, device, concurrent, plugins=plugins, hear=tally.start)) as ended:
                for place, finding in ended:
                    found[place] = finding
                    tally.end(place)
            return [found[place] for place in range(len(asked))]
        except KeyboardInterrupt:
            pass
    complain(f"interrupted: {len(found)} of {len(asked)} checks done")
    raise typer.Exit(130)


def _line(row: "Finding") -> dict[str, str]:
    numbers = {"error": "" if row.error is None else f"{row.error:.2e}", "bound": "" if row.bound is None else f"{row.bound:.2e}"}
    return {key: str(value) for key, value in asdict(row).items()} | numbers
