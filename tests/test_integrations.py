"""What the drop-ins share: their examples run, and importing them imports no library."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest
from integration_support import NO_TIMM, NO_TRANSFORMERS, library


@pytest.mark.parametrize(("name", "reason"), [("transformers", NO_TRANSFORMERS), ("timm", NO_TIMM)], ids=["transformers", "timm"])
def test_the_examples_run(name: str, reason: str) -> None:
    library(name, reason)
    found = doctest.testmod(importlib.import_module(f"attnbench.integrations.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_importing_the_drop_ins_imports_no_library() -> None:
    names = {"timm", "transformers"}
    code = f"import sys, {', '.join(f'attnbench.integrations.{n}' for n in sorted(names))}; print({names} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip() == "set()"
