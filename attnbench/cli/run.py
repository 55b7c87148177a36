"""`attnbench run`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli._options import Axes, Budget, DeviceOption, MethodNames, Plugins, Settings, SuiteName, read_suite, with_plugins
from attnbench.cli._output import complain

if TYPE_CHECKING:
    from attnbench.runner import Summary
    from attnbench.suite import Suite


def run(
    suite: SuiteName,
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="Records go to DIR/<suite>/<device>/.")] = Path("results"),
    device: DeviceOption = None,
    method: MethodNames = [],
    axis: Axes = [],
    set_: Settings = [],
    budget: Budget = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Leave alone what earlier runs settled on this environment.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: try cells again that ran out of memory or time.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Time a cell may take in all.")] = None,
    budget_s: Annotated[float | None, typer.Option("--budget-s", metavar="SECONDS", help="Timed calls of a cell, in all.")] = None,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Take each cell's time apart by stage, on calls of its own.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell only of notes and failures.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write each record to stdout as one JSON line.")] = False,
    plugin: Plugins = [],
) -> None:
    """Run a suite: check, time and measure every cell, each written to disk before the next begins.

    Results are only ever added to. Without --resume every cell is measured, those of earlier runs once more as further attempts; with
    it, a run that was interrupted goes on where it stopped. Exit code 1 where a cell failed, 130 where the run was interrupted.
    """
    from attnbench.environment import pick_device

    with_plugins(plugin)
    chosen = _protocol(read_suite(suite, axis, method, set_, budget), timeout, budget_s, breakdown or None)
    kind = pick_device(device)
    summary = _sweep(chosen, results, device=kind, resume=resume or retry, retry=retry, plugins=plugin, quiet=quiet, echo=json)
    _conclude(summary, json)


def _protocol(suite: "Suite", timeout: float | None, budget: float | None, breakdown: bool | None) -> "Suite":
    options = {"timeout_s": timeout, "budget_s": budget, "breakdown": breakdown}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    return replace(suite, protocol=replace(suite.protocol, **given))


def _sweep(
    suite: "Suite", results: Path, *, device: str, resume: bool, retry: bool, plugins: list[Path], quiet: bool, echo: bool
) -> "Summary":
    from attnbench.cli._progress import Reporter
    from attnbench.runner import sweep

    with Reporter(quiet=quiet, echo=echo) as reporter:
        try:
            return sweep(suite, results, device=device, resume=resume, retry=retry, plugins=plugins, tell=reporter)
        except KeyboardInterrupt:
            interrupted = reporter.done
    complain(f"interrupted: {interrupted} cells done, run again with --resume")
    raise typer.Exit(130)


def _conclude(summary: "Summary", json: bool) -> None:
    """Say how it went and where the records are; exit code 1 where cells failed."""
    parts = [f"{count} {status}" for status, count in summary.counts.most_common()]
    if summary.resumed:
        parts.append(f"{summary.resumed} settled before")
    complain(", ".join(parts) or "no cells")
    if summary.failed:
        _failures(summary)
    if not json:
        print(summary.folder)
    if summary.failed:
        raise typer.Exit(1)


def _failures(summary: "Summary") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("cell", "status", "why", title="failed cells", title_justify="left")
    for record in summary.records:
        if str(record.status) not in ("ok", "unsupported", "skipped"):
            table.add_row(*(escape(text) for text in (str(record.case), str(record.status), "; ".join(record.reasons))))
    Console(stderr=True).print(table)
