"""InLine, MHLA, Linformer and PVT: their formulas worked out by hand, practical implementations and half precision."""

from __future__ import annotations

import math

import pytest
import torch
from method_support import close
from projection_support import CASES, REPO, SETTINGS, make, prepared, repeated
from torch.nn.functional import adaptive_avg_pool2d, conv2d, gelu, layer_norm, leaky_relu, linear, pad, scaled_dot_product_attention

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.inputs import draw
from attnbench.method import Shape

PRACTICAL = {"inline": "products", "mhla": "blocked", "linformer": "sdpa", "pvt": "sdpa"}


def image(x, sides):
    """`[B, H, N, D]` -> `[B, H D, height, width]`."""
    return x.permute(0, 1, 3, 2).reshape(x.shape[0], -1, *sides)


def tokens(x, heads):
    return x.flatten(2).unflatten(1, (heads, -1)).permute(0, 1, 3, 2)


SIDES = {35: (5, 7), 36: (6, 6), 60: (6, 10)}


def inline_by_hand(q, k, v, params, w):
    phi = {"identity": lambda x: x, "relu": torch.relu, "leakyrelu": leaky_relu, "exp": lambda x: (0.2 * x).exp()}[params.kernel]
    keys, values = repeated(phi(k), q), repeated(v, q)
    scores = phi(q) @ keys.mT / q.shape[-1] ** 0.5
    weights = (scores + 1 - scores.mean(-1, keepdim=True)) / k.shape[2]
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    out = weights @ values
    if params.conv:
        (b, h, n, _), side, (height, width) = q.shape, params.conv, SIDES[q.shape[2]]
        margin = side // 2
        for i in range(b):
            for j in range(h):
                net = gelu(linear(q[i, j].mean(0), w["conv_in"][j], w["conv_in_bias"][j]))
                kernel = linear(net, w["conv_out"][j], w["conv_out_bias"][j]).view(-1, side, side)
                grid = pad(values[i, j].view(height, width, -1), (0, 0, margin, margin, margin, margin))
                for t in range(n):
                    window = grid[t // width : t // width + side, t % width : t % width + side]
                    out[i, j, t] += torch.einsum("xyd,dxy->d", window, kernel)
    return out


def block_of(n, params):
    """The block of each token, by the definition of its borders."""
    height, width = (1, n) if params.grid == "none" else SIDES[n]
    shapes = [(r, params.blocks // r) for r in range(1, params.blocks + 1) if params.blocks % r == 0]
    fits = [(r, c) for r, c in shapes if r <= height and c <= width]
    rows, columns = min(fits, key=lambda x: (abs(math.log(height / x[0] / (width / x[1]))), -x[0]))
    owner = torch.empty(height, width, dtype=torch.long)
    for r in range(rows):
        for c in range(columns):
            owner[r * height // rows : (r + 1) * height // rows, c * width // columns : (c + 1) * width // columns] = r * columns + c
    return owner.flatten()


def mhla_by_hand(q, k, v, params, w):
    owner, keys, values = block_of(q.shape[2], params), repeated(k, q).clamp(min=0) + 1e-6, repeated(v, q)
    query = q.clamp(min=0) + 1e-6
    weights = (query @ keys.mT) * w["mix"][owner][:, owner]
    total = weights.sum(-1, keepdim=True) + 1e-6
    if params.normalizer == "none":
        total = torch.ones_like(total)
    if params.normalizer == "repo":
        own = (query * torch.stack([keys[:, :, owner == b].sum(2) for b in owner.tolist()], 2)).sum(-1)
        total = torch.zeros_like(total)
        for b in range(params.blocks):
            for a in range(params.blocks):
                total[:, :, owner == b, 0] += w["mix"][b, a] * own[:, :, owner == a]
        total += 1e-6
    out = weights @ values / total
    if params.conv:
        sides = (1, q.shape[2]) if params.grid == "none" else SIDES[q.shape[2]]
        kernel = w["conv"].flatten(0, 1).unsqueeze(1)
        maps = conv2d(image(v, sides), kernel, w["conv_bias"].flatten(), padding="same", groups=len(kernel))
        out = out + repeated(tokens(maps, v.shape[1]), q)
    return out


def linformer_by_hand(q, k, v, params, w):
    e, f = w["e"], w["e" if params.share else "f"]
    assert ("f" in w) != params.share
    mix = "hrm,bhmd->bhrd" if params.per_head else "rm,bhmd->bhrd"
    keys, values = repeated(torch.einsum(mix, e, k), q), repeated(torch.einsum(mix, f, v), q)
    return torch.softmax(q @ keys.mT / q.shape[-1] ** 0.5, -1) @ values


def pvt_by_hand(q, k, v, params, w):
    def shrunk(x, name):
        maps, heads = image(x, SIDES[x.shape[2]]), x.shape[1]
        maps = adaptive_avg_pool2d(maps, params.pool) if params.pool else maps
        kernel, groups = w[f"{name}_conv"].permute(0, 3, 1, 2), heads if params.per_head else 1
        maps = conv2d(maps, kernel, w[f"{name}_bias"], stride=kernel.shape[2:], groups=groups)
        rows, channels = maps.flatten(2).mT, maps.shape[1] // groups
        normal = layer_norm(rows.unflatten(2, (groups, channels)), (channels,), eps=1e-5).flatten(2)
        rows = normal * w[f"{name}_scale"] + w.get(f"{name}_shift", 0)
        return repeated(tokens((gelu(rows) if params.pool else rows).mT, heads), q)

    return scaled_dot_product_attention(q, shrunk(k, "k"), shrunk(v, "v"))


BY_HAND = {"inline": inline_by_hand, "mhla": mhla_by_hand, "linformer": linformer_by_hand, "pvt": pvt_by_hand}


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("n", [35, 60])
@pytest.mark.parametrize(("name", "setting"), [*CASES, ("mhla", {"blocks": 15}), ("mhla", {"blocks": 10, "grid": "none"})])
def test_definition_is_the_formula(name, setting, n, kv_heads):
    qkv = make(n, kv_heads)
    method, params, w = prepared(name, setting, qkv)
    close(method.reference(*qkv, params, weights=w), BY_HAND[name](*qkv, params, w))


@pytest.mark.parametrize("setting", [REPO, {"blocks": 9, "normalizer": "repo"}, {"blocks": 12, "grid": "none", "normalizer": "repo"}])
def test_denominator_of_the_authors_code_mixes_places(setting):
    qkv = make(36)
    method, params, w = prepared("mhla", setting, qkv)
    close(method.reference(*qkv, params, weights=w), mhla_by_hand(*qkv, params, w))


@pytest.fixture(params=["roomy", "tight"])
def budget(request, monkeypatch):
    """Small chunks, runs and thresholds, so that small inputs are cut up as large ones are on a GPU."""
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 12})
        monkeypatch.setattr("attnbench.methods._products._SUMMED", 5)
        monkeypatch.setattr("attnbench.methods._project._BUSY", 9)
        monkeypatch.setattr("attnbench.methods._project._RUN", 7)
        monkeypatch.setattr("attnbench.methods._compressed._BLOCKS", {"cpu": 64})
        monkeypatch.setattr("attnbench.methods._compressed._LEAST", 6)


EVEN = [("mhla", REPO, 36, 2), ("mhla", {**REPO, "grid": "none"}, 60, 4), ("mhla", {"blocks": 9, "grid": "none"}, 36, 1)]


@pytest.mark.parametrize(
    ("name", "setting", "n", "kv_heads"), [*((*case, *size) for case in CASES for size in ((35, 2), (36, 4), (60, 1))), *EVEN]
)
@pytest.mark.usefixtures("budget")
def test_practical_implementation_and_fast_weights_are_the_definition(name, setting, n, kv_heads):
    qkv = make(n, kv_heads)
    method, params, w = prepared(name, setting, qkv)
    close(fastweights.apply(method.experts(*qkv, params, weights=w), qkv[0]), method.reference(*qkv, params, weights=w))
    function = method.function(method.implementation(PRACTICAL[name]))
    grad = make(n, dim=5, seed=1)[0]
    found = []
    for run in (function, method.reference):
        leaves = [x.detach().clone().requires_grad_() for x in (*qkv, *w.values())]
        out = run(*leaves[:3], params, weights=dict(zip(w, leaves[3:], strict=True)))
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


# one block alone is left out: its mixing weight cancels, so that its gradient is rounding alone
HALF = [(*case, torch.bfloat16, "randn") for case in [*CASES, ("mhla", REPO), ("mhla", {"blocks": 10})]]
HALF = [case for case in HALF if case[1].get("blocks") != 1]
HALF += [("pvt", {"reduction": r}, torch.bfloat16, "randn") for r in (1, 12)]  # softmax attention, and a single key
HALF += [(name, SETTINGS[name][0], dtype, "local") for name in SETTINGS for dtype in (torch.bfloat16, torch.float16, torch.float32)]


@pytest.mark.parametrize(("name", "setting", "dtype", "profile"), HALF)
def test_low_precision_passes_the_gate(name, setting, dtype, profile):
    method = attnbench.get(name)
    params = method.parse({**setting, **({"rank": 49} if name == "linformer" else {})})
    inputs = draw(profile, Shape(1, 4, 288, 32, kv_heads=2), 0, dtype, "cpu")
    verdict = gate(method, method.implementation(PRACTICAL[name]), params, inputs, backward=True, rows=64)
    assert verdict.passed, {key: (verdict.errors[key], verdict.bounds[key]) for key in verdict.errors}
    assert verdict.deterministic


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("name", SETTINGS)
def test_low_precision_passes_the_gate_when_cut_up(name):
    method = attnbench.get(name)
    params = method.parse(SETTINGS[name][0])
    inputs = draw("clustered", Shape(1, 4, 60, 16, kv_heads=2), 0, torch.bfloat16, "cpu")
    verdict = gate(method, method.implementation(PRACTICAL[name]), params, inputs, backward=True)
    assert verdict.passed, {key: (verdict.errors[key], verdict.bounds[key]) for key in verdict.errors}


@pytest.mark.parametrize("name", ["inline", "linformer"])
@pytest.mark.usefixtures("budget")
def test_cross_attention(name):
    (q, _, _), (_, k, v) = make(40), make(70)
    method, params, w = prepared(name, SETTINGS[name][0], (q, k, v))
    want = BY_HAND[name](q, k, v, params, w)
    close(method.reference(q, k, v, params, weights=w), want)
    close(method(q, k, v, weights=w, **SETTINGS[name][0]), want)
