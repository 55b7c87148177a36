"""Made-up records of training, for every cell of the suites that train. Nothing here was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import synthetic

from attnbench import suite_file
from attnbench.record import Record, Status
from attnbench.tasks import routing
from attnbench.trials import Training, Trial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnbench.case import Case

_SKILL = {"softmax": 0.98, "mita": 0.95, "topk": 0.96, "moba": 0.9, "nsa": 0.94, "bra": 0.88, "agent": 0.8, "nystromformer": 0.75}
_CHANCE = {"mqar": 0.0, "listops": 0.1, "pathfinder": 0.5, "digits": 0.1}
_NO_CAUSAL = ("mita", "agent", "nystromformer", "linformer", "bra")


def records(name: str, **axes: Any) -> list[Record]:
    """A record for each cell of the suite `name`, with axis values replaced: all kinds of failure, and one seed that is still to come."""
    planned = suite_file.load(name).override(axes, [], {}).planned()
    return [record for case, budget in planned.items() for record in _record(case, budget)]


def _record(case: Case, budget: tuple[int, ...]) -> Iterator[Record]:
    causal = dict(case.params).get("causal", False)
    if causal and case.method in _NO_CAUSAL:
        yield Record(case, Status.UNSUPPORTED, "env0", reasons=("no causal form",), budget=budget)
    elif (case.method, case.n, case.seed) == ("linformer", 4096, 1):
        yield Record(case, Status.DIVERGED, "env0", reasons=("loss not finite at every learning rate",), budget=budget)
    elif (case.method, case.n, case.seed) == ("nsa", 4096, 2):
        yield Record(case, Status.TIMEOUT, "env0", reasons=("outran its time",), budget=budget, limit_s=7200.0)
    elif (case.method, case.n, case.seed) != ("bra", 4096, 2):  # still to come
        yield trained(case, reached(case), budget=budget)


def reached(case: Case) -> float:
    """A made-up test accuracy: falls with N, rises with what a query reads."""
    params = dict(case.params)
    units = sum(v for k, v in params.items() if k in ("landmarks", "topk", "window", "rank", "block") and isinstance(v, int)) or 64
    skill = _SKILL.get(case.method, 0.6) * (0.9 if params.get("routed") is False else 1.0)
    share = skill ** (math.log2(case.n) / 8) * min(1.0, (units / 64) ** 0.2)
    random = np.random.default_rng([case.seed, int(case.case_id[:8], 16)])
    low = _CHANCE[case.data]
    return float(np.clip(low + (1 - low) * share * (0.02 if case.steps == 1 else 1) + random.normal(0, 0.012), 0, 1))


def trained(case: Case, accuracy: float, *, budget: tuple[int, ...] = ()) -> Record:
    """A record of a model that reached `accuracy`, with learning curves at two rates."""
    points = [max(1, round(case.steps * (i + 1) / 20)) for i in range(20)]
    low = _CHANCE.get(case.data, 0.0)
    rise = [low + (accuracy - low) / (1 + math.exp(-10 * (p / case.steps - 0.3 - 0.05 * case.seed))) for p in points]
    losses = tuple((p, 3.0 * (1 - v) + 0.01) for p, v in zip(points, rise, strict=True))
    trials = tuple(
        Trial(rate, case.steps, losses, tuple((p, v * share) for p, v in zip(points, rise, strict=True)), False, 1e5)
        for rate, share in ((3e-4, 0.7), (1e-3, 1.0))
    )
    slices = {"4": accuracy, "8": 0.9 * accuracy, "16-31": 0.7 * accuracy}
    counts = "class" if case.data == "digits" else "pairs"
    training = Training(trials, 1e-3, 900_000, 0, 128, slices, counts, low, data_hash="0" * 16)
    metrics = {"accuracy": accuracy, "test_loss": 1 - accuracy, "parameters": 9e5, "train_tokens_per_s": 1e5}
    metrics |= {"accuracy_before": 0.97 - 0.01 * case.seed} if case.trained_with else {}
    return Record(case, Status.OK, "env0", "eager", budget=budget, training=replace(training, **_routing(case)), metrics=metrics)


def _routing(case: Case) -> dict[str, Any]:
    """Pruned shares, loads and maps of kept tokens for methods that route."""
    if case.method not in ("mita", "topk", "moba", "nsa", "bra") or dict(case.params).get("routed") is False:
        return {}
    random = np.random.default_rng([case.seed, int(case.case_id[:8], 16)])
    units = sum(v for k, v in case.params if k in ("landmarks", "topk") and isinstance(v, int))
    share = 0.0 if case.method in ("moba", "bra") else 0.45 if case.method == "mita" else 0.15
    pruned = [
        min(0.95, share * (64 / (32 + units)) * (1 + 0.25 * i) * (0.6 if case.steps == 1 else 1) + share * random.normal(0, 0.04))
        for i in range(case.depth)
    ]
    loads = [
        tuple(float(x) for x in np.linspace(1.5 + 0.3 * i + units / 64 + 0.2 * random.random(), 0.1, routing.LEVELS))
        for i in range(case.depth)
    ]
    found: dict[str, Any] = {"pruned": tuple(pruned), "busiest": tuple(x[0] for x in loads), "loads": tuple(loads)}
    if case.data in ("digits", "pathfinder"):
        maps = [(random.random((routing.PICTURED, case.n)) > p).astype(np.uint8) * case.heads for p in pruned]
        found["kept"] = tuple(routing.packed(heads) for heads in maps)
    return found


def costs(lengths: tuple[int, ...] = (256, 1024, 2048, 4096)) -> list[Record]:
    """What the configurations of the suite `accuracy` cost, and their distance from softmax."""
    found = []
    for case in suite_file.load("accuracy-cost").override({"n": lengths}, [], {}).expand():
        token = {"softmax": 0.02e-9 * case.n, "topk": 0.2e-9 * case.n}.get(case.method, 10e-9 * (1 + len(case.method) % 7))
        far = 3e-3 if case.method == "softmax" else 0.2 + 0.05 * (len(case.method) % 9)
        status = "oom" if (case.method, case.n) == ("topk", 4096) else ""
        metrics = {"rel_error": far * (0.5 if case.profile == "clustered" else 1)}
        memory = case.n * 400 * (1 + len(case.method) % 5)
        found.append(synthetic.failed(case, status) if status else synthetic.ok(case, 1e-5 + token * case.n, memory, metrics=metrics))
    return found
