"""README shows what its commands print and what is in the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnbench.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", re.findall(r"<!-- attnbench (.*) -->", README))
def test_tables_are_what_their_commands_print(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(app, shlex.split(command)).stdout
    table = README.split(f"<!-- attnbench {command} -->\n")[1].split("\n\n")[0]
    assert table.startswith("| ")
    assert table in printed


def test_links_and_pictures_exist() -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_the_python_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.rpartition("# ")[2].strip()


def test_every_command_shown_parses() -> None:
    """Each line of the tour names a command and options that exist."""
    for line in re.findall(r"^attnbench (\w+)(.*?)(?:#.*)?$", README, re.MULTILINE):
        shown = CliRunner().invoke(app, [line[0], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        for option in re.findall(r"--[\w-]+", line[1]):
            assert option in shown.stdout, (line, option)
