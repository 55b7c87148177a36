"""Spark attention and DeepSeek sparse attention: definitions by brute force, limits, gradients and half precision."""

from __future__ import annotations

from functools import partial
from statistics import NormalDist, fmean, pstdev, stdev

import pytest
import torch
from method_support import close, saved_bytes
from skim_support import BOTH, CASES, make, options
from torch.nn.functional import softplus

import attnbench
from attnbench import fastweights
from attnbench.check import gate

SIZES = [(37, 4), (50, 2), (9, 1)]


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "setting"), [("spark", {"topk": 32}), ("dsa", {"topk": 32})])
def test_half_precision_passes_the_gate(name, setting, dtype, causal):
    method, qkv = attnbench.get(name), make(300, 2, dim=32, dim_v=32, dtype=dtype)
    params = method.parse({**setting, "causal": causal})
    found = gate(method, method.implementation("chunked"), params, tuple(qkv), backward=True)
    assert found.passed, {key: (e, found.bounds[key]) for key, e in found.errors.items() if e > found.bounds[key]}


@pytest.mark.parametrize(("name", "setting"), BOTH)
def test_backward_keeps_no_pairs(name, setting):
    """What autograd saves grows with N, not with N x N."""
    method = attnbench.get(f"{name}@chunked")
    saved = [saved_bytes(partial(method, causal=True, **setting), make(n)) for n in (256, 512)]
    assert saved[1] < 2.2 * saved[0]
