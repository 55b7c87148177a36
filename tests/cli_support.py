"""What the tests of the command line share."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from attnbench.cli import app


def suite_text(methods: str, *n: int) -> str:
    """A small suite of the task speed, with the text of its methods."""
    return f"""
title = "Small"
question = "Does it run?"
task = "speed"
[axes]
n = {list(n)}
[fixed]
dim = 8
[measure]
budget_s = 0.01
aa = false
{methods}
"""


SUITE = suite_text('[[method]]\nname = "softmax"\n[[method]]\nname = "topk"\ntopk = 4', 16, 32, 48, 64)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def answer(*words: object) -> Any:
    """The JSON that a command prints."""
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
