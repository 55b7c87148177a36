"""`attnbench crossover`."""

from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli._options import Json, Plugins, note_strangers, with_plugins
from attnbench.cli._output import complain, emit_json


def crossover(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A results folder, or one records file.")],
    against: Annotated[str, typer.Option("--against", metavar="NAME", help="The baseline, as the suite names it.")] = "softmax@cudnn",
    metric: Annotated[str, typer.Option("--metric", metavar="METRIC", help="latency or peak_memory.")] = "latency",
    mode: Annotated[str | None, typer.Option("--mode", metavar="MODE", help="Only forward, or only forward+backward.")] = None,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """Say from which length on each method is better than a baseline, with a 95% interval, or why there is no such length."""
    from attnbench import crossover as crossing
    from attnbench import frame

    with_plugins(plugin)
    table, notes = frame.load(results)
    for note in notes:
        complain(note)
    note_strangers(table)
    found = crossing.find(table, against, metric, mode)
    if json:
        return emit_json([one.as_dict() for one in found])
    for i, one in enumerate(found):
        where = (one.suite, one.device, one.conditions, one.baseline)
        before = found[i - 1] if i else None
        if before is None or where != (before.suite, before.device, before.conditions, before.baseline):
            print(f"{chr(10) if i else ''}{one.suite}, {one.device}, against {one.baseline} ({one.conditions})")
        print(one)
    return None
