"""What the tests of the command line share."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from attnbench.cli import app

SUITE = """
title = "Small"
question = "Does it run?"
task = "speed"
[axes]
n = [16, 32, 48, 64]
[fixed]
dim = 8
[measure]
budget_s = 0.01
aa = false
[[method]]
name = "softmax"
[[method]]
name = "topk"
topk = 4
"""


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def answer(*words: object) -> Any:
    """The JSON that a command prints."""
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
