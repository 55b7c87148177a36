"""Standard output that cannot be written: one line, exit code 1, and a sweep that goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_support import SUITE

from attnbench import store
from attnbench.cli import main

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full, a file that is always full")


def start(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of the program, with a full disk as its standard output."""
    monkeypatch.setattr(sys, "argv", ["attnbench", *map(str, words)])
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@needs_full
@pytest.mark.parametrize("words", [["list", "softmax"], ["suites", "--json"], ["--help"]])
def test_a_full_disk_is_one_line_and_exit_code_1(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, *words) == 1
    assert capfd.readouterr().err == "cannot write to standard output: No space left on device\n"


@needs_full
def test_a_sweep_goes_on_where_its_records_cannot_be_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SUITE)
    words = ["run", path, "--results", tmp_path / "r", "--device", "cpu", "--json", "--quiet", "--method", "softmax", "--axis", "n=16,32"]
    assert start(monkeypatch, *words) == 1
    told = capfd.readouterr().err
    assert told.count("cannot write to standard output: No space left on device") == 1
    assert "2 ok" in told
    assert sum(len(store.read(file).records) for file in store.find(tmp_path / "r")) == 2
