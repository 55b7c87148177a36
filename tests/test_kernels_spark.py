"""The fused Spark kernels: in Triton's interpreter where there is no GPU, else on the GPU, against the definition in float64."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from triton_support import DEVICE, interpreter, replayed  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
import attnbench
from attnbench.kernels import spark as kernels
from attnbench.kernels.spark import spark_attention, spark_listed, spark_statistics
from attnbench.kernels.spark._list_operator import listed_forward
from attnbench.kernels.spark._operator import spark_forward

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def fused(q, k, v, params, how="triton"):
    return attnbench.get("spark").implementation(how).load()(q, k, v, params)


CASES = {  # heads, key heads, N, M, D, Dv, parameters, dtype
    "fp32": (2, 2, 70, 70, 32, 32, {"topk": 9}, torch.float32),
    "bf16, several tiles": (1, 1, 100, 150, 64, 64, {"topk": 20}, torch.bfloat16),
    "fp16, grouped heads": (4, 2, 40, 40, 32, 32, {"topk": 5, "scale": "whole"}, torch.float16),
    "uneven parts, Dv > D": (1, 1, 37, 90, 20, 96, {"topk": 7, "predictor": 5, "unbiased": True}, torch.float32),
    "wide heads": (1, 1, 33, 70, 128, 128, {"topk": 6}, torch.float32),
    "all keys": (1, 1, 20, 20, 16, 16, {"topk": 20}, torch.float32),
    "one key": (1, 1, 1, 1, 16, 16, {"topk": 1}, torch.float32),
    "two dimensions": (1, 1, 30, 40, 2, 3, {"topk": 4}, torch.float32),
}


LISTED = {("uneven parts, Dv > D", False), ("two dimensions", True)}
"""what lists are tried at in the interpreter, which takes long for a program a query"""


@pytest.mark.parametrize("how", ["triton", "lists"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_the_definitions(name, causal, how):
    if how == "lists" and DEVICE == "cpu" and (name, causal) not in LISTED:
        pytest.skip("on a GPU only")
    case = CASES[name]
    h, hk, n, m, d, dv, setting, dtype = case
    method = attnbench.get("spark")
    params = method.parse({**setting, "causal": causal})
    q, k, v, grad = make((2, h, n, d), (2, hk, m, d), (2, hk, m, dv), (2, h, n, dv), dtype=dtype)
    found = []
    for function, dtype_ in ((partial(fused, how=how), dtype), (method.reference, torch.float64)):
        leaves = [x.to(dtype_).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, params)
        found.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype_))))
    for mine, theirs in zip(*found, strict=True):
        assert mine.isfinite().all()
        assert mine.dtype == dtype
        assert float((mine.double() - theirs).detach().norm()) < TOLERANCE[dtype] * max(1.0, float(theirs.detach().norm()))


@pytest.mark.parametrize("longest", [20] if DEVICE == "cpu" else [1, 20, 100])
def test_tiles_whose_queries_fit_no_list_are_computed_whole(longest):
    """Of three tiles of queries one keeps most keys, one none, and one a few; lists hold one key, some, or all."""
    q, k, v, grad = make((1, 2, 150, 32), (1, 1, 100, 32), (1, 1, 100, 24), (1, 2, 150, 24))
    scores = q[..., :16] @ k[..., :16].repeat_interleave(2, 1).mT
    place = torch.arange(150, device=DEVICE) // 64
    limit = torch.where(place == 0, scores.quantile(0.2, -1), torch.where(place == 1, 1e9, scores.quantile(0.93, -1)))
    found = []
    for function in (partial(spark_listed, longest=longest), spark_attention):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, limit, 16, 0.25, 0.25)
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
    _, _, _, index, count, flags = listed_forward(q, k, v, limit, 16, 0.25, 0.25, longest, False)
    assert flags[0, 0].tolist() == [int(longest < 100), 1, int(longest < int(count[0, 0, 128:].max()))]
    kept = (scores >= limit.unsqueeze(-1)).sum(-1)
    assert torch.equal(count.long(), kept)
    for row in (0, 130, 149):
        want = (scores[0, 1, row] >= limit[0, 1, row]).nonzero().flatten()[:longest]
        assert index[0, 1, row, : len(want)].tolist() == want.tolist(), "in order"


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_causal_statistics_are_those_of_the_scores_seen(shift):
    q, k = make((1, 2, 90, 32), (1, 1, 90, 32))
    k = k + shift / 4
    mean, squares = spark_statistics(q, k, 13)
    scores = q[..., :13].double() @ k[..., :13].double().mT
    for i in (0, 1, 63, 64, 89):
        seen = scores[:, :, i, : i + 1]
        torch.testing.assert_close(mean[:, :, i].double(), seen.mean(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(squares[:, :, i].double(), seen.var(-1, correction=0) * (i + 1), rtol=2e-4, atol=1e-4)


def test_where_no_score_reaches_the_threshold_the_largest_counts():
    q, k, v, grad = make((1, 1, 70, 32), (1, 1, 200, 32), (1, 1, 200, 32), (1, 1, 70, 32))
    high = torch.full((1, 1, 70), 1e9, device=DEVICE)
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b, c = (x.to(dtype).requires_grad_() for x in (q, k, v))
        if dtype == torch.float32:
            out = spark_attention(a, b, c, high, 16, 0.25, 0.25)
        else:
            best = (a[..., :16] @ b[..., :16].mT).argmax(-1)
            gates = torch.nn.functional.softplus(0.25 * (a[..., 16:] * b[0, 0, best][..., 16:]).sum(-1, keepdim=True))
            out = gates * c[0, 0, best]
        found.append((out, *torch.autograd.grad(out, (a, b, c), grad.to(dtype))))
    for mine, theirs in zip(*found, strict=True):
        assert float((mine.double() - theirs).detach().norm()) < 2e-5 * float(theirs.detach().norm())


def test_same_input_same_bits_and_strided_inputs():
    q, k, v = make((1, 70, 3, 2, 32))[0].permute(2, 0, 3, 1, 4)
    params = attnbench.get("spark").parse({"topk": 9})
    runs = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        runs.append(torch.autograd.grad(fused(*leaves, params).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(fused(q, k, v, params), fused(*(x.contiguous() for x in (q, k, v)), params))


def test_a_bad_query_reaches_nobody_else():
    q, k, v = make((1, 1, 70, 32), (1, 1, 70, 32), (1, 1, 70, 32))
    limit = torch.zeros(1, 1, 70, device=DEVICE)
    keep = torch.arange(70, device=DEVICE) != 7
    for bad in (float("nan"), float("inf")):
        spoiled = q.index_fill(2, torch.tensor([7], device=DEVICE), bad)
        good, other = (spark_attention(x, k, v, limit, 16, 0.25, 0.25) for x in (q, spoiled))
        assert torch.equal(good[:, :, keep], other[:, :, keep])


def test_the_operators_are_well_formed_and_compile():
    q, k, v = (x.requires_grad_() for x in make((1, 1, 20, 32), (1, 1, 20, 32), (1, 1, 20, 32)))
    limit = torch.zeros(1, 1, 20, device=DEVICE)
    torch.library.opcheck(spark_forward, (q, k, v, limit, 16, 0.25, 0.25, True))
    torch.library.opcheck(spark_statistics, (q.detach(), k.detach(), 16))

    def layer(q, k, v):
        return spark_attention(q * 1.0, k, v, limit, 16, 0.25, 0.25).sin()

    want = layer(q, k, v)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, want)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_these_kernels_and_those_that_select_compile_for_an_h100(tmp_path):
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_compile_skim.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in shared} == {
        *("topk_score_kernel", "topk_select_kernel", "gather_attend_kernel", "gather_gradient_kernel"),
        *("spark_statistics_kernel", "spark_attend_kernel", "spark_query_gradient_kernel", "spark_key_gradient_kernel"),
        *("spark_list_kernel", "spark_gather_kernel", "spark_spread_kernel"),
    }
    assert all(int(size) <= 227 << 10 for _, size in shared), "more shared memory than a multiprocessor has"


def test_unsupported_calls_say_why():
    assert kernels.supported(64, 64, torch.bfloat16) == []
    assert "up to 128, not 256" in kernels.supported(64, 256, torch.bfloat16)[0]
    assert "not float64" in kernels.supported(64, 64, torch.float64)[0]
    assert "split in two" in kernels.supported(1, 64, torch.float32)[0]
    q, k, v = make((1, 3, 8, 32), (1, 2, 8, 32), (1, 2, 8, 32))
    with pytest.raises(ValueError, match="do not fit"):
        spark_attention(q, k, v, torch.zeros(1, 3, 8, device=DEVICE), 16, 1.0, 1.0)
    with pytest.raises(ValueError, match="predictor 32 do not fit"):
        spark_attention(q[:, :2], k, v, torch.zeros(1, 2, 8, device=DEVICE), 32, 1.0, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gate_on_a_gpu(dtype, dim, causal):
    from attnbench.check import gate

    method, qkv = attnbench.get("spark"), tuple(make((2, 4, 3000, dim), (2, 2, 3000, dim), (2, 2, 3000, dim), dtype=dtype))
    found = gate(method, method.implementation("triton"), method.parse({"topk": 64, "causal": causal}), qkv, backward=True)
    assert found.passed, {key: (e, found.bounds[key]) for key, e in found.errors.items() if e > found.bounds[key]}
    assert found.deterministic


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
def test_a_cuda_graph_replays_without_synchronising(causal):
    q, k, v, grad = make(*[(1, 4, 4096, 64)] * 4, dtype=torch.bfloat16)
    leaves, params = [x.requires_grad_() for x in (q, k, v)], attnbench.get("spark").parse({"topk": 64, "causal": causal})

    def step():
        out = fused(*leaves, params)
        return out, *torch.autograd.grad(out, leaves, grad)

    want, got = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
