"""Spark attention and DeepSeek sparse attention: definitions by brute force, supports, limits, half precision and costs."""

from __future__ import annotations

from statistics import NormalDist, fmean, pstdev, stdev

import pytest
import torch
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.errors import UserError
from attnbench.method import Shape

SIZES = [(37, 4), (50, 2), (9, 1)]
SPARK = [{"topk": 5}, {"topk": 3, "predictor": 3, "unbiased": True}, {"topk": 8, "predictor": 7, "scale": "whole"}, {"topk": 1}]
DSA = [{"topk": 5}, {"topk": 7, "index_heads": 3, "index_dim": 5}, {"topk": 1, "index_heads": 1, "index_dim": 1}]
CASES = [*(("spark", s) for s in SPARK), *(("dsa", s) for s in DSA)]
BOTH = [("spark", SPARK[0]), ("dsa", DSA[0])]


def make(n, kv_heads=4, *, keys=None, heads=4, dim=8, dim_v=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, n, dim), (2, kv_heads, keys or n, dim), (2, kv_heads, keys or n, dim_v)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def options(method, qkv, params, seed=3):
    """Learned parameters, the same for every form, moved off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = method.initial(Shape.of(*qkv), params, qkv[0])
    return (
        {"weights": {name: x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in drawn.items()}}
        if drawn
        else {}
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def spark_by_hand(q, k, v, *, causal, topk, predictor=0, unbiased=False, scale="parts"):
    """One query at a time, with the standard library's statistics; also how many keys each kept."""
    out, kept = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), []
    d, r = q.shape[3], predictor or q.shape[3] // 2
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            of = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                n = min(i + 1, k.shape[2]) if causal else k.shape[2]
                u = [float(q[b, h, i, :r] @ k[b, of, j, :r]) for j in range(n)]
                limit = -float("inf")
                if n > topk:
                    limit = fmean(u) + (stdev(u) if unbiased else pstdev(u)) * NormalDist().inv_cdf(1 - topk / n)
                mine = [j for j in range(n) if u[j] >= min(limit, max(u))]
                first, second = (r**-0.5, (d - r) ** -0.5) if scale == "parts" else (d**-0.5, d**-0.5)
                shares = torch.tensor([first * u[j] for j in mine], dtype=q.dtype).softmax(0)
                gates = softplus(second * k[b, of, mine][:, r:] @ q[b, h, i, r:])
                out[b, h, i] = (shares * gates) @ v[b, of, mine]
                kept.append(len(mine))
    return out, kept


def dsa_by_hand(q, k, v, w, *, causal, topk, index_heads=4, index_dim=32):
    """One query at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        keys = torch.stack([k[b, :, j].flatten() @ w["key"] for j in range(k.shape[2])])
        keys = (keys - keys.mean(1, keepdim=True)) / (keys.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        keys = keys * w["norm_weight"] + w["norm_bias"]
        for i in range(q.shape[2]):
            n = min(i + 1, k.shape[2]) if causal else k.shape[2]
            x = q[b, :, i].flatten()
            share, scores = x @ w["gate"] / (index_heads * index_dim) ** 0.5, torch.zeros(n, dtype=q.dtype)
            for j in range(index_heads):
                scores += share[j] * (keys[:n] @ (x @ w["query"][:, j * index_dim : (j + 1) * index_dim])).clamp(min=0)
            best = sorted(range(n), key=lambda s: -float(scores[s]))[:topk]
            for h in range(q.shape[1]):
                of = h * k.shape[1] // q.shape[1]
                out[b, h, i] = (k[b, of, best] @ q[b, h, i] / q.shape[3] ** 0.5).softmax(0) @ v[b, of, best]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "kv_heads"), SIZES)
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_the_definition_by_brute_force(name, setting, n, kv_heads, causal):
    method, qkv = attnbench.get(name), make(n, kv_heads)
    params = method.parse({**setting, "causal": causal})
    own = options(method, qkv, params)
    want = (
        spark_by_hand(*qkv, causal=causal, **setting)[0] if name == "spark" else dsa_by_hand(*qkv, own["weights"], causal=causal, **setting)
    )
    close(method.reference(*qkv, params, **own), want)
    close(fastweights.apply(method.experts(*qkv, params, **own), qkv[0]), want)
    close(method.run(method.implementation("chunked"), *qkv, params, **own), want)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_gradients_of_the_practical_implementation(name, setting, causal, tight, monkeypatch):
    if tight:
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 14})
    method, grad = attnbench.get(name), make(50, dim=5, seed=1)[0]
    params, found = method.parse({**setting, "causal": causal}), []
    for function in (method.reference, method.implementation("chunked").load()):
        leaves = [x.requires_grad_() for x in make(50, 2)]
        own = options(method, [x.detach() for x in leaves], params)
        found.append(torch.autograd.grad(function(*leaves, params, **own), leaves, grad))
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(("name", "setting"), BOTH)
def test_cross_attention(name, setting):
    method, qkv = attnbench.get(name), make(20, keys=45)
    params = method.parse(setting)
    own = options(method, qkv, params)
    close(method.run(method.implementation("chunked"), *qkv, params, **own), method.reference(*qkv, params, **own))


@pytest.mark.parametrize("implementation", ["eager", "chunked"])
@pytest.mark.parametrize("causal", [False, True])
def test_with_all_keys_dsa_is_softmax_and_spark_is_a_gated_one(causal, implementation):
    q, k, v = make(40)
    close(attnbench.get(f"dsa@{implementation}")(q, k, v, topk=40, causal=causal), attnbench.get("softmax@eager")(q, k, v, causal=causal))
    mask = torch.ones(40, 40, dtype=torch.bool).tril() if causal else torch.ones(40, 40, dtype=torch.bool)
    u, t = q[..., :4] @ k[..., :4].mT / 2, q[..., 4:] @ k[..., 4:].mT / 2
    want = (u.masked_fill(~mask, -torch.inf).softmax(-1) * softplus(t)) @ v
    close(attnbench.get(f"spark@{implementation}")(q, k, v, topk=40, causal=causal), want)


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "setting"), [("spark", {"topk": 32}), ("dsa", {"topk": 32})])
def test_half_precision_passes_the_gate(name, setting, dtype, causal):
    method, qkv = attnbench.get(name), make(300, 2, dim=32, dim_v=32, dtype=dtype)
    params = method.parse({**setting, "causal": causal})
    found = gate(method, method.implementation("chunked"), params, tuple(qkv), backward=True)
    assert found.passed, {key: (e, found.bounds[key]) for key, e in found.errors.items() if e > found.bounds[key]}


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_costs_count_pairs_once(causal, kv_heads):
    shape, heads = Shape(2, 4, 37, 8, kv_heads=kv_heads, dim_v=5), 8
    pairs = 37 * 38 // 2 if causal else 37 * 37
    read = sum(min(6, i + 1) if causal else 6 for i in range(37))
    spark, dsa = attnbench.get("spark"), attnbench.get("dsa")
    found = spark.cost(shape, spark.parse({"topk": 6, "predictor": 3, "causal": causal}))
    assert found.flops == {"score": heads * pairs * 2 * 3, "select": heads * pairs * 3, "attend": heads * read * 2 * (8 + 5)}
    assert found.total("forward+backward") - found.total() == 5 * found.flops["attend"] // 2
    params = dsa.parse({"topk": 6, "index_heads": 3, "index_dim": 7, "causal": causal})
    found = dsa.cost(shape, params)
    assert found.flops["score"] == 2 * pairs * 2 * 3 * (7 + 1)
    assert found.flops["attend"] == heads * read * 2 * (8 + 5)
    assert found.total("forward+backward") - found.total() == 5 * found.flops["attend"] // 2
    learned = sum(x.numel() for x in dsa.initial(shape, params, torch.empty(0)).values())
    io = 2 * 37 * (4 * (8 + 5) + kv_heads * (8 + 5))
    assert found.elements == io + heads * read * (8 + 5) + learned + 2 * 37 * (3 * (7 + 1) + 7)
    assert found.index_bytes == 4 * 2 * 37 * 6


def test_what_torch_counts_of_a_whole_dsa_call_is_what_the_cost_says():
    method, qkv = attnbench.get("dsa"), make(37, 2)
    params = method.parse({"topk": 6, "index_heads": 3, "index_dim": 7})
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params)
    flops = method.cost(Shape.of(*qkv), params).flops
    weighting = 2 * 2 * 37 * 37 * 3  # the weighted sum over the indexer's heads, which is no matrix product
    assert counter.get_total_flops() == sum(flops.values()) - weighting


@pytest.mark.parametrize(
    ("name", "setting", "line"),
    [
        ("spark", {"topk": 41}, r"topk = 41 exceeds M \(keys\) = 40: lower topk"),
        ("spark", {"topk": 0}, "topk = 0 is below its least value 1"),
        ("spark", {"topk": 4, "predictor": 8}, "predictor = 8 leaves nothing of D = 8: lower predictor"),
        ("spark", {"topk": 4, "scale": "all"}, "unknown value of spark.scale 'all'"),
        ("dsa", {}, r"topk = 2048 exceeds M \(keys\) = 40: lower topk"),
        ("dsa", {"topk": 4, "index_heads": 0}, "index_heads = 0 is below its least value 1"),
        ("dsa", {"topk": 4, "index_dim": 0}, "index_dim = 0 is below its least value 1"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(name, setting, line):
    with pytest.raises(UserError, match=line) as raised:
        attnbench.get(name)(*make(40), **setting)
    assert "\n" not in str(raised.value)


def test_a_head_of_one_dimension_cannot_be_split():
    with pytest.raises(UserError, match="D = 1 cannot be split in two"):
        attnbench.get("spark")(*make(40, dim=1), topk=4)


@pytest.mark.parametrize(("name", "setting"), BOTH)
def test_backward_keeps_no_pairs(name, setting):
    """What autograd saves grows with N, not with N x N."""
    method, saved = attnbench.get(f"{name}@chunked"), []
    for n in (256, 512):
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        qkv = [x.requires_grad_() for x in make(n)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = method(*qkv, causal=True, **setting)
        saved.append(sum(sizes.values()))
        out.sum().backward()
    assert saved[1] < 2.2 * saved[0]
