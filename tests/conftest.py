"""Settings of all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch
from cli_support import SUITE
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # read when Triton, which torch's counter of FLOP imports, decorates its own functions
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

# a busy machine is no failure: how long an example takes is not what these tests are about
settings.register_profile("attnbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnbench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A small suite in a file of its own."""
    path = tmp_path / "small.toml"
    path.write_text(SUITE)
    return path
