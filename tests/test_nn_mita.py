"""The MiTA layer against loops over tokens that share no code with it."""

from __future__ import annotations

import copy
import doctest
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnbench.nn.mita
from attnbench.errors import UserError
from attnbench.nn import AttentionLayer, MiTAAttention

DIM, HEADS = 16, 2
SMALL = {"landmarks": 4, "topk": 5}
CASES: list[tuple[int, dict[str, Any]]] = [
    (26, SMALL),
    (26, {**SMALL, "experts_per_query": 2}),
    (26, {**SMALL, "shared": False}),
    (26, {**SMALL, "routed": False}),
    (26, {**SMALL, "conv": True, "gate": True, "qkv_bias": True}),
    (25, {**SMALL, "grid": (4, 6), "legacy_cls_shift": False}),
    (25, {**SMALL, "grid": (4, 6), "shared_scale": "1/sqrt(d)"}),
    (24, {**SMALL, "grid": (3, 8), "prefix": 0, "conv": True}),
    (19, {**SMALL, "grid": (5, 3), "prefix": 4, "legacy_cls_shift": False, "conv": True, "gate": True, "proj_bias": False}),
    (19, {**SMALL, "grid": (5, 3), "prefix": 4}),
    (21, {"landmarks": 6, "topk": 5, "grid": None, "prefix": 2}),
]


def make(n: int, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[MiTAAttention, Tensor]:
    torch.manual_seed(n)
    layer = MiTAAttention(DIM, HEADS, **({"method": "mita@eager"} | options)).to(dtype)
    return layer, torch.randn(2, n, DIM, dtype=dtype)


def bins(count: int, size: int) -> list[range]:
    return [range(math.floor(i * size / count), math.ceil((i + 1) * size / count)) for i in range(count)]


def pooled(n: int, o: dict[str, Any]) -> list[list[int]]:
    """Tokens that each landmark averages."""
    prefix, grid = o.get("prefix", 1), o.get("grid", "square")
    if grid is None:
        return [[prefix + t for t in part] for part in bins(o["landmarks"], n - prefix)]
    first = 0 if o.get("legacy_cls_shift", True) else prefix
    height, width = (math.isqrt(n - prefix),) * 2 if grid == "square" else grid
    side = math.isqrt(o["landmarks"])
    return [[first + y * width + x for y in ys for x in xs] for ys, xs in itertools.product(bins(side, height), bins(side, width))]


def attend(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
    """One head, `[N, D]`, one query at a time."""
    n, dim = q.shape
    r = [q[part].mean(0) for part in pooled(n, o)]
    values = [torch.softmax(k @ x / dim**0.5, 0) @ v for x in r]
    chosen = [sorted(range(n), key=lambda j, x=x: -float((x @ k[j]).detach()))[: o["topk"]] for x in r]
    factor = dim**-0.5 if o.get("shared_scale") == "1/sqrt(d)" else 1 / dim
    out = []
    for query in q:
        best = sorted(range(len(r)), key=lambda m, query=query: -float((r[m] @ query).detach()))[: o.get("experts_per_query", 1)]
        read = [(factor * (query @ x), u) for x, u in zip(r, values, strict=True)] if o.get("shared", True) else []
        if o.get("routed", True):
            read += [(query @ k[j] / dim**0.5, v[j]) for m in best for j in chosen[m]]
        out.append(torch.softmax(torch.stack([logit for logit, _ in read]), 0) @ torch.stack([value for _, value in read]))
    return torch.stack(out)


def convolve(v: Tensor, dwc: nn.Conv2d, o: dict[str, Any]) -> Tensor:
    """3 x 3 around each patch of `[N, C]`; nothing for the tokens before."""
    prefix, grid = o.get("prefix", 1), o.get("grid", "square")
    height, width = (math.isqrt(len(v) - prefix),) * 2 if grid == "square" else grid
    out = [torch.zeros_like(v[0])] * prefix
    for row, column in itertools.product(range(height), range(width)):
        total = dwc.bias
        for dy, dx in itertools.product((-1, 0, 1), (-1, 0, 1)):
            if 0 <= row + dy < height and 0 <= column + dx < width:
                total = total + dwc.weight[:, 0, dy + 1, dx + 1] * v[prefix + (row + dy) * width + column + dx]
        out.append(total)
    return torch.stack(out)


def brute_force(layer: MiTAAttention, x: Tensor, o: dict[str, Any]) -> Tensor:
    fused = layer.qkvg if o.get("gate") else layer.qkv
    out = []
    for tokens in x:
        line = tokens @ fused.weight.T + (0 if fused.bias is None else fused.bias)
        q, k, v, *gate = line.split(DIM, -1)
        width = DIM // HEADS
        heads = [attend(*(t[:, h * width : (h + 1) * width] for t in (q, k, v)), o) for h in range(HEADS)]
        mixed = torch.cat(heads, -1)
        if o.get("conv"):
            mixed = mixed + convolve(v, layer.dwc, o)
        for g in gate:
            mixed = mixed * g * torch.sigmoid(g)
        out.append(mixed @ layer.proj.weight.T + (0 if layer.proj.bias is None else layer.proj.bias))
    return torch.stack(out)


@pytest.mark.parametrize(("n", "options"), CASES)
@pytest.mark.parametrize("method", ["mita@eager", "mita@varlen"])
def test_output_and_gradients_are_those_of_a_loop(n: int, options: dict[str, Any], method: str) -> None:
    layer, x = make(n, options | {"method": method})
    x.requires_grad_()
    got, want, named = layer(x), brute_force(layer, x, options), {"x": x, **dict(layer.named_parameters())}
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, list(named.values()), grad) for out in (got, want))
    for name, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_defaults_are_those_of_the_authors() -> None:
    layer = MiTAAttention(384, 6)
    assert isinstance(layer, AttentionLayer)
    params = layer.operator.params
    assert (params.landmarks, params.topk, params.experts_per_query) == (25, 25, 1)
    assert (params.shared, params.routed, params.shared_scale) == (True, True, "1/d")
    assert (params.prefix, params.grid, params.legacy_cls_shift) == (1, "square", True)
    assert layer.qkv.bias is None
    assert layer.proj.bias is not None


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"qkv.weight", "proj.weight", "proj.bias"}),
        ({"qkv_bias": True, "proj_bias": False}, {"qkv.weight", "qkv.bias", "proj.weight"}),
        ({"conv": True}, {"qkv.weight", "proj.weight", "proj.bias", "dwc.weight", "dwc.bias"}),
        ({"conv": True, "gate": True}, {"qkvg.weight", "proj.weight", "proj.bias", "dwc.weight", "dwc.bias"}),
        ({"qk_norm": True}, {"qkv.weight", "proj.weight", "proj.bias", "q_norm.weight", "k_norm.weight"}),
    ],
)
def test_weights_are_named_as_in_the_authors_modules(options: dict[str, Any], keys: set[str]) -> None:
    layer, _ = make(26, SMALL | options)
    state = layer.state_dict()
    assert set(state) == keys
    if "dwc.weight" in keys:
        assert state["dwc.weight"].shape == (DIM, 1, 3, 3)
    if "qkvg.weight" in keys:
        assert state["qkvg.weight"].shape == (4 * DIM, DIM)


def test_the_convolution_leaves_prefix_tokens_alone() -> None:
    layer, x = make(19, {**SMALL, "grid": (5, 3), "prefix": 4, "conv": True})
    before = layer(x)
    assert layer.dwc is not None
    nn.init.normal_(layer.dwc.weight)
    nn.init.normal_(layer.dwc.bias)
    after = layer(x)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amin(-1).min() > 0


def test_a_closed_gate_leaves_the_bias() -> None:
    layer, x = make(26, {**SMALL, "gate": True})
    with torch.no_grad():
        layer.qkvg.weight[3 * DIM :] = 0
    assert torch.equal(layer(x), layer.proj.bias.expand_as(x))


def test_the_shifted_grid_pools_the_class_token_and_not_the_last() -> None:
    def landmarks_move(legacy: bool, token: int) -> bool:
        """Whether another query at `token` changes what compress-only attention gives other tokens."""
        layer, x = make(26, {**SMALL, "routed": False, "legacy_cls_shift": legacy})
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        other = q.clone()
        other[:, :, token] += 1
        rest = [i for i in range(26) if i != token]
        return not torch.equal(layer.operator(q, k, v)[:, :, rest], layer.operator(other, k, v)[:, :, rest])

    assert [landmarks_move(True, token) for token in (0, 12, 25)] == [True, True, False]
    assert [landmarks_move(False, token) for token in (0, 12, 25)] == [False, True, True]


def test_without_class_token_there_is_nothing_to_shift() -> None:
    (layer, x), (other, _) = (make(25, {**SMALL, "prefix": 0, "legacy_cls_shift": legacy}) for legacy in (True, False))
    assert torch.equal(layer(x), other(x))


def test_two_experts_read_a_shared_token_twice() -> None:
    options = {**SMALL, "experts_per_query": 2, "topk": 26, "shared": False}
    (layer, x), (single, _) = make(26, options), make(26, options | {"experts_per_query": 1})
    torch.testing.assert_close(layer(x), single(x))  # every token twice weighs as every token once


def test_it_can_be_compiled_whole() -> None:
    torch._dynamo.reset()
    layer, x = make(25, {**SMALL, "grid": (4, 6), "conv": True, "gate": True, "qk_norm": True, "positions": "rotary-2d"}, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    got, want = compiled(x), layer(x)
    torch.testing.assert_close(got, want)
    weights = list(layer.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), [x, *weights]) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_runs_it_in_half_precision_and_selects_in_single() -> None:
    layer, x = make(26, {**SMALL, "conv": True, "gate": True}, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.float().square().sum().backward()
        q, k, v, _ = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer.qkvg(x).chunk(4, -1))
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    mixed = attnbench.get("mita@eager")(q, k, v, **layer.operator.params.as_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.mix(q, k, v), mixed)
        assert not torch.equal(layer.operator(q, k, v), mixed)  # what autocast would make of scores


def test_checkpointing_changes_no_gradient() -> None:
    layer, x = make(26, {**SMALL, "conv": True, "gate": True})
    x.requires_grad_()
    named = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), named),
        torch.autograd.grad(layer(x).square().sum(), named),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_copies_compute_the_same() -> None:
    layer, x = make(26, {**SMALL, "conv": True, "gate": True})
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    again, _ = make(26, {**SMALL, "conv": True, "gate": True})
    nn.init.zeros_(again.proj.weight)
    again.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_topk": 5}, "unknown parameter 'kv_topk' in mita"),
        ({"causal": True}, "mita has no causal form"),
        ({"grid": None, "conv": True}, "need grid = "),
        ({"grid": (14, 14), "topk": 198}, "topk = 198 exceeds"),
        ({"grid": (14, 14), "landmarks": 24}, "not a square number"),
        ({"grid": (14, 14), "shared": False, "routed": False}, "queries read nothing"),
    ],
)
def test_mistakes_are_told_when_the_layer_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MiTAAttention(DIM, HEADS, **options)


def test_tokens_that_are_no_grid_are_told() -> None:
    layer, _ = make(26, SMALL)
    with pytest.raises(UserError, match="grid = square needs N - prefix to be a square number, not 26"):
        layer(torch.randn(1, 27, DIM, dtype=torch.float64))


def test_the_example_runs() -> None:
    result = doctest.testmod(attnbench.nn.mita)
    assert result.attempted > 5
    assert result.failed == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("values", [{}, {"experts_per_query": 2, "topk": 12}, {"shared": False, "topk": 50}, {"conv": True, "gate": True}])
def test_fused_kernels_in_a_compiled_layer_agree_with_the_definition(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    exact = MiTAAttention(128, 2, qkv_bias=True, method="mita@eager", **values).cuda().double()
    fused = MiTAAttention(128, 2, qkv_bias=True, method="mita@triton", **values).cuda()
    eager = MiTAAttention(128, 2, qkv_bias=True, method="mita@eager", **values).cuda()
    for layer in (fused, eager):
        layer.load_state_dict(exact.state_dict())
    x = torch.randn(4, 197, 128, device="cuda")
    want, outs = exact(x.double()), []
    for layer in (torch.compile(fused, fullgraph=True), fused, eager):
        with torch.autocast("cuda", torch.bfloat16):
            outs.append(layer(x))
    # rounding flips near ties of the selection, so that rows are compared by quantiles
    errors = [((out.double() - want).norm(dim=-1) / want.norm(dim=-1)).flatten() for out in outs]
    for error in errors[:2]:
        for quantile in (0.5, 0.9):
            assert error.quantile(quantile) < 2 * errors[2].quantile(quantile) + 1e-3
