"""The wheel holds what the tree holds."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import attnbench

ROOT = Path(__file__).parent.parent
PACKAGES = {"attnbench": "attnbench", "methods": "attnbench/methods", "suites": "attnbench/suites"}
KINDS = {".css", ".js", ".py", ".toml", ".mplstyle", ".typed"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without what a build leaves behind."""
    target = tmp_path_factory.mktemp("tree")
    for path in files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes((ROOT / path).read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def files() -> list[Path]:
    found = [p for folder in PACKAGES for p in (ROOT / folder).rglob("*") if p.suffix in KINDS]
    return sorted(p.relative_to(ROOT) for p in found)


@pytest.fixture(scope="module")
def wheel(copy: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_the_wheel_holds_every_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    want = {f"{PACKAGES[p.parts[0]]}/{p.relative_to(p.parts[0]).as_posix()}" for p in files()}
    assert "attnbench/methods/softmax.py" in want
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == want


def test_every_file_of_a_package_has_a_kind_that_the_wheel_carries() -> None:
    ignored = {".pyc"}
    others = [p for folder in PACKAGES for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in KINDS | ignored]
    assert not others


def test_the_wheel_offers_the_program_and_the_licence(wheel: zipfile.ZipFile) -> None:
    info = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "attnbench = attnbench.cli:main" in wheel.read(info["entry_points.txt"]).decode()
    assert "License-Expression: Apache-2.0" in wheel.read(info["METADATA"]).decode()
    assert any(name.endswith("LICENSE") for name in info.values())


def test_the_version_is_stated_once_and_the_same() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == attnbench.__version__


def test_the_checkout_starts_the_program_without_being_installed() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, attnbench.__version__)
