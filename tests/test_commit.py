"""Which commit a record names."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from attnbench import environment

if TYPE_CHECKING:
    import pytest


def test_a_copy_says_its_commit_and_a_checkout_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNBENCH_COMMIT", "0123456789ab")
    assert environment.commit.__wrapped__() == "0123456789ab"
    monkeypatch.delenv("ATTNBENCH_COMMIT")
    answers = {"rev-parse": "fedcba987654\n", "status": " M a.py\n"}

    def ran(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 0, answers[words[1]], "")

    monkeypatch.setattr(subprocess, "run", ran)
    assert environment.commit.__wrapped__() == "fedcba987654+"
    answers["status"] = ""
    assert environment.commit.__wrapped__() == "fedcba987654"


def test_outside_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(words: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(128, words)

    monkeypatch.delenv("ATTNBENCH_COMMIT", raising=False)
    monkeypatch.setattr(subprocess, "run", failed)
    assert environment.commit.__wrapped__() == ""
