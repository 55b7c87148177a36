"""`attnbench run`."""

from collections import Counter
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli._options import (
    Axes,
    Budget,
    Data,
    DeviceOption,
    MethodNames,
    Plugins,
    Settings,
    SuiteName,
    note_unused,
    read_suite,
    with_folder,
    with_plugins,
)
from attnbench.cli._output import complain
from attnbench.errors import UserError

if TYPE_CHECKING:
    from attnbench.ray_executor import RayExecutor
    from attnbench.runner import Summary
    from attnbench.suite import Suite


class Place(StrEnum):
    """Where cells run."""

    LOCAL = "local"
    RAY = "ray"


Results = Annotated[Path, typer.Option("--results", metavar="DIR", help="Records go to DIR/<suite>/<device>/.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Leave alone what earlier runs settled on this environment.")]
Retry = Annotated[bool, typer.Option("--retry", help="With --resume: try cells again that ran out of memory or time.")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Time a cell may take in all.")]
BudgetS = Annotated[float | None, typer.Option("--budget-s", metavar="SECONDS", help="Timed calls of a cell, in all.")]
Untimed = Annotated[bool, typer.Option("--untimed", help="Leave out the clocks: output, gate and memory alone. A later --resume times.")]
Breakdown = Annotated[bool, typer.Option("--breakdown", help="Take each cell's time apart by stage, on calls of its own.")]
Energy = Annotated[bool, typer.Option("--energy", help="Meter the energy of calls too, where the GPU reports it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell only of notes and failures.")]
Json = Annotated[bool, typer.Option("--json", help="Write each record to stdout as one JSON line.")]
ShardText = Annotated[str | None, typer.Option("--shard", metavar="I/N", help="Only part I of N, for job arrays; then `merge`.")]
Executor = Annotated[Place, typer.Option("--executor", help="Run here, or on all GPUs of a Ray cluster.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster. Default: $RAY_ADDRESS, else this machine's.")
]
Concurrent = Annotated[
    int, typer.Option("--concurrent", metavar="K", min=1, help="Cells at once, where none is timed; over all GPUs that are alike.")
]


def run(
    suite: SuiteName,
    results: Results = Path("results"),
    device: DeviceOption = None,
    method: MethodNames = [],
    axis: Axes = [],
    set_: Settings = [],
    budget: Budget = None,
    data: Data = None,
    resume: Resume = False,
    retry: Retry = False,
    timeout: Timeout = None,
    budget_s: BudgetS = None,
    untimed: Untimed = False,
    breakdown: Breakdown = False,
    energy: Energy = False,
    quiet: Quiet = False,
    json: Json = False,
    plugin: Plugins = [],
    shard: ShardText = None,
    executor: Executor = Place.LOCAL,
    address: Address = None,
    concurrent: Concurrent = 1,
) -> None:
    """Run a suite: check, time and measure every cell, each written to disk as soon as it ends.

    Results are only ever added to. Without --resume every cell is measured, those of earlier runs once more as further attempts, and every
    model is trained anew; with it, a run that was interrupted goes on where it stopped. Exit code 1 where a cell failed, 130 where the run
    was interrupted.
    """
    from attnbench import distributed
    from attnbench.environment import pick_device
    from attnbench.shard import Shard

    with_plugins(plugin)
    chosen = with_folder(read_suite(suite, axis, method, set_, budget), data, needed=True)
    flags = {"timed": False if untimed else None, "breakdown": breakdown or None, "energy": energy or None}
    chosen = _protocol(chosen, {"timeout_s": timeout, "budget_s": budget_s, **flags})
    part = Shard.parse(shard) if shard else None
    if executor is Place.RAY and concurrent > 1:
        raise UserError("--concurrent is for this machine, a cluster has one cell on each device: leave it out")
    if distributed.rank():
        distributed.follow(pick_device(device), plugin)
        distributed.depart()
    if not method:
        note_unused(plugin, chosen)
    kind, place = _place(chosen, results, device, executor, address, plugin)
    summary, lost = _sweep(
        chosen,
        results,
        quiet=quiet,
        echo=json,
        **{"device": kind, "resume": resume or retry, "retry": retry, "plugins": plugin, "shard": part, "place": place},
        concurrent=concurrent,
    )
    distributed.end()
    _conclude(summary, json=json, lost=lost)


def _place(
    suite: "Suite", results: Path, device: str | None, executor: Place, address: str | None, plugins: list[Path]
) -> "tuple[str, RayExecutor | None]":
    """The kind of device, and the cluster whose workers run the cells, if any."""
    if executor is Place.RAY:
        from attnbench.ray_executor import connect
        from attnbench.runner import CHECKPOINTS

        cluster = connect(address, device, suite.protocol, plugins, results / suite.name / CHECKPOINTS)
        return cluster.device, cluster
    if address:
        raise UserError("--address is of a Ray cluster: add --executor ray, or leave it out")
    from attnbench.environment import pick_device

    return pick_device(device), None


def _protocol(suite: "Suite", options: dict[str, Any]) -> "Suite":
    """The suite with what was given, which is what is not None."""
    given = {key: value for key, value in options.items() if value is not None}
    return replace(suite, protocol=replace(suite.protocol, **given))


def _sweep(suite: "Suite", results: Path, *, quiet: bool, echo: bool, **options: Any) -> "tuple[Summary, bool]":
    """What the sweep did, and whether a record could not be written to stdout."""
    from attnbench.cli._progress import Reporter
    from attnbench.runner import sweep

    with Reporter(quiet=quiet, echo=echo) as reporter:
        try:
            return sweep(suite, results, tell=reporter, **options), reporter.lost
        except KeyboardInterrupt:
            interrupted = reporter.done
    complain(f"interrupted: {interrupted} cells done, run again with --resume")
    raise typer.Exit(130)


def _conclude(summary: "Summary", *, json: bool, lost: bool) -> None:
    """Say how it went and where the records are; exit code 1 where cells failed or their records were `lost` to stdout."""
    parts = [f"{count} {status}" for status, count in summary.counts.most_common()]
    if summary.resumed:
        parts.append(f"{summary.resumed} settled before")
    complain(", ".join(parts) or "no cells")
    if summary.failed:
        _failures(summary)
    elif summary.counts and not summary.resumed and set(summary.counts) <= {"unsupported", "skipped"}:
        complain(f"nothing was measured: {_reasons(summary)}")
    if not json:
        print(summary.folder)
    if summary.failed or lost:
        raise typer.Exit(1)


def _reasons(summary: "Summary") -> str:
    """Why cells were not measured, the most frequent reason first, and how many cells each is of."""
    reasons = Counter("; ".join(record.reasons) or str(record.status) for record in summary.records).most_common()
    told = [f"{reason} ({count} {'cell' if count == 1 else 'cells'})" for reason, count in reasons[:3]]
    return "; ".join([*told, *([f"and {len(reasons) - 3} more reasons"] if len(reasons) > 3 else [])])


def _failures(summary: "Summary") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("cell", "status", "why", title="failed cells", title_justify="left")
    for record in summary.records:
        if str(record.status) not in ("ok", "unsupported", "skipped", "diverged"):
            table.add_row(*(escape(text) for text in (str(record.case), str(record.status), "; ".join(record.reasons))))
    Console(stderr=True).print(table)
