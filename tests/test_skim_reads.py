"""Which keys Spark attention and DeepSeek sparse attention read: supports, thresholds, ties and symmetries."""

from __future__ import annotations

import pytest
import torch
from method_support import close
from skim_support import BOTH, make, options
from torch.nn.functional import softplus

import attnbench
from attnbench.method import Shape


def read_by(method, qkv, params, own=None):
    """Keys `[B, H, N, M]` that queries read."""
    bank, n, keys = method.experts(*qkv, params, **(own or {})).banks[0], qkv[0].shape[2], qkv[1].shape[2]
    tokens = bank.tokens(torch.arange(n))
    return torch.zeros(*tokens.shape[:3], keys + 1, dtype=torch.bool).scatter_(-1, tokens.masked_fill(tokens < 0, keys), True)[..., :-1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "setting"), BOTH)
def test_values_outside_the_support_do_not_matter(name, setting, causal):
    (q, k, v), method, row = make(50), attnbench.get(f"{name}@chunked"), 31
    outside = ~read_by(method, (q, k, v), method.parse({**setting, "causal": causal}))[:, :, row]
    assert 0 < outside.sum() < outside.numel()
    before = method(q, k, v, causal=causal, **setting)[:, :, row]
    for where, same in ((outside, True), (~outside, False)):
        after = method(q, k, torch.where(where.unsqueeze(-1), v + 3.0, v), causal=causal, **setting)[:, :, row]
        assert torch.allclose(after, before, rtol=1e-9, atol=1e-10) == same


def test_dsa_heads_share_their_keys_and_spark_heads_do_not():
    for name, setting in BOTH:
        method, qkv = attnbench.get(name), make(50)
        read = read_by(method, qkv, method.parse(setting))
        assert bool((read == read[:, :1]).all()) == (name == "dsa")


@pytest.mark.parametrize("implementation", ["eager", "chunked"])
@pytest.mark.parametrize(("name", "setting"), BOTH)
def test_tokens_may_be_permuted_together(name, setting, implementation):
    qkv, method = make(40), attnbench.get(f"{name}@{implementation}")
    setting = {**setting, "index_heads": 32} if name == "dsa" else setting  # so many that no key goes without a score
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    close(method(*(x[:, :, order] for x in qkv), **setting), method(*qkv, **setting)[:, :, order])
    causal = method(*(x[:, :, order] for x in qkv), causal=True, **setting)
    assert not torch.allclose(causal, method(*qkv, causal=True, **setting)[:, :, order])


def test_spark_keeps_about_k_normal_keys_and_never_none():
    q, k, v = make(64, 1, keys=4096, heads=1, dim=16)
    count = read_by(attnbench.get("spark"), (q, k, v), attnbench.get("spark").parse({"topk": 256})).sum(-1).double()
    # for normal scores the count is near binomial: 256 with a standard deviation near 10 over rows, a little less for its mean
    assert abs(float(count.mean()) - 256) < 5
    assert 5 < float(count.std()) < 20
    same = torch.ones_like(k)  # all keys equal: no deviation, and a threshold that rounding may lift above them
    for name in ("spark@eager", "spark@chunked"):
        out = attnbench.get(name)(3.7 * q, 0.1 * same, v, topk=256)
        assert (out.abs().sum(-1) > 0).all()


def test_spark_against_a_far_mean():
    """A deviation that is small beside the mean must not drown in rounding."""
    q, k, v = (x.float() for x in make(64, 1, heads=1, dim=16))
    k = k + 30 * torch.nn.functional.normalize(q.mean(2, keepdim=True), dim=-1)
    exact = read_by(attnbench.get("spark"), (q.double(), k.double(), v.double()), attnbench.get("spark").parse({"topk": 8}))
    params = attnbench.get("spark").parse({"topk": 8})
    assert (read_by(attnbench.get("spark"), (q, k, v), params) == exact).double().mean() > 0.999
    want = attnbench.get("spark@eager")(q.double(), k.double(), v.double(), topk=8)
    got = attnbench.get("spark@chunked")(q, k, v, topk=8).double()
    assert ((got - want).norm(dim=-1) < 1e-3 * want.norm(dim=-1)).double().mean() > 0.97


def test_a_threshold_above_every_score_is_lowered_to_the_largest():
    q, k, v = (
        torch.ones(1, 1, 1, 2),
        torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(1, 1, 2, 2),
        torch.tensor([2.0, 5.0]).view(1, 1, 2, 1),
    )
    k = torch.cat([k[:, :, :1].expand(1, 1, 3, 2), k[:, :, 1:].expand(1, 1, 4, 2)], 2)  # scores 0, 0, 0, 1, 1, 1, 1
    v = torch.cat([v[:, :, :1].expand(1, 1, 3, 1), v[:, :, 1:].expand(1, 1, 4, 1)], 2)
    for name in ("spark@eager", "spark@chunked"):  # mean 4/7, deviation 0.49, Phi^-1(6/7) = 1.07: threshold 1.1
        out = attnbench.get(name)(q, k, v, topk=1)
        torch.testing.assert_close(out, 5 * softplus(torch.ones(1, 1, 1, 1)))


def test_the_indexer_learns_nothing_from_attention():
    method, (q, k, v) = attnbench.get("dsa"), make(30)
    q.requires_grad_()
    for name in ("eager", "chunked"):
        module = attnbench.get(f"dsa@{name}").build(Shape.of(q, k, v), topk=5)
        module(q, k, v).sum().backward()
        assert all(x.grad is None or not x.grad.any() for x in module.weights.values())
    own = options(method, (q, k, v), method.parse({"topk": 5}))
    scaled = {"weights": {**own["weights"], "query": 7 * own["weights"]["query"], "gate": 3 * own["weights"]["gate"]}}
    close(method(q, k, v, topk=5, **scaled), method(q, k, v, topk=5, **own))  # a positive scale changes no order


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_index_scores_tie_the_earlier_keys_are_read(dtype, causal):
    method, qkv = attnbench.get("dsa"), make(30, dtype=dtype)
    params = method.parse({"topk": 5, "causal": causal})
    own = options(method, qkv, params)["weights"]
    nothing = {**own, "gate": torch.zeros_like(own["gate"])}
    want = (torch.arange(30) < 5).expand(30, 30) & (torch.arange(30) <= (torch.arange(30)[:, None] if causal else 30))
    assert (read_by(method, qkv, params, {"weights": nothing}) == want).all()
    rare = {**own, "norm_bias": own["norm_bias"] - 1.5}  # most keys fire no head: their scores are zero, among others of either sign
    got, again = (method.run(method.implementation(i), *qkv, params, weights=rare) for i in ("chunked", "eager"))
    torch.testing.assert_close(got, again)
