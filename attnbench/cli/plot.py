"""`attnbench plot`."""

from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli import _filters
from attnbench.cli._options import Plugins, complete_figure, with_plugins
from attnbench.cli._progress import following


def plot(
    results: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="A results folder, or one records file.")] = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where figures go. Default: RESULTS/figures.")] = None,
    examples: Annotated[
        list[str], typer.Option("--examples", metavar="TASK", help="Instead draw examples of a task of pictures. Repeatable.")
    ] = [],
    kept: Annotated[
        Path | None, typer.Option("--kept", metavar="CHECKPOINT", help="Instead draw which tokens the experts of a trained model keep.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="PATH", help="With --kept: the folder of images of its task.")] = None,
    figure: Annotated[
        list[str], typer.Option("--figure", metavar="NAME", help="Only this figure. Repeatable.", autocompletion=complete_figure)
    ] = [],
    suite: _filters.Suites = [],
    method: _filters.Methods = [],
    device: _filters.Devices = [],
    plugin: Plugins = [],
) -> None:
    """Draw every figure that the results allow, each as .pdf, .png and a .csv of exactly what was drawn; print their paths."""
    from attnbench.figures import drawn, told, write
    from attnbench.files import hold_folder

    with_plugins(plugin)
    folder = out or (results.parent if results.is_file() else results) / "figures"
    hold_folder(folder)
    if examples:
        _draw_examples(examples, folder)
    if kept:
        _draw_kept(kept, data, folder)
    if examples or kept:
        return
    table = _filters.load(results, suite, method, device)
    for one in drawn(table, names=figure, follow=lambda plan: following(plan, told)):
        for path in write(one.figure, one.module.data(one.rows), folder / one.stem):
            print(path)


def _draw_examples(tasks: list[str], folder: Path) -> None:
    """At each usual length of each task."""
    from attnbench.figures import _examples, _style, write
    from attnbench.tasks import trained

    with _style.paper():
        for task in map(trained.get, tasks):
            for n in task.lengths:
                for path in write(_examples.build(task, n), _examples.data(task, n), folder / f"examples-{task.stem}-{n}"):
                    print(path)


def _draw_kept(checkpoint: Path, data: Path | None, folder: Path) -> None:
    """On the first test examples of the task that the model was trained on."""
    from attnbench.batches import Prepared
    from attnbench.figures import _kept, _style, write
    from attnbench.pretrained import open_checkpoint
    from attnbench.tasks.routing import layers

    model, task = open_checkpoint(checkpoint, data)
    batch = task.batch("test", 0, 4, model.architecture.tokens, 0)
    found = layers(model, Prepared(batch.inputs, batch.targets, batch.groups, None, None))
    with _style.paper():
        for path in write(_kept.build(task, batch, found), _kept.data(task, batch, found), folder / f"kept-{checkpoint.stem}"):
            print(path)
