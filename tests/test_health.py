"""Routing health against counting by hand, the profiles that route well and badly, and the suite that times both."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch

from attnbench import figures, frame, health, inputs, metrics, registry, series, suite_file, tables, typeset
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Shape
from attnbench.protocol import Protocol
from attnbench.runner import sweep
from attnbench.suite import Entry, Suite
from attnbench.tasks import TASKS


def counted(bank: Bank, keys: int) -> dict[str, float]:
    """The measures of one bank, with dictionaries."""
    entropies, busiest, pruned, places, distinct = [], [], [], 0, 0
    for routes, index in zip(bank.routes.flatten(0, 1).tolist(), bank.index.flatten(0, 1).tolist(), strict=True):
        load = Counter(e for query in routes for e in query if e >= 0)
        total = sum(load.values())
        entropies.append(-sum(c / total * math.log(c / total) for c in load.values()) / math.log(len(index)))
        busiest.append(max(load.values()) / total)
        held = Counter(t for expert in index for t in expert if t >= 0)
        pruned.append(1 - len(held) / keys)
        places, distinct = places + sum(held.values()), distinct + len(held)
    return {"load_entropy": np.mean(entropies), "max_load": max(busiest), "pruned": np.mean(pruned), "duplicates": 1 - distinct / places}


@pytest.mark.parametrize("seed", range(4))
def test_health_is_what_counting_gives(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    b, h, n, e, w = 2, 3, 17, 5, 4
    index = torch.randint(-1, n, (b, h, e, w), generator=g)
    routes = torch.randint(-1, e, (b, h, n, 2), generator=g)
    bank = Bank(torch.zeros(b, h, n, 2), torch.zeros(b, h, n, 2), index, routes=routes)
    assert health.health(FastWeights((bank,)), n) == pytest.approx(counted(bank, n))
    shared = Bank(w1=torch.zeros(b, h, 1, 3, 2), w2=torch.zeros(b, h, 1, 3, 2))
    assert health.health(FastWeights((shared, bank)), n) == pytest.approx(counted(bank, n)), "a bank that all share changes nothing"
    assert health.health(FastWeights((shared,)), n) == {}


@pytest.mark.parametrize(
    ("name", "params"), [("mita", {"landmarks": 8, "topk": 16, "experts_per_query": 2}), ("moba", {"block": 32, "topk": 2})]
)
def test_health_of_methods_is_what_counting_gives(name: str, params: dict[str, int]) -> None:
    method = registry.get(name)
    tensors = inputs.draw("skewed", Shape(1, 2, 128, 16), 0, torch.float64, "cpu")
    own = method.parse(params)
    got = TASKS["health"](method, own, tensors, {})
    (bank,) = [bank for bank in method.experts(*tensors, own).banks if bank.routes is not None]
    assert 0 < got.pop("mass_recalled") <= 1
    assert got == pytest.approx(counted(bank, 128))


def test_a_method_without_fast_weights_or_routing_answers_nothing() -> None:
    tensors = inputs.draw("randn", Shape(1, 1, 32, 8), 0, torch.float64, "cpu")
    linear = registry.get("linear")
    assert TASKS["health"](linear, linear.parse({}), tensors, {}) == {}
    softmax = registry.get("softmax")
    assert TASKS["health"](softmax, softmax.parse({}), tensors, {}) == {"mass_recalled": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("name", "params"),
    [("mita", {"landmarks": 64, "topk": 16}), ("mita", {"landmarks": 25, "topk": 25}), ("moba", {"block": 32, "topk": 1}),
     ("moba", {"block": 16, "topk": 1})],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_profiles_route_evenly_skewed_and_all_to_one(name: str, params: dict[str, int], seed: int) -> None:
    method = registry.get(name)
    own, shape = method.parse(params), Shape(1, 4, 1024, 64, 2)

    def routed(profile: str) -> dict[str, float]:
        return TASKS["health"](method, own, inputs.draw(profile, shape, seed, torch.float32, "cpu"), {})

    even, skewed, worst = (routed(p) for p in ("balanced", "skewed", "adversarial"))
    assert even["load_entropy"] > 0.95
    assert even["max_load"] < 4 / method.experts(*inputs.draw("randn", shape, 0, torch.float32, "cpu"), own).banks[-1].experts
    assert 0.5 < skewed["load_entropy"] < 0.9
    assert worst["max_load"] == 1.0
    assert worst["load_entropy"] == pytest.approx(0, abs=1e-12)


def test_queries_of_skewed_inputs_follow_zipf() -> None:
    q, k, _ = inputs.draw("skewed", Shape(1, 1, 4096, 64), 0, torch.float64, "cpu")
    means = torch.nn.functional.normalize(k.unflatten(2, (64, 64)).mean(3), dim=-1)
    counts = torch.bincount((q @ means.mT).argmax(-1).flatten(), minlength=64).double()
    ranks = torch.arange(1, 65).double()
    zipf = 4096 / ranks / (1 / ranks).sum()
    assert torch.allclose(counts.sort(descending=True).values, zipf, atol=1.0)


def test_the_suite_times_each_routing_and_answers_for_it(tmp_path: Path) -> None:
    loaded = suite_file.load("routing")
    assert {"balanced", "skewed", "adversarial"} <= {c.profile for c in loaded.expand()}
    assert any(c.replicate for c in loaded.expand()), "an A/A run is part of every suite that compares times"
    axes = {"n": (64,), "heads": (2,), "dim": (16,), "profile": ("balanced", "adversarial")}
    small = Suite(
        "routing",
        "",
        "?",
        "health",
        (Entry("mita@eager", {"landmarks": (4,), "topk": (8,)}),),
        axes,
        Protocol(budget_s=0.02, max_samples=4),
    )
    summary = sweep(small, tmp_path, device="cpu")
    assert summary.counts == {"ok": 4}
    assert all(
        r.timing and {"load_entropy", "max_load", "pruned", "duplicates", "mass_recalled"} == set(r.metrics) for r in summary.records
    )


def records() -> list:
    found = []
    for profile, time, load in (("balanced", 1e-3, 0.02), ("adversarial", 3e-3, 1.0)):
        values = {"load_entropy": 1 - load, "max_load": load, "pruned": 0.25, "duplicates": 0.5, "mass_recalled": 0.75}
        for n in (1024, 4096):
            found.append(synthetic.ok(synthetic.case("mita", task="health", n=n, profile=profile), time * n / 4096, metrics=values))
            found.append(synthetic.ok(synthetic.case("softmax", task="health", n=n, profile=profile), 2 * time * n / 4096, spread=0))
    return found


def test_profiles_stand_side_by_side_in_figures_and_table(tmp_path: Path) -> None:
    table = frame.load(synthetic.write(tmp_path, "routing", records()))[0]
    (group,) = series.groups(table)
    for name, count in (("routing", 8), ("load", 4)):
        drawn = figures.modules()[name].data(group.rows)
        assert set(drawn["panel"]) == {"balanced", "adversarial"}
        assert len(drawn) == count
    assert figures.modules()["routing"].build(group.rows) is not None
    (report,) = tables.report(table)
    assert report.header[:4] == ("method", "family", "inputs", "N=4096 (ms)")
    lines = {(line[0], line[2]): line[3:] for line in report.rows}
    assert lines["MiTA", "balanced"][0].endswith(f" 1{typeset.TIMES}")
    assert "0.33" in lines["MiTA", "adversarial"][0]
    assert lines["MiTA", "adversarial"][1:] == ("0", "1.0", "0.25", "0.50", "0.75")
    assert set(lines["Softmax", "balanced"][1:]) == {typeset.NONE}


def test_every_measure_is_a_metric() -> None:
    assert {"load_entropy", "max_load", "pruned", "duplicates", "mass_recalled"} <= set(metrics.METRICS)
