"""What projections, InLine and MHLA cost, how they start, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from method_support import close
from projection_support import CASES, make, prepared
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.method import Shape


@pytest.mark.parametrize("transform", ["cos", "linear", "exp", "local"])
@pytest.mark.parametrize("grid", ["auto", "none"])
def test_mixing_weights_start_near_and_columns_sum_to_one(transform, grid):
    method = attnbench.get("mhla")
    mix = method.initial(Shape(1, 1, 64, 4), method.params(transform=transform, grid=grid), torch.empty(0).double())["mix"]
    assert mix.shape == (16, 16)
    close(mix.sum(0), torch.ones(16, dtype=torch.float64))
    assert (mix.diagonal() >= mix.amax(0) - 1e-12).all()
    assert mix.sum(1).sub(1).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_learned_weights_are_finite_seeded_and_the_same_for_any_batch(name, setting):
    method = attnbench.get(name)
    params = method.parse(setting)
    one, again, more = (method.initial(Shape(b, 4, 36, 8, kv_heads=2), params, torch.empty(0).double()) for b in (1, 1, 5))
    for key, x in one.items():
        assert x.isfinite().all()
        assert x.equal(again[key])
        assert x.equal(more[key])


def test_initial_scales_are_the_published_ones():
    like, wide = torch.empty(0).double(), Shape(1, 4, 256, 16)
    linformer, pvt = attnbench.get("linformer"), attnbench.get("pvt")
    e = linformer.initial(wide, linformer.params(rank=64), like)["e"]
    authors = torch.nn.init.xavier_uniform_(torch.empty(64, 256), gain=2**-0.5)
    assert abs(float(e.std() / authors.std()) - 1) < 0.05
    conv = pvt.initial(wide, pvt.params(reduction=4), like)["k_conv"]
    assert 0.99 < conv.abs().max() / torch.nn.Conv2d(64, 64, 4, 4).weight.detach().abs().max() < 1.01
    pooled = pvt.initial(wide, pvt.params(pool=7), like)["v_conv"]
    assert abs(float(pooled.std()) / (2 / 64) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize(("name", "setting"), [c for c in CASES if c[1].get("blocks") != 1])  # a 1 x 1 product is none to torch
def test_costs_are_the_products_that_run(name, setting):
    qkv = make(36, 4)
    method, params, w = prepared(name, setting, qkv)
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params, weights=w)
    flops = dict(method.cost(Shape.of(*qkv), params).flops)
    added = flops.pop("pool", 0) + flops.pop("normalise", 0)
    assert counter.get_total_flops() == sum(flops.values())
    assert (added > 0) == ((name in ("inline", "mhla") and setting.get("normalizer") != "none") or "pool" in setting)


def test_costs_count_learned_weights_once():
    shape, larger = (Shape(b, 4, 64, 8) for b in (1, 2))
    method = attnbench.get("linformer")
    for setting, owned in (({}, 2 * 16 * 64), ({"share": True}, 16 * 64), ({"per_head": True}, 2 * 4 * 16 * 64)):
        params = method.parse({"rank": 16, **setting})
        one, two = (method.cost(s, params).elements for s in (shape, larger))
        assert 2 * one - two == owned == sum(x.numel() for x in method.initial(shape, params, torch.empty(0)).values())


@pytest.mark.parametrize(
    ("name", "setting", "n", "words"),
    [
        ("inline", {"conv": 2}, 36, "conv = 2 is even"),
        ("inline", {"conv": 3, "grid": "5x7"}, 36, "holds 35 tokens"),
        ("mhla", {"blocks": 13}, 36, "blocks = 13 do not tile a 6 x 6 grid"),
        ("mhla", {"blocks": 40}, 36, "exceeds N = 36"),
        ("mhla", {"normalizer": "repo"}, 36, "needs blocks of one size"),
        ("mhla", {"conv": 4}, 36, "conv = 4 is even"),
        ("mhla", {"grid": "line"}, 36, "HxW"),
        ("linformer", {"rank": 37}, 36, "exceeds M (keys) = 36"),
        ("linformer", {"rank": 0}, 36, "least value"),
        ("pvt", {"reduction": 8}, 36, "exceeds both sides of the 6 x 6 grid"),
        ("pvt", {"pool": 7}, 36, "pool = 7 exceeds"),
    ],
)
def test_values_that_do_not_fit_are_named(name, setting, n, words):
    problems = attnbench.get(name).parse(setting).problems(Shape(1, 2, n, 8))
    assert len(problems) == 1
    assert words in problems[0]
    assert "\n" not in problems[0]


LARGE = [("mhla", {"normalizer": "repo"}), ("mhla", {"blocks": 97}), ("pvt", {"reduction": 64}), ("pvt", {"pool": 64}), ("linformer", {})]


@pytest.mark.parametrize("n", [1, 2, 63, 100, 196, 257])
@pytest.mark.parametrize(("name", "setting"), [*CASES, *LARGE])
def test_fitted_values_fit(name, setting, n):
    method, shape = attnbench.get(name), Shape(1, 2, n, 4)
    params = method.parse(setting).fitted(shape)
    assert params.problems(shape) == []
    assert method.reference(*make(n, 2, heads=2, dim=4, dim_v=4, batch=1), params).isfinite().all()


def test_kernels_that_hold_more_numbers_than_a_machine_are_refused():
    method = attnbench.get("pvt")
    shape, larger = Shape(1, 16, 4096, 64), Shape(1, 16, 1 << 18, 64)
    for setting, refused in (
        ({"reduction": 8}, False),
        ({"reduction": 64}, True),
        ({"pool": 8}, False),
        ({"reduction": 64, "per_head": True}, False),
    ):
        reasons = method.limits.reasons(larger, torch.bfloat16, "cuda", method.parse(setting))
        assert [r for r in reasons if "lower reduction" in r] == reasons
        assert bool(reasons) == refused
    assert not method.limits.reasons(shape, torch.bfloat16, "cuda", method.params())


def test_convolution_needs_the_tokens_of_the_queries():
    assert "as many keys as queries" in attnbench.get("inline").params(conv=3).problems(Shape(1, 2, 36, 8, keys=40))[0]
