"""Options that several commands share, and how their text is read."""

from collections.abc import Sequence
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._output import complain
from attnbench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from attnbench.suite import Suite


class Device(StrEnum):
    """Kinds of device."""

    CPU = "cpu"
    CUDA = "cuda"


def _built_in(package: str, suffix: str, incomplete: str) -> list[str]:
    """File names of a package that begin with `incomplete`; reads the folder alone, so completion is quick."""
    names = (Path(item.name) for item in files(package).iterdir())
    return sorted(p.stem for p in names if p.suffix == suffix and p.stem.startswith(incomplete) and not p.stem.startswith("_"))


def complete_method(incomplete: str) -> list[str]:
    """Built-in methods that begin so."""
    return _built_in("attnbench.methods", ".py", incomplete)


def complete_suite(incomplete: str) -> list[str]:
    """Built-in suites that begin so."""
    return _built_in("attnbench.suites", ".toml", incomplete)


def complete_figure(incomplete: str) -> list[str]:
    """Figures that begin so."""
    return _built_in("attnbench.figures", ".py", incomplete)


FOLDER_TASK = "images"
"""The trained task that reads a folder."""

Plugins = Annotated[
    list[Path], typer.Option("--plugin", metavar="PATH", help="A .py file, or a folder of them, with further methods. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON, for a machine to read.")]
DeviceOption = Annotated[Device | None, typer.Option("--device", help="Default: cuda where there is a GPU, else cpu.")]
SuiteName = Annotated[
    str, typer.Argument(metavar="SUITE", help="A built-in suite, or the path of a .toml file.", autocompletion=complete_suite)
]
MethodNames = Annotated[
    list[str],
    typer.Option(
        "--method", metavar="NAME", help="Only this method, NAME or NAME@IMPLEMENTATION. Repeatable.", autocompletion=complete_method
    ),
]
AXIS_NAMES = (
    "n, batch, heads, kv_heads, dim, dim_v, dtype, mode, causal, profile, seed, l2, graph, budget; of suites that train: data, steps, "
    "depth, rates, positions, trained_with, model, recipe, short_conv"
)
"""What `attnbench.axes.AXES` holds, which help and completion do not wait for."""
Axes = Annotated[
    list[str],
    typer.Option("--axis", metavar="AXIS=VALUE,...", help=f"Other values of an axis, as n=1024,2048. Repeatable. Axes: {AXIS_NAMES}."),
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="METHOD.PARAM=VALUE,...", help="Another parameter, as mita.topk=32. Repeatable.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="keys=K,...",
        help="Parameters with which a query reads about K keys or other hidden units, where a method has such.",
    ),
]


Data = Annotated[
    Path | None, typer.Option("--data", metavar="PATH", help="The folder that the task images reads, with a sub-folder of images a class.")
]


def read_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """`n=1024,2048` -> axis and values. Raises `UserError`."""
    return {axis: values.split(",") for axis, values in (_pair(text, "--axis", "n=1024,2048") for text in texts)}


def read_settings(texts: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """`mita.topk=16,32` -> method, parameter and values. Raises `UserError`."""
    found: dict[str, dict[str, list[str]]] = {}
    for text in texts:
        key, values = _pair(text, "--set", "mita.topk=32")
        method, dot, name = key.rpartition(".")
        if not (dot and method and name):
            raise UserError(f"--set {text}: {key!r} names no method and parameter: write it as mita.topk=32")
        found.setdefault(method, {})[name] = values.split(",")
    return found


def read_budget(text: str | None) -> dict[str, list[str]]:
    """`keys=64,128` -> the axis `budget` and its values; nothing for None. Raises `UserError`."""
    if text is None:
        return {}
    key, values = _pair(text, "--budget", "keys=64")
    if key != "keys":
        raise UserError(f"--budget {text}: {key!r} is not what a budget counts: write it as keys=64")
    if wrong := [v for v in values.split(",") if not (v.isdecimal() and int(v))]:
        raise UserError(f"--budget {text}: {wrong[0]!r} is no whole number of at least 1: write it as keys=64")
    return {"budget": values.split(",")}


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not (equals and key):
        raise UserError(f"{option} {text}: there is no '=' after a name: write it as {example}")
    return key.strip(), values.strip()


def read_suite(name: str, axis: Sequence[str], method: Sequence[str], settings: Sequence[str], budget: str | None = None) -> "Suite":
    """The suite as the options change it. Raises `UserError`."""
    from attnbench.suite_file import load

    return load(name).override(read_axes(axis) | read_budget(budget), method, read_settings(settings))


def with_folder(suite: "Suite", path: Path | None, *, needed: bool) -> "Suite":
    """The suite whose task of images reads the folder `path`. Raises `UserError` where it has none, or where it is `needed` and None."""
    from attnbench.case import TRAINED

    tasks = list(dict.fromkeys(case.data for case in suite.expand())) if suite.task == TRAINED else []
    if path is None:
        if needed and FOLDER_TASK in tasks:
            raise UserError(f"suite {suite.name} reads a folder of images: give it with --data PATH, a sub-folder a class")
        return suite
    if not any(task.partition(":")[0] == FOLDER_TASK for task in tasks):
        raise UserError(f"suite {suite.name} has no task that reads a folder: leave --data out, or add --axis data={FOLDER_TASK}")
    if "," in str(path):
        raise UserError(f"--data {path}: a comma separates values of an axis: give the folder another name, or a link to it")
    return suite.override({"data": [f"{FOLDER_TASK}:{path.resolve()}" if task == FOLDER_TASK else task for task in tasks]}, [], {})


def with_plugins(plugins: Sequence[Path], *, refuse: bool = True) -> None:
    """Add the methods of `--plugin`. Raises `UserError` where one fails to load, unless `refuse` is False."""
    from attnbench.registry import add_plugins

    failed = add_plugins(plugins)
    if failed and refuse:
        raise UserError("; ".join(f"{each.source}: {each.error}" for each in failed))


def note_unused(plugins: Sequence[Path], suite: "Suite") -> None:
    """Say which of `--plugin` hold no method of this suite, where no `--method` says which were meant."""
    from attnbench.registry import plugin_files, registry

    methods = {case.method for case in suite.planned()}
    held = [[file.stem for file in plugin_files(path) if registry().sources.get(file.stem) == str(file)] for path in plugins]
    names = [name for each in held if methods.isdisjoint(each) for name in each]
    if names:
        advice = " ".join(f"--method {name}" for name in names)
        be, it = ("is", "it") if len(names) == 1 else ("are", "them")
        complain(f"{', '.join(names)} {be} loaded, but suite {suite.name} has no cell of {it}: add {advice}")


def note_strangers(*tables: "pd.DataFrame") -> None:
    """Say which methods of these records are not known here, so that their titles and families are not either."""
    from attnbench.registry import methods

    names = sorted({name for table in tables if "method" in table for name in table["method"].unique()} - set(methods()))
    if len(names) == 1:
        complain(f"{names[0]} is no built-in method: give its file with --plugin, for its title, family and source")
    elif names:
        complain(f"{', '.join(names)} are no built-in methods: give their files with --plugin, for their titles, families and sources")
