"""Made-up records in the real schema, for tests of what is drawn and tabulated. Nothing here was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench import store
from attnbench.case import Case
from attnbench.record import Memory, Record, Status, Timing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

DEVICE = "Test GPU 80GB"
ENVIRONMENT = {
    "device": DEVICE,
    "ceilings": {"copy_bytes_per_s": 2.6e12, "matmul_bfloat16_flops_per_s": 7e14, "matmul_float32_flops_per_s": 4e14},
}
LENGTHS = [1024 * 2**i for i in range(9)]
SPEED: list[tuple[str, dict[str, Any], float, float, float]] = [
    # label, params, seconds a pair, seconds a token, bytes a token (negative: a pair)
    ("softmax@cudnn", {}, 9e-12, 4e-9, 2200),
    ("softmax@flash", {}, 13e-12, 4e-9, 2300),
    ("softmax@efficient", {}, 20e-12, 5e-9, 2300),
    ("softmax@math", {}, 90e-12, 9e-9, -64),
    ("flash_attn", {}, 7.5e-12, 5e-9, 2200),
    ("xformers", {}, 12.5e-12, 6e-9, 2300),
    ("mita", {"landmarks": 64, "topk": 64}, 0, 95e-9, 5200),
    ("moba", {"block": 512, "topk": 3}, 0.2e-12, 160e-9, 6100),
    ("topk", {"topk": 64}, 60e-12, 300e-9, 9000),
    ("linear", {}, 0, 40e-9, 4100),
    ("agent", {"landmarks": 64}, 0, 45e-9, 4400),
    ("nystromformer", {"landmarks": 64}, 0, 120e-9, 8000),
    ("sliding_window", {"window": 513}, 0, 60e-9, 3500),
]
PROFILES = ("randn", "clustered", "needle", "local")
FIDELITY: list[tuple[str, dict[str, Any], float, float | None]] = [
    # label, params, relative error at N = 1024, softmax mass recalled there
    ("softmax", {}, 3e-7, 1.0),
    ("flash_attn", {}, 4e-3, None),
    ("mita", {"landmarks": 64, "topk": 64}, 0.4, 0.5),
    ("mita", {"landmarks": 64, "topk": 128}, 0.33, 0.6),
    ("mita", {"landmarks": 128, "topk": 128}, 0.3, 0.65),
    ("mita", {"landmarks": 25, "topk": 25}, 0.55, 0.35),
    ("moba", {"block": 512, "topk": 3}, 0.5, 0.45),
    ("topk", {"topk": 64}, 0.2, 0.8),
    ("topk", {"topk": 25}, 0.3, 0.7),
    ("linear", {}, 0.9, None),
    ("agent", {"landmarks": 64}, 0.7, None),
    ("agent", {"landmarks": 128}, 0.65, None),
    ("nystromformer", {"landmarks": 64}, 0.6, None),
    ("sliding_window", {"window": 129}, 0.8, 0.2),
]
_PER_TOKEN = {
    "mita": 40e-9,
    "moba": 55e-9,
    "topk": 300e-9,
    "linear": 12e-9,
    "agent": 18e-9,
    "nystromformer": 40e-9,
    "sliding_window": 25e-9,
}


def case(label: str, params: dict[str, Any] | None = None, **rest: Any) -> Case:
    """A case of `method[@implementation]`."""
    method, _, implementation = label.partition("@")
    values = tuple(sorted({"causal": False, **(params or {})}.items()))
    return Case(**{"task": "speed", "heads": 16, "dtype": "bfloat16", **rest}, method=method, implementation=implementation, params=values)


def ok(case: Case, time_s: float, peak_bytes: int = 2**20, *, spread: float = 0.01, count: int = 25, seed: int = 0, **rest: Any) -> Record:
    """A measured record whose samples scatter about `time_s`."""
    random = np.random.default_rng([seed, int(case.case_id[:8], 16)])
    samples = tuple((time_s * random.lognormal(0, spread, count)).tolist())
    memory = Memory(peak_bytes, peak_bytes // 2, 0, peak_bytes - peak_bytes // 2, 3 * peak_bytes // 2, "test")
    timing = Timing(samples, 10 * time_s, "cuda-event")
    return Record(case, Status.OK, "env0", case.implementation or "best", timing=timing, memory=memory, **rest)


def failed(case: Case, status: str) -> Record:
    """A record of a failure."""
    return Record(case, Status(status), "env0", reasons=(f"{status} for the test",))


def speed(lengths: Sequence[int] = LENGTHS) -> list[Record]:
    """A sweep with every kind of failure and A/A replicates of its first method."""
    return [r for entry in SPEED for mode in ("forward", "forward+backward") for n in lengths for r in _speed(entry, mode, n)]


def _speed(entry: tuple[str, dict[str, Any], float, float, float], mode: str, n: int) -> Iterable[Record]:
    label, params, pair, token, size = entry
    cell = case(label, params, n=n, mode=mode)
    backward = mode != "forward"
    if status := _failure(label, backward=backward, n=n):
        yield failed(cell, status)
        return
    time = 12e-6 + (pair * 16 * n * n / 16 + token * n) * (3.4 if backward else 1)
    memory = int((-size * n * n if size < 0 else size * n) * (2.6 if backward else 1))
    work = {"flops": int(4 * n * min(n, 512) * 64 * 16 * (3.5 if backward else 1)), "bytes": 4 * n * 16 * 64 * 2}
    yield ok(cell, time, memory, spread=0.004, **work)
    if label == SPEED[0][0]:
        yield ok(case(label, params, n=n, mode=mode, replicate=1), time * (1.008 if n > 4096 else 0.985), memory, spread=0.004, **work)


def _failure(label: str, *, backward: bool, n: int) -> str:
    if label == "softmax@math":
        return "" if n <= 16384 else "oom" if n == 32768 else "skipped"
    if label == "topk":
        return "" if n <= 65536 else "timeout" if n == 131072 else "skipped"
    if label == "nystromformer" and backward:
        return "incorrect" if n == 1024 else ""
    if label == "xformers" and n == 262144:
        return "error"
    return "unsupported" if label == "sliding_window" and backward else ""


def fidelity(lengths: Sequence[int] = (1024, 4096, 16384), seeds: Sequence[int] = (0,)) -> list[Record]:
    """Fidelity of every method on four input profiles."""
    found = []
    for i, profile in enumerate(PROFILES):
        for label, params, error, mass in FIDELITY:
            for n in lengths:
                for seed in seeds:
                    cell = case(label, params, task="fidelity", heads=4, dtype="float32", n=n, profile=profile, seed=seed)
                    value = error * (0.55**i) * (n / 1024) ** (0.0 if error < 0.01 else 0.12) * (1 + 0.05 * seed)
                    metrics = {"rel_error": value, "cosine": 1 - value / 2}
                    if mass is not None:
                        metrics["mass_recalled"] = mass ** (0.5**i * (n / 1024) ** 0.1)
                        metrics["top1_agreement"] = min(1.0, metrics["mass_recalled"] + 0.1)
                    slow = 9e-12 * n * n if label in ("softmax", "flash_attn") else _PER_TOKEN[label] * n
                    budget = 1 + sum(v for v in params.values() if isinstance(v, int)) / 300
                    found.append(ok(cell, 10e-6 + slow * budget * (0.8 if label == "flash_attn" else 1), metrics=metrics))
    return found


def write(folder: Path, suite: str, records: Iterable[Record], environment: dict[str, Any] | None = None) -> Path:
    """Store records as a run would have. Returns `folder`."""
    env = environment or ENVIRONMENT
    with store.Store(store.folder(folder, suite, str(env["device"]))) as target:
        target.save_environment("env0", env)
        for record in records:
            target.append(record)
    return folder
