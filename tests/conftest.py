"""Settings of all tests."""

from pathlib import Path

import pytest
from cli_support import SUITE
from hypothesis import HealthCheck, settings

# a busy machine is no failure: how long an example takes is not what these tests are about
settings.register_profile("attnbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnbench")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A small suite in a file of its own."""
    path = tmp_path / "small.toml"
    path.write_text(SUITE)
    return path
