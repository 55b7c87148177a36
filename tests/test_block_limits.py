"""What block methods cost, and what they refuse: counts of the definition's products and pairs, mistakes, limits and budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_support import IDS, SETTINGS, SMALL, settled, tensors
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UserError
from attnbench.method import Shape


@pytest.mark.parametrize(
    ("name", "values", "n"),
    [
        ("block_window", {"window": 9}, 144), ("block_window", {"grid": "line", "window": 8}, 40),
        ("bra", {"region": 9, "topk": 3}, 144), ("bra", {"region": 9, "topk": 3, "lepe": 5}, 144),
        ("bra", {"grid": "line", "region": 8, "topk": 3}, 40),
        ("nsa", SMALL | {"window": 1}, 48), ("nsa", SMALL | {"window": 1, "phi": "mlp"}, 48),
    ],
)  # fmt: skip
def test_cost_counts_the_products_of_the_definition(name: str, values: dict[str, Any], n: int) -> None:
    """Where regions divide the tokens, the definitions do no masked-out work."""
    method, qkv = attnbench.get(name), tensors(n)
    params = settled(method, values, qkv)
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params)
    flops = dict(method.cost(Shape.of(*qkv), params).flops)
    flops.pop("pool", 0)
    if name == "nsa":
        flops.pop("route")  # additions
    assert counter.get_total_flops() == sum(flops.values())


@pytest.mark.parametrize("n", [36, 41, 63])
@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=IDS)
def test_cost_counts_the_pairs_read(name: str, values: dict[str, Any], n: int) -> None:
    method, qkv = attnbench.get(name), tensors(n)
    params = settled(method, values, qkv)
    weights, rows = method.experts(*qkv, params), torch.arange(n)  # type: ignore[misc]
    pairs = 0
    for bank in weights.banks:
        tokens = bank.tokens(rows).expand(-1, -1, n, -1)
        hidden = tokens == -1
        pairs += int((~(hidden | (bank.latest(rows) > rows[:, None]) if bank.causal else hidden)).sum())
    flops = method.cost(Shape.of(*qkv), params).flops
    counted = flops["attend"] + (0 if name == "nsa" else flops["score"])
    if name == "nsa":
        compressed = flops["score"] // (2 * 8)
        counted += flops["score"]
        assert compressed <= pairs
    exact = name == "block_window" or params.causal or (n % 12 == 0 and name == "nsa")
    expected = pairs * 2 * (8 + 5)
    assert counted == expected if exact else expected <= counted < 1.4 * expected


def test_cost_of_choosing() -> None:
    shape = Shape(2, 4, 144, 8)
    bra, nsa = attnbench.get("bra"), attnbench.get("nsa")
    regions = bra.cost(shape, bra.parse({"region": 9}))
    assert regions.flops["route"] == 2 * 2 * 16 * 16 * 32
    assert regions.total("forward+backward") - regions.total() == 5 * (regions.flops["score"] + regions.flops["attend"]) // 2
    sparse = nsa.cost(shape, nsa.parse(SMALL))
    assert sparse.flops["pool"] == 8 * 16 * 8 * 35  # 35 blocks of 8, k and v
    assert sparse.flops["score"] == 2 * 8 * 144 * 35 * 8
    assert sparse.total("forward+backward") - sparse.total() == 5 * (sparse.total() - sparse.flops["route"]) // 2


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("block_window", {"window": 50}, "a region of 50 tokens is no square: give 49 or 64, or grid = line"),
        ("block_window", {"causal": True}, "causal needs grid = line"),
        ("block_window", {"grid": "5x5"}, "grid = 5x5 holds 25 tokens, not N = 36"),
        ("bra", {"region": 12}, "a region of 12 tokens is no square: give 9 or 16"),
        ("bra", {"lepe": 4}, "lepe = 4 is even: give an odd side, or 0"),
        ("bra", {"topk": 0}, "topk = 0 is below its least value 1"),
        ("bra", {"causal": True}, "no causal form: regions are averaged over later tokens too"),
        ("nsa", {"stride": 12}, "stride = 12 does not divide compress = 32"),
        ("nsa", {"compress": 96, "stride": 16}, "compress = 96 exceeds block = 64"),
        ("nsa", {"topk": 2}, "first \\+ local = 3 blocks are forced, more than topk = 2"),
        ("nsa", {"causal": True, "local": 0}, "causal needs local >= 1"),
        ("nsa", {"phi": "median"}, "unknown value of nsa.phi 'median'"),
    ],
)
def test_mistakes_are_one_line(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        attnbench.get(name)(*tensors(36), **values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("label", "shape", "reason"),
    [
        ("block_window@sdpa", Shape(1, 1, 1 << 20, 64), "65536 regions exceed the 65535 of one call"),
        ("bra@varlen", Shape(32, 4, 1 << 18, 64), "exceed the 65535 of one flash attention call"),
        ("nsa@varlen", Shape(1, 16, 1 << 18, 64), "65536 segments"),
    ],
)
def test_limits_on_a_gpu(label: str, shape: Shape, reason: str) -> None:
    method = attnbench.get(label)
    params = method.parse({"window": 16} if method.name == "block_window" else {})
    found = method.implementation(method.pinned).limits.reasons(shape, torch.bfloat16, "cuda", params)
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize("units", [7, 24, 100])
def test_budgets_of_a_sequence_are_exact_and_of_a_grid_the_nearest_square(units: int) -> None:
    shape, window, bra = Shape(1, 2, 3600, 8), attnbench.get("block_window"), attnbench.get("bra")
    assert window.budget is not None
    assert bra.budget is not None
    assert window.budget(shape, window.parse({"grid": "line"}), units) == {"window": units}
    assert bra.budget(shape, bra.parse({"grid": "line", "topk": 2}), units) == {"region": round(units / 2)}
    assert window.budget(shape, window.params(), 100) == {"window": 100}
    assert bra.budget(shape, bra.params(), 100) == {"region": 25}
