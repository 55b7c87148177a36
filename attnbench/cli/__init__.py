"""The command line: data on stdout, progress and complaints on stderr.

Exit codes: 0 done; 1 some cells, checks or coordinates failed, or stdout could not be written; 2 a mistake of the user, told in one
line; 130 interrupted. Each command imports what it needs when it runs, so that `--help` and completion wait for no torch.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from attnbench.cli._output import complain, whole_stdout
from attnbench.cli.capture import capture
from attnbench.cli.check import check
from attnbench.cli.compare import compare
from attnbench.cli.crossover import crossover
from attnbench.cli.env import env
from attnbench.cli.list import list_methods
from attnbench.cli.merge import merge
from attnbench.cli.new import new
from attnbench.cli.paper import paper
from attnbench.cli.plan import plan
from attnbench.cli.plot import plot
from attnbench.cli.report import report
from attnbench.cli.run import run
from attnbench.cli.show import show
from attnbench.cli.suites import suites
from attnbench.cli.taxonomy import taxonomy
from attnbench.errors import UserError

METHODS, MEASURE, RESULTS = "Methods", "Measuring", "Results"
"""Panels of the help."""


class Commands(TyperGroup):
    """Commands whose `UserError` becomes one line on stderr and exit code 2, and whose Ctrl-C becomes exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            complain(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        from attnbench import __version__

        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    name="attnbench",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def attnbench(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    """Speed, memory and accuracy of efficient attention, over the taxonomy of fast-weight scaling."""


for _name, _command, _panel in (
    ("list", list_methods, METHODS),
    ("show", show, METHODS),
    ("taxonomy", taxonomy, METHODS),
    ("check", check, METHODS),
    ("new", new, METHODS),
    ("suites", suites, MEASURE),
    ("plan", plan, MEASURE),
    ("run", run, MEASURE),
    ("env", env, MEASURE),
    ("capture", capture, MEASURE),
    ("plot", plot, RESULTS),
    ("compare", compare, RESULTS),
    ("crossover", crossover, RESULTS),
    ("report", report, RESULTS),
    ("paper", paper, RESULTS),
    ("merge", merge, RESULTS),
):
    app.command(
        _name, rich_help_panel=_panel, no_args_is_help=_name in ("new", "show", "plan", "capture", "run", "compare", "crossover", "merge")
    )(_command)


def main() -> None:
    """Entry point of the program `attnbench`."""
    with whole_stdout():
        app()
