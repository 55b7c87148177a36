"""What ran the numbers: device, driver, clocks, packages, commit, and the ceilings measured on the spot."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnbench.errors import UserError, differences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGES = {
    "torch": "",
    "triton": "pip install triton (GPU kernels)",
    "pandas": "",
    "matplotlib": "",
    "typer": "",
    "rich": "",
    "xformers": "pip install 'attnbench[xformers]'",
    "flash-attn": "a build for this torch from its own project",
    "flash-attn-4": "pip install 'attnbench[flash]'",
    "flash-linear-attention": "pip install flash-linear-attention",
    "safetensors": "pip install 'attnbench[files]'",
    "timm": "pip install 'attnbench[timm]'",
    "transformers": "pip install 'attnbench[transformers]'",
    "ray": "pip install 'attnbench[ray]'",
    "nvidia-ml-py": "pip install 'attnbench[cuda]' (clocks, power, throttling)",
}
"""Distribution -> how to get it, empty where attnbench requires it."""


def pick_device(name: str | None) -> str:
    """`cpu` or `cuda`: the one asked for, else CUDA where there is one. Raises `UserError` where it cannot be had."""
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: choose from cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU (check nvidia-smi and the driver)"
        raise UserError(f"device cuda was asked for, but {why}: use --device cpu, or run where there is a GPU")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


@cache
def packages() -> dict[str, str]:
    """Version of each package that matters; empty where it is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def missing() -> dict[str, str]:
    """Package that is not installed -> how to get it."""
    return {name: PACKAGES[name] or "pip install attnbench" for name, version in packages().items() if not version}


@cache
def commit() -> str:
    """Short commit of the checkout this runs from, `+` where it has uncommitted changes; empty outside one.

    The variable ATTNBENCH_COMMIT says it of a copy.
    """
    if told := os.environ.get("ATTNBENCH_COMMIT", ""):
        return told
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def collect(device: str) -> dict[str, Any]:
    """Everything about this machine that determines a number; `env_id` hashes it."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "device_type": device,
        "python": platform.python_version(),
        "os": platform.platform(terse=True),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "packages": {k: v for k, v in packages().items() if v},
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
            **Monitor().facts(),
        }
    return facts


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Facts in which two environments differ, each with both values; None where one of them lacks it."""
    old, new = flat(there), flat(here)
    return differences(old, {**dict.fromkeys(old), **new})


def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `collect` found without what was measured, packages and what is known of a GPU among the other facts."""
    inmost = sorted(leaves(facts), key=lambda leaf: -len(leaf[0]))  # so that torch is its build, not its package's version
    return {path[-1]: value for path, value in inmost if path[0] != "ceilings"}


def leaves(facts: Mapping[str, Any], *outer: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each fact that holds no others, below the names of those that hold it."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from leaves(value, *outer, name)
        else:
            yield (*outer, name), value


def env_id(facts: dict[str, Any]) -> str:
    """Key of an environment: equal for machines whose numbers may be put side by side."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} x{os.cpu_count()}"


class Monitor:
    """Clocks and throttling of the current GPU through NVML; reads nothing where NVML is absent."""

    def __init__(self) -> None:
        self.handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            self.top_mhz = int(pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_SM))
        except Exception:  # no NVML, no GPU or a driver that refuses: clocks stay unknown
            self.handle = None

    def facts(self) -> dict[str, Any]:
        """Driver, power limit and top clocks."""
        if self.handle is None:
            return {}
        n = self.nvml
        return {
            "driver": str(n.nvmlSystemGetDriverVersion()),
            "power_limit_w": n.nvmlDeviceGetPowerManagementLimit(self.handle) / 1000,
            "max_sm_clock_mhz": self.top_mhz,
            "max_memory_clock_mhz": n.nvmlDeviceGetMaxClockInfo(self.handle, n.NVML_CLOCK_MEM),
        }

    def read(self) -> tuple[int, bool]:
        """SM clock in MHz (0 where unknown) and whether the GPU is being held back by heat, power or a brake."""
        if self.handle is None:
            return 0, False
        n = self.nvml
        reasons = n.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
        brakes = (
            n.nvmlClocksThrottleReasonHwSlowdown
            | n.nvmlClocksThrottleReasonSwThermalSlowdown
            | n.nvmlClocksThrottleReasonHwThermalSlowdown
            | n.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        clock = int(n.nvmlDeviceGetClockInfo(self.handle, n.NVML_CLOCK_SM))
        return clock, bool(reasons & brakes) or clock < 0.75 * self.top_mhz


def ceilings(device: str) -> dict[str, float]:
    """Rates measured here and now: `copy_bytes_per_s` (read plus written) and `matmul_<dtype>_flops_per_s`, medians of ten."""
    gpu = device == "cuda"
    rates = {"copy_bytes_per_s": _copy_rate(1 << (30 if gpu else 26), device)}
    n = 8192 if gpu else 1024
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates[f"matmul_{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * n**3 / _median_s(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    return rates


def _copy_rate(size: int, device: str) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _median_s(lambda: target.copy_(source), device)


def _median_s(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])
