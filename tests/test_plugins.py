"""`--plugin`: what is said where a file cannot be used, and where its method is not asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cli_support import call

from attnbench import registry

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
from attnbench.method import Method
from attnbench.methods.softmax import METHOD as SOFTMAX
wanted = ("coordinates", "citation", "params", "reference", "experts", "cost")
fields = {"name": "strided", "title": "Strided", **{key: getattr(SOFTMAX, key) for key in wanted}}
METHOD = Method(**fields)
"""
"""Softmax attention under another name."""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A registry of each test alone, and its folder."""
    known = registry.registry()
    copy = registry.Registry(dict(known.found), {}, dict(known.sources))
    monkeypatch.setattr(registry, "registry", lambda: copy)
    monkeypatch.chdir(tmp_path)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def", "SyntaxError: invalid syntax (strided.py, line 1)"),
        ("x = 1\ny = x.z", "AttributeError: 'int' object has no attribute 'z' (line 2)"),
        ("raise SystemExit", "SystemExit: no message (line 1)"),
        ("x = 1", "it exports no METHOD of type attnbench.method.Method"),
        (changed('"name": "strided"', '"name": "other"'), "METHOD.name is 'other', but its file or entry point is named 'strided'"),
        (changed(', "cost"', ""), "METHOD lacks cost: give Method(cost=...)"),
        (changed('"reference", "experts", "cost"', ""), "METHOD lacks reference, cost: give Method(reference=..., cost=...)"),
        (changed("**fields", "**fields, exakt=True"), "unknown field 'exakt' in METHOD: did you mean exact"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "strided.py").write_text(text)
    result = call("show", "softmax", "--plugin", "strided.py")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith(f"error: strided.py: {why}")


@pytest.mark.parametrize("words", ["check softmax", "plan quick", "run quick", "taxonomy"])
def test_every_command_refuses_a_folder_with_a_broken_plugin(words: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "strided.py").write_text(GOOD)
    (tmp_path / "mine" / "broken.py").write_text("def")
    result = call(*words.split(), "--plugin", "mine")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith("error: mine/broken.py: SyntaxError")
    assert "strided" in call("list", "--plugin", "mine").stdout
