"""Finding methods: built in, by entry point, by path; and what is said where that fails."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import suite_text

import attnbench
from attnbench import registry
from attnbench.errors import UserError
from attnbench.registry import Registry

HERE = Path(__file__).parent
SUITE = suite_text('[[method]]\nname = "uniform"', 16, 33)
METHOD = """
from dataclasses import replace
from attnbench.registry import get
METHOD = replace(get("softmax"), name="{name}")
"""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of this test alone, with the built-in methods."""
    known = registry.registry()
    copy = Registry(dict(known.found), dict(known.failed), dict(known.sources))
    monkeypatch.setattr(registry, "registry", lambda: copy)
    return copy


def test_the_public_functions_answer_after_the_package_of_the_same_name_is_imported() -> None:
    before = attnbench.methods()
    importlib.import_module("attnbench.methods")
    assert attnbench.methods() == before == registry.methods()
    assert set(before) >= {
        "softmax",
        "mita",
        "moba",
        "agent",
        "linear",
        "nystromformer",
        "sliding_window",
        "topk",
        "flash_attn",
        "xformers",
    }


def test_every_built_in_method_loads_under_its_file_name() -> None:
    folder = Path(importlib.import_module("attnbench.methods").__file__ or "").parent
    files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    assert {name for name, source in registry.registry().sources.items() if source.startswith("attnbench.methods.")} == files


def test_an_implementation_can_be_pinned() -> None:
    assert attnbench.get("softmax@math").pinned == "math"
    assert attnbench.get("softmax").pinned == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mitaa", "unknown method 'mitaa': did you mean mita?"),
        ("zzz", "choose from agent"),
        ("softmax@flahs", "unknown implementation 'flahs' in softmax: did you mean flash?"),
    ],
)
def test_an_unknown_name_gets_advice(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        attnbench.get(name)


def test_a_file_and_a_folder_add_methods(own: Registry, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(METHOD.format(name=name))
    (tmp_path / "_helper.py").write_text("raise RuntimeError('helpers are not loaded as methods')")
    registry.add_plugins([tmp_path])
    registry.add_plugins([tmp_path / "one.py"])  # again, which changes nothing
    assert {"one", "two"} <= set(own.found)
    assert not own.failed


def test_broken_plugins_hide_no_other(own: Registry, tmp_path: Path) -> None:
    sources = {
        "good": METHOD.format(name="good"),
        "raises": "import no_such_package",
        "syntax": "def",
        "empty": "x = 1",
        "misnamed": METHOD.format(name="other"),
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert {failure.name for failure in registry.add_plugins([tmp_path])} == set(sources) - {"good"}
    assert "good" in own.found
    assert set(own.failed) == {"raises", "syntax", "empty", "misnamed"}
    assert "no_such_package" in own.failed["raises"].error
    assert "Traceback" in own.failed["raises"].trace
    assert "exports no METHOD" in own.failed["empty"].error
    assert "make them equal" in own.failed["misnamed"].error
    with pytest.raises(UserError, match=r"'raises' failed to load from .*raises.py"):
        registry.get("raises")


def test_a_name_that_is_taken_is_refused_and_both_places_are_named(own: Registry, tmp_path: Path) -> None:
    (tmp_path / "softmax.py").write_text(METHOD.format(name="softmax"))
    with pytest.raises(UserError, match=r"defined twice, in attnbench.methods.softmax and in .*softmax.py"):
        registry.add_plugins([tmp_path / "softmax.py"])


def test_a_path_that_is_no_plugin_is_refused(own: Registry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        registry.add_plugins([tmp_path / "absent.py"])
    with pytest.raises(UserError, match=r"holds no \.py file"):
        registry.add_plugins([tmp_path])


def test_an_installed_package_is_found_by_its_entry_point_and_swept(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(HERE / "plugin_example", source, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=120)
    (tmp_path / "mine.toml").write_text(SUITE)
    words = ["run", str(tmp_path / "mine.toml"), "--results", str(tmp_path / "results"), "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "from attnbench.cli import main; main()", *words],
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["case"]["method"], r["case"]["n"], r["status"]) for r in records] == [("uniform", 16, "ok"), ("uniform", 33, "ok")]
    stored = next((tmp_path / "results").rglob("records.jsonl")).read_text().splitlines()
    assert stored == done.stdout.splitlines()
