"""Block windows, BRA and NSA: formulas by loops, limits, supports, symmetries, implementations, half precision and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_support import IDS, SETTINGS, SMALL, settled, tensors
from torch import Tensor

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.inputs import draw
from attnbench.method import Method, Params, Shape

PRACTICAL = {"block_window": "sdpa", "bra": "varlen", "nsa": "varlen"}
SIZES = [(1, 4), (35, 2), (63, 1), (100, 2)]


def stirred(method: Method, params: Params, qkv: list[Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    drawn = method.initial(Shape.of(*qkv), params, qkv[0])
    return {name: x + 0.2 * torch.randn(x.shape, generator=g, dtype=x.dtype) for name, x in drawn.items()}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def softmax_over(q: Tensor, kv: tuple[Tensor, Tensor], tokens: list[int], scale: float, bias: Tensor | float = 0.0) -> Tensor:
    k, v = (x[tokens] for x in kv)
    return (scale * (k @ q) + bias).softmax(0) @ v


def cut(sides: tuple[int, int], tile: tuple[int, int]) -> dict[tuple[int, int], list[int]]:
    """Place of each region -> its tokens."""
    found: dict[tuple[int, int], list[int]] = {}
    for t in range(sides[0] * sides[1]):
        found.setdefault((t // sides[1] // tile[0], t % sides[1] // tile[1]), []).append(t)
    return found


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


def read_by(method: Method, params: Params, qkv: list[Tensor], row: int) -> Tensor:
    """`[B, H, N]` tokens that a query reads as tokens."""
    weights, n = method.experts(*qkv, params), qkv[1].shape[2]  # type: ignore[misc]
    read = torch.zeros(*qkv[0].shape[:2], n + 1, dtype=torch.bool)
    for bank in weights.banks:
        if not bank.compressed:
            tokens = bank.tokens(torch.tensor([row]))[:, :, 0]
            read.scatter_(2, tokens.masked_fill((tokens < 0) | (bank.causal & (tokens > row)), n), True)
    return read[..., :n]


@pytest.mark.parametrize(("name", "values"), [x for x in SETTINGS if not x[1].get("lepe")], ids=[i for i in IDS if "lepe" not in i])
def test_values_outside_the_support_do_not_matter(name: str, values: dict[str, Any]) -> None:
    qkv = tensors(63, 4)
    method, row = attnbench.get(f"{name}@{PRACTICAL[name]}"), 40
    params = settled(method, values, qkv)
    outside = ~read_by(method, params, qkv, row)
    if name == "nsa":  # a causal query knows no compressed block of the future; otherwise all tokens are folded
        outside = outside & (torch.arange(63) > row) if params.causal else torch.zeros_like(outside)
    elif not params.causal:
        assert 0 < outside.sum() < outside.numel()
    q, k, v = qkv
    before = method(q, k, v, **values)[:, :, row]
    after = method(q, k, torch.where(outside.unsqueeze(-1), v + 3.0, v), **values)[:, :, row]
    close(after, before)
    moved = method(q, k, torch.where(outside.unsqueeze(-1), v, v + 3.0), **values)[:, :, row]
    assert (moved - before > 0.1).all()


def test_window_of_nsa_is_where_sliding_window_looks() -> None:
    method, qkv = attnbench.get("nsa"), tensors(40)
    for causal in (False, True):
        params = settled(method, SMALL | {"causal": causal}, qkv)
        ours = method.experts(*qkv, params).banks[2]  # type: ignore[misc]
        other = attnbench.get("sliding_window")
        theirs = other.experts(*qkv, other.parse({"window": 9, "causal": causal})).banks[0]  # type: ignore[misc]
        assert torch.equal(ours.tokens(torch.arange(40)), theirs.tokens(torch.arange(40)))


def test_selection_of_nsa_is_shared_in_a_group_and_holds_forced_blocks() -> None:
    method, qkv = attnbench.get("nsa"), tensors(100)
    for causal in (False, True):
        routes = method.experts(*qkv, settled(method, SMALL | {"causal": causal}, qkv)).banks[1].routes  # type: ignore[misc]
        assert routes is not None
        assert torch.equal(routes[:, 0], routes[:, 1])
        assert not torch.equal(routes[:, 1], routes[:, 2])
        own = torch.arange(100)[:, None] // 12
        assert ((routes == 0).any(-1) & (routes == own).any(-1) & ((routes == own - 1).any(-1) | (own[:, 0] == 0))).all()
        assert not causal or (routes <= own).all()
        assert (routes.sort(-1).values.diff(dim=-1) != 0).logical_or(routes.sort(-1).values[..., 1:] < 0).all()


def permuted(order: Tensor, name: str, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    qkv, method = tensors(36), attnbench.get(f"{name}@{PRACTICAL[name]}")
    return method(*(x[:, :, order] for x in qkv), **values), method(*qkv, **values)[:, :, order]


@pytest.mark.parametrize(
    ("name", "values"),
    [("block_window", {"grid": "line", "window": 6}), ("block_window", {"grid": "6x6", "window": 9}), ("bra", {"region": 9, "topk": 2}),
     ("bra", {"grid": "line", "region": 6, "topk": 2})],
)  # fmt: skip
def test_tokens_of_a_region_are_a_set_and_so_are_regions(name: str, values: dict[str, Any]) -> None:
    line = values.get("grid") == "line"
    regions = list(cut((1, 36), (1, 6)).values()) if line else list(cut((6, 6), (3, 3)).values())
    g = torch.Generator().manual_seed(1)
    inside, whole = torch.arange(36), torch.arange(36)
    for tokens, other in zip(regions, torch.randperm(len(regions), generator=g).tolist(), strict=True):
        inside[tokens] = torch.tensor(tokens)[torch.randperm(len(tokens), generator=g)]
        whole[tokens] = torch.tensor(regions[other])
    for order in (inside, whole):
        assert not torch.equal(order, torch.arange(36))
        close(*permuted(order, name, values))
    got, want = permuted(torch.randperm(36, generator=g), name, values)
    assert not torch.allclose(got, want)


def test_order_matters_to_nsa() -> None:
    got, want = permuted(torch.randperm(36, generator=torch.Generator().manual_seed(1)), "nsa", SMALL)
    assert not torch.allclose(got, want)


@pytest.mark.parametrize(("n", "kv_heads"), SIZES)
@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=IDS)
def test_fast_weights_are_the_definition(name: str, values: dict[str, Any], n: int, kv_heads: int) -> None:
    method, qkv = attnbench.get(name), tensors(n, kv_heads)
    params = settled(method, values, qkv)
    own = {"weights": x} if (x := stirred(method, params, qkv)) else {}
    close(fastweights.apply(method.experts(*qkv, params, **own), qkv[0]), method.reference(*qkv, params, **own))  # type: ignore[misc]


@pytest.fixture(params=[1 << 26, 1 << 13], ids=["roomy", "tight"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": request.param})


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize(("n", "kv_heads"), SIZES)
@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=IDS)
def test_practical_implementation_is_the_definition(name: str, values: dict[str, Any], n: int, kv_heads: int) -> None:
    method, qkv = attnbench.get(name), tensors(n, kv_heads)
    params = settled(method, values, qkv)
    own = stirred(method, params, qkv)
    leaves = [x.requires_grad_() for x in (*qkv, *own.values())]
    named = dict(zip(own, leaves[3:], strict=True))
    got = method.run(method.implementation(PRACTICAL[name]), *leaves[:3], params, weights=named)
    want = method.reference(*leaves[:3], params, weights=named)
    close(got, want)
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(5))
    pairs = [torch.autograd.grad(out, leaves, grad, allow_unused=True) for out in (got, want)]
    for mine, theirs in zip(*pairs, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "values"), [("bra", {"region": 9}), ("nsa", SMALL)])
def test_selection_has_no_gradient(name: str, values: dict[str, Any]) -> None:
    """Keys that no query reads as tokens get no gradient from what chose the others."""
    q, k, v = (x.requires_grad_() for x in tensors(81, 4))
    method = attnbench.get(f"{name}@{PRACTICAL[name]}")
    params = settled(method, values, [q, k, v])
    out = method(q, k, v, **values)
    (dk,) = torch.autograd.grad(out[:, :, 40].sum(), k)
    if name == "bra":
        read = read_by(method, params, [q, k, v], 40)
        assert (dk[~read] == 0).all()
    assert dk.abs().sum() > 0


@pytest.mark.parametrize("name", PRACTICAL)
def test_backward_keeps_no_pairs(name: str) -> None:
    """What autograd saves grows with N, not with N x N."""
    method, saved = attnbench.get(f"{name}@{PRACTICAL[name]}"), []
    values: dict[str, Any] = {"nsa": SMALL | {"window": 8}}.get(name, {})
    for n in (256, 1024):
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        qkv = [x.requires_grad_() for x in tensors(n)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = method(*qkv, **values)
        saved.append(sum(sizes.values()))
        out.sum().backward()
    assert saved[1] < 4.5 * saved[0]


@pytest.mark.parametrize("profile", ["randn", "needle"])
@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("block_window@sdpa", {}), ("block_window@sdpa", {"bias": True}), ("block_window@sdpa", {"grid": "line", "causal": True}),
        ("bra@varlen", {"region": 16}), ("bra@varlen", {"region": 16, "lepe": 3, "scale": "1/sqrt(d)"}),
        ("nsa@varlen", {"topk": 4, "window": 33}), ("nsa@varlen", {"topk": 4, "window": 33, "causal": True}),
        ("nsa@varlen", {"topk": 4, "phi": "mlp"}),
        ("moba@varlen", {"block": 32}), ("moba@varlen", {"block": 32, "causal": True}),
    ],
    ids=str,
)  # fmt: skip
def test_half_precision_passes_the_gate(label: str, values: dict[str, Any], profile: str) -> None:
    method, shape = attnbench.get(label), Shape(1, 2, 330, 16)
    params = method.parse(values).fitted(shape)
    inputs = draw(profile, shape, 1, torch.bfloat16, "cpu")
    result = gate(method, method.implementation(method.pinned), params, inputs, backward=True)
    assert result.passed, {k: (v, result.bounds[k]) for k, v in result.errors.items() if v > result.bounds[k]}
