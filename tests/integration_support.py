"""Optional libraries that the drop-ins are for, and why tests of them are left out."""

from __future__ import annotations

from typing import Any

import pytest

NO_TRANSFORMERS = "transformers is an optional package and not installed: pip install 'attnbench[transformers]'"
NO_TIMM = "timm is an optional package and not importable here (it needs torchvision): pip install 'attnbench[timm]'"


def library(name: str, reason: str) -> Any:
    """The library, or the reason to leave a test out."""
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)
