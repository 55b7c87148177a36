"""Block windows, BRA and NSA: their formulas by loops, and their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_support import IDS, SETTINGS, SMALL, close, cut, settled, stirred, tensors
from torch import Tensor

import attnbench


def softmax_over(q: Tensor, kv: tuple[Tensor, Tensor], tokens: list[int], scale: float, bias: Tensor | float = 0.0) -> Tensor:
    k, v = (x[tokens] for x in kv)
    return (scale * (k @ q) + bias).softmax(0) @ v


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("grid", "sides", "tile", "causal"),
    [("5x7", (5, 7), (3, 3), False), ("2x10", (2, 10), (2, 4), False), ("line", (1, 23), (1, 6), False), ("line", (1, 23), (1, 6), True)],
)
def test_block_window_is_its_formula(grid: str, sides: tuple[int, int], tile: tuple[int, int], causal: bool, bias: bool) -> None:
    window = tile[1] if grid == "line" else tile[1] ** 2
    method, qkv = attnbench.get("block_window"), tensors(sides[0] * sides[1])
    params = settled(method, {"grid": grid, "window": window, "bias": bias, "causal": causal}, qkv)
    own = stirred(method, params, qkv)
    out, (q, k, v) = method.reference(*qkv, params, weights=own), qkv
    for place, tokens in cut(sides, tile).items():
        assert place[0] * tile[0] < sides[0]
        for h in range(4):
            for i in tokens:
                read = [j for j in tokens if not causal or j <= i]
                offset = [(i // sides[1] - j // sides[1], i % sides[1] - j % sides[1]) for j in read]
                added = torch.stack([own["bias"][h, y + tile[0] - 1, x + tile[1] - 1] for y, x in offset]) if bias else 0.0
                close(out[1, h, i], softmax_over(q[1, h, i], (k[1, h // 2], v[1, h // 2]), read, 8**-0.5, added))


@pytest.mark.parametrize("scale", ["1/sqrt(c)", "1/sqrt(d)"])
@pytest.mark.parametrize(("grid", "sides", "region", "tile"), [("5x7", (5, 7), 4, (2, 2)), ("line", (1, 29), 6, (1, 6))])
def test_bra_is_its_formula(grid: str, sides: tuple[int, int], region: int, tile: tuple[int, int], scale: Any) -> None:
    method, qkv = attnbench.get("bra"), tensors(sides[0] * sides[1])
    params = settled(method, {"grid": grid, "region": region, "topk": 3, "scale": scale, "lepe": 3}, qkv)
    own = stirred(method, params, qkv)
    out, (q, k, v) = method.reference(*qkv, params, weights=own), qkv
    regions = list(cut(sides, tile).values())
    factor = (4 * 8 if scale == "1/sqrt(c)" else 8) ** -0.5
    channels = v[1].repeat_interleave(2, 0).movedim(1, 2).reshape(20, *sides)
    for tokens in regions:
        liking = [sum(float(q[1, h, tokens].mean(0) @ k[1, h // 2, other].mean(0)) for h in range(4)) for other in regions]
        best = sorted(range(len(regions)), key=liking.__getitem__, reverse=True)[:3]
        read = [j for r in best for j in regions[r]]
        for i in tokens:
            y, x = divmod(i, sides[1])
            for h in range(4):
                around = own["lepe_bias"][5 * h : 5 * h + 5].clone()
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < sides[0] and 0 <= x + dx < sides[1]:
                            part = slice(5 * h, 5 * h + 5)
                            around += own["lepe_weight"][part, 0, dy + 1, dx + 1] * channels[part, y + dy, x + dx]
                close(out[1, h, i], softmax_over(q[1, h, i], (k[1, h // 2], v[1, h // 2]), read, factor) + around)


def fold(rows: Tensor, params: Any, own: dict[str, Tensor], name: str, head: int) -> Tensor:
    """One compressed row of a block's `rows: [<= l, D]`."""
    if params.phi == "mean":
        return rows.mean(0)
    flat = torch.zeros(params.compress, rows.shape[1], dtype=rows.dtype)
    flat[: len(rows)] = rows + own[f"{name}_position"][head, : len(rows)]
    hidden = (own[f"{name}_w1"] @ flat.flatten() + own[f"{name}_b1"]).clamp(min=0)
    return own[f"{name}_w2"] @ hidden + own[f"{name}_b2"]


@pytest.mark.parametrize("n", [5, 30, 43])
@pytest.mark.parametrize("values", [values for name, values in SETTINGS if name == "nsa"], ids=[i for i in IDS if i.startswith("nsa")])
def test_nsa_is_its_formula(values: dict[str, Any], n: int) -> None:
    method, qkv = attnbench.get("nsa"), tensors(n)
    params: Any = settled(method, values, qkv)
    own = stirred(method, params, qkv)
    out, (q, k, v), scale = method.reference(*qkv, params, weights=own), [x[1] for x in qkv], 8**-0.5
    length, stride, block = params.compress, params.stride, params.block
    starts = [0]
    while starts[-1] + length < n:
        starts.append(starts[-1] + stride)
    before, after = (params.window - 1, 0) if params.causal else (params.window // 2, (params.window - 1) // 2)
    for g in range(2):
        keys, values_ = (
            torch.stack([fold(x[g, s : s + length], params, own, name, g) for s in starts]) for x, name in ((k, "k"), (v, "v"))
        )
        for i in range(n):
            seen = [b for b, s in enumerate(starts) if not params.causal or s + length - 1 <= i]
            p = {h: (scale * (keys[seen] @ q[h, i])).softmax(0) for h in (2 * g, 2 * g + 1)}
            like = {}
            for j in range(-(-n // block)):
                steps = set(range(j * block // stride, (j + 1) * block // stride))
                share = [len(steps & set(range(starts[b] // stride, (starts[b] + length) // stride))) for b in seen]
                like[j] = sum(float(x @ torch.tensor(share, dtype=x.dtype)) for x in p.values())
                like[j] = float("inf") if j < params.first or 0 <= i // block - j < params.local else like[j]
            candidates = [j for j in like if not params.causal or j <= i // block]
            best = sorted(candidates, key=like.__getitem__, reverse=True)[: params.topk]
            selected = [t for j in best for t in range(j * block, min(n, (j + 1) * block)) if not params.causal or t <= i]
            window = list(range(max(0, i - before), min(n, i + after + 1)))
            for h, weight in p.items():
                branches = [weight @ values_[seen]] + [softmax_over(q[h, i], (k[g], v[g]), t, scale) for t in (selected, window)]
                gates = (own["gate"][h] @ q[:, i].flatten()).sigmoid()
                close(out[1, h, i], sum(gate * branch for gate, branch in zip(gates, branches, strict=True)))


@pytest.mark.parametrize("n", [1, 24, 35])
def test_dense_limits_are_softmax(n: int) -> None:
    qkv, softmax = tensors(n), attnbench.get("softmax@eager")
    for implementation in ("eager", "sdpa"):
        for causal in (False, True):
            close(
                attnbench.get(f"block_window@{implementation}")(*qkv, grid="line", window=64, causal=causal), softmax(*qkv, causal=causal)
            )
    for implementation in ("eager", "varlen"):
        bra = attnbench.get(f"bra@{implementation}")
        close(bra(*qkv, region=4, topk=99, scale="1/sqrt(d)"), softmax(*qkv))
        close(bra(*qkv, region=4, topk=99), softmax(qkv[0] * 4**-0.5, *qkv[1:]))


@pytest.mark.parametrize("implementation", ["eager", "varlen"])
@pytest.mark.parametrize("causal", [False, True])
def test_nsa_with_whole_branches_is_softmax_times_its_gates(causal: bool, implementation: str) -> None:
    method, qkv = attnbench.get(f"nsa@{implementation}"), tensors(23)
    values = {"compress": 1, "stride": 1, "block": 1, "topk": 30, "window": 45, "causal": causal}
    own = stirred(method, settled(method, values, qkv), qkv)
    total = (qkv[0].transpose(1, 2).flatten(2) @ own["gate"].flatten(0, 1).T).sigmoid().unflatten(2, (4, 3)).sum(-1).transpose(1, 2)
    expected = total.unsqueeze(-1) * attnbench.get("softmax@eager")(*qkv, causal=causal)
    close(method(*qkv, weights=own, **values), expected)


@pytest.mark.parametrize("implementation", ["eager", "varlen"])
def test_nsa_of_ones_is_the_sum_of_gates(implementation: str) -> None:
    q, k, v = tensors(50)
    for causal in (False, True):
        method = attnbench.get(f"nsa@{implementation}")
        out = method(q, k, torch.ones_like(v), **SMALL, causal=causal)
        weights = method.experts(q, k, v, method.parse(SMALL | {"causal": causal}))
        compressed, selected, window = weights.gates
        compressed = compressed * (torch.arange(50) >= 7) if causal else compressed  # the first block of 8 ends at token 7
        close(out, (compressed + selected + window).unsqueeze(-1).expand_as(out))


def test_nsa_importance_of_equal_blocks_is_the_probability() -> None:
    from attnbench.methods._nsa_select import importance

    p = torch.rand(1, 4, 6, 5, dtype=torch.float64)
    params: Any = attnbench.get("nsa").parse({"compress": 4, "stride": 4, "block": 4})
    close(importance(p, 2, 5, params), p.unflatten(1, (2, 2)).sum(2))
