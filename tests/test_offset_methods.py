"""Deformable attention and DAT: definitions against loops and grid_sample, where they look, limits, costs, half precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import conv2d, gelu, grid_sample, layer_norm, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.errors import UserError
from attnbench.method import Shape

DAT = [
    {},
    {"points": 9, "bias": True},
    {"stride": 2, "kernel": 3, "reach": 2.0, "bias": True},
    {"stride": 3, "kernel": 3, "reach": 0.0},
    {"release": "2022", "stride": 2, "kernel": 5, "bias": True},
    {"release": "2022", "stride": 2, "reach": 1.5, "bias": True},
    {"release": "2022", "stride": 3, "reach": 0.0},
]
CASES = [("deformable", {}), ("deformable", {"points": 3}), *(("dat", setting) for setting in DAT)]
PRACTICAL = {"deformable": "chunked", "dat": "sdpa"}


def make(method, setting, n=35, kv_heads=4, *, heads=4, dim=6, dim_v=5, dtype=torch.float64, moved=0.3):
    """q, k, v, parameters, and learned parameters moved off their initial values."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, dim), (2, kv_heads, n, dim), (2, kv_heads, n, dim_v)]
    qkv = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    params = method.parse(setting)
    drawn = method.initial(Shape.of(*qkv), params, torch.empty(0, dtype=torch.float64))
    return qkv, params, {name: (x + moved * torch.randn(x.shape, generator=g, dtype=x.dtype)).to(dtype) for name, x in drawn.items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def practical(method):
    return method.function(method.implementation(PRACTICAL[method.name]))


@pytest.fixture(params=["roomy", "tight"])
def budget(request, monkeypatch):
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 13, "cuda": 1 << 13})
        monkeypatch.setattr("attnbench.methods._dat._RUN", 9)


def between(v, y, x, sides):
    """Value of `v: [N, Dv]` at (y, x), beyond the grid zero, corner by corner."""
    total = torch.zeros(v.shape[1], dtype=v.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < sides[0] and 0 <= j < sides[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * v[i * sides[1] + j]
    return total


def deformed(qkv, params, own):
    """Deformable attention, one query of one head at a time."""
    q, _, v = qkv
    out, sides = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), params.sides(q.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            value = v[b, h * v.shape[1] // q.shape[1]]
            for i in range(q.shape[2]):
                x = torch.cat([q[b, other, i] for other in range(q.shape[1])])
                share = (own["point_weight"][h] @ x + own["point_bias"][h]).softmax(0)
                where = own["offset_weight"][h] @ x + own["offset_bias"][h]
                reads = [between(value, i // sides[1] + float(dy), i % sides[1] + float(dx), sides) for dx, dy in where]
                out[b, h, i] = sum(a * r for a, r in zip(share, reads, strict=True))
    return out


@pytest.mark.parametrize(("n", "grid", "kv_heads"), [(35, "5x7", 4), (12, "auto", 2), (13, "auto", 1)])
@pytest.mark.parametrize("points", [1, 4])
def test_deformable_against_loops(points, n, grid, kv_heads):
    method = attnbench.get("deformable")
    qkv, params, own = make(method, {"points": points, "grid": grid}, n, kv_heads)
    want = deformed(qkv, params, own)
    close(method.reference(*qkv, params, weights=own), want)
    close(practical(method)(*qkv, params, own), want)


def published(qkv, params, own):
    """DAT as the authors compute it: convolution, layer norm and sampling by torch's functions, positions in coordinates, x before y."""
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in qkv)
    batch, heads, n, d = q.shape
    (h, w), (stride, kernel), share = params.sides(n), params.strides(n), params.group_heads
    groups, width, old = heads // share, share * d, params.release == "2022"
    image = q.transpose(2, 3).reshape(batch * groups, width, h, w)
    margin = 0 if stride == kernel else kernel // 2
    x = conv2d(image, own["conv_weight"].reshape(width, 1, kernel, kernel), own["conv_bias"].flatten(), stride, margin, groups=width)
    x = gelu(layer_norm(x.movedim(1, -1), (width,), own["norm_weight"], own["norm_bias"])) @ own["offset_weight"].T
    rows, columns = x.shape[1:3]
    centres = [torch.linspace(0.5, m - 0.5, m, dtype=x.dtype) / (m if old else m - 1) * 2 - 1 for m in (rows, columns)]
    reference = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1)
    if params.reach > 0 or (params.reach == 0 and not old):
        x = x.tanh() * torch.tensor([1 / (rows - (not old)), 1 / (columns - (not old))], dtype=x.dtype) * params.reach
    place = x + reference
    if params.reach < 0:
        place = place.tanh() if old else place.clamp(-1, 1)
    place = place.flatten(1, 2).unflatten(0, (batch, groups)).repeat_interleave(share, 1).flatten(0, 1).unsqueeze(1)
    keys, values = (
        grid_sample(t.transpose(2, 3).reshape(batch * heads, -1, h, w), place.flip(-1), align_corners=True)[:, :, 0].mT for t in (k, v)
    )
    logits = q.flatten(0, 1) @ keys.mT / d**0.5
    if params.bias:
        sides = [
            torch.linspace(0.5, m - 0.5, m, dtype=x.dtype) / m * 2 - 1 if old else torch.linspace(-1, 1, m, dtype=x.dtype) for m in (h, w)
        ]
        own_place = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1).unsqueeze(1)
        table = own["table"].repeat(batch, 1, 1).unsqueeze(1)
        logits = logits + grid_sample(table, ((own_place - place) / 2).flip(-1), align_corners=True)[:, 0]
    return (logits.softmax(-1) @ values).unflatten(0, (batch, heads))


@pytest.mark.parametrize(("n", "grid", "kv_heads"), [(63, "7x9", 4), (64, "auto", 2)])
@pytest.mark.parametrize("setting", DAT)
def test_dat_against_the_published_computation(setting, n, grid, kv_heads):
    method = attnbench.get("dat")
    qkv, params, own = make(method, {**setting, "grid": grid}, n, kv_heads)
    want = published(qkv, params, own)
    close(method.reference(*qkv, params, weights=own), want)
    close(practical(method)(*qkv, params, own), want)


@pytest.mark.parametrize(("name", "setting"), CASES)
@pytest.mark.usefixtures("budget")
def test_practical_implementations_are_the_definition_with_gradients(name, setting):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 63, 2)
    results = []
    for run in (method.reference, practical(method)):
        leaves = [x.clone().requires_grad_() for x in (*qkv, *own.values())]
        out = run(*leaves[:3], params, weights=dict(zip(own, leaves[3:], strict=True)))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("implementation", ["eager", "chunked"])
def test_where_the_paper_starts(implementation):
    """Eight heads look one to four steps along the axes and diagonals, with equal shares."""
    method = attnbench.get("deformable")
    q, v = torch.randn(1, 8, 121, 4, dtype=torch.float64), torch.zeros(1, 8, 121, 1, dtype=torch.float64)
    v[:, :, 5 * 11 + 5] = 1
    seen = attnbench.get(f"deformable@{implementation}")(q, q, v).view(8, 11, 11)
    steps = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
    for head, (down, right) in enumerate(steps):
        want = torch.zeros(11, 11, dtype=torch.float64)
        for p in range(1, 5):
            want[5 - p * down, 5 - p * right] = 1 / 4
        close(seen[head], want)
    offsets = method.initial(Shape(1, 8, 121, 4), method.params(), q)["offset_bias"]
    assert offsets.abs().amax((0, 2)).tolist() == [1, 2, 3, 4]


def test_deformable_attention_reads_no_key_and_without_offsets_itself():
    method = attnbench.get("deformable")
    (q, k, v), params, own = make(method, {})
    out = method.reference(q, k, v, params, weights=own)
    close(method.reference(q, 5 * k, v, params, weights=own), out)
    own["offset_weight"], own["offset_bias"] = torch.zeros_like(own["offset_weight"]), torch.zeros_like(own["offset_bias"])
    close(method.reference(q, k, v, params, weights=own), v)


def test_values_beyond_the_grid_are_zero_and_nothing_makes_up_for_them():
    method = attnbench.get("deformable")
    (q, k, v), params, own = make(method, {"points": 2, "grid": "5x7"}, moved=0.0)
    own["offset_bias"] = torch.tensor([[0.0, 0.0], [0.0, -1.5]], dtype=torch.float64).expand(4, 2, 2)
    out = method.reference(q, k, torch.ones_like(v), params, weights=own)[0, 0, :, 0].view(5, 7)
    close(out, torch.tensor([0.5, 0.75, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None].expand(5, 7))


@pytest.mark.parametrize(("name", "setting"), [("deformable", {"points": 2}), ("dat", {"points": 4}), ("dat", {"stride": 3, "reach": 1.0})])
def test_tokens_that_no_point_lies_beside_are_not_read(name, setting):
    method, row = attnbench.get(name), 17
    (q, k, v), params, own = make(method, setting, 36)
    one = torch.eye(36, dtype=torch.float64).expand(2, 4, -1, -1)
    read = method.reference(q, k, one, params, weights=own)[:, :, row]  # what each token weighs in the output of one query
    before = method.reference(q, k, v, params, weights=own)[:, :, row]
    close(before, (read.unsqueeze(-2) @ v).squeeze(-2))
    apart = read == 0
    assert 0 < apart.sum() < apart.numel()
    other_k, other_v = (torch.where(apart.unsqueeze(-1), x + 3, x) for x in (k, v))
    close(practical(method)(q, other_k, other_v, params, own)[:, :, row], before)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_tokens_have_places(name, setting):
    method = attnbench.get(name)
    (q, k, v), params, own = make(method, setting, 63)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(4))
    permuted = method.reference(*(x[:, :, order] for x in (q, k, v)), params, weights=own)
    assert not torch.allclose(permuted, method.reference(q, k, v, params, weights=own)[:, :, order])


def test_dat_with_a_point_on_every_token_is_softmax():
    """References of 2023 with stride 1 lie between tokens; half a step back they lie on them."""
    method = attnbench.get("dat")
    qkv, params, own = make(method, {"stride": 1, "grid": "5x7"}, dim_v=6)
    own["norm_weight"], own["norm_bias"] = torch.zeros_like(own["norm_weight"]), torch.ones_like(own["norm_bias"])
    back = torch.tensor([[-1 / 4], [-1 / 6]], dtype=torch.float64) / gelu(torch.ones((), dtype=torch.float64)) / 12
    own["offset_weight"] = back.expand(2, 12)
    want = scaled_dot_product_attention(*qkv)
    close(method.reference(*qkv, params, weights=own), want)
    close(practical(method)(*qkv, params, own), want)


def test_heads_of_a_group_share_points_and_queries_share_them_all():
    method = attnbench.get("dat")
    (q, k, _), params, own = make(method, {"points": 9, "group_heads": 2}, 36)
    places = torch.stack([torch.arange(36) // 6, torch.arange(36) % 6], -1).double().expand(2, 4, -1, -1)
    bank = method.experts(q, k, places, params, weights=own).banks[0]
    assert bank.routes is None
    assert bank.w2.shape == (2, 4, 1, 9, 2)
    close(bank.w2[:, 0], bank.w2[:, 1])
    close(bank.w2[:, 2], bank.w2[:, 3])
    assert not torch.allclose(bank.w2[:, 0], bank.w2[:, 2])
    assert bank.w2.amin() >= 0
    assert bank.w2.amax() <= 5


def test_a_constant_table_is_no_bias():
    method = attnbench.get("dat")
    qkv, params, own = make(method, {"points": 9, "bias": True}, 36)
    own["table"] = torch.full_like(own["table"], 7.0)
    plain = {name: x for name, x in own.items() if name != "table"}
    close(method.reference(*qkv, params, weights=own), method.reference(*qkv, method.parse({"points": 9}), weights=plain))


@pytest.mark.parametrize(("side", "stride", "kernel"), [(56, 8, 9), (28, 4, 7), (14, 2, 5), (7, 1, 3), (512, 74, 75), (24, 4, 7)])
def test_strides_are_those_of_dat_plus_plus(side, stride, kernel):
    params = attnbench.get("dat").params()
    assert params.strides(side**2) == (stride, kernel)
    assert params.counts(side**2) == ((7, 7) if side != 24 else (6, 6))


@pytest.mark.parametrize(
    ("name", "setting", "width"), [("deformable", {"points": 3}, 3), ("dat", {"points": 9}, 9), ("dat", {"stride": 2}, 9)]
)
def test_width_is_the_number_of_points(name, setting, width):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 36)
    assert fastweights.width_per_query(method.experts(*qkv, params, weights=own)) == width
    assert method.budget(Shape.of(*qkv), params, 7)["points"] == 7


@pytest.mark.parametrize("moved", [0.0, 0.1])
@pytest.mark.parametrize(("name", "setting"), [*CASES[:4], CASES[7]])
def test_half_precision_passes_the_gate(name, setting, moved):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 240, 2, heads=2, dim=32, dim_v=32, dtype=torch.bfloat16, moved=moved)
    result = gate(method, method.implementation(PRACTICAL[name]), params, tuple(qkv), own, backward=True)
    assert result.passed, {x: (e, result.bounds[x]) for x, e in result.errors.items() if e > result.bounds[x]}
    assert set(result.errors) >= {"out rms", "dq rms", "dv max", "doffset_weight rms"}


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_costs_of_matrix_products_are_what_torch_counts(name, setting):
    """Sampling and the convolution multiply entry by entry, which torch does not count."""
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 63, 2)
    flops = dict(method.cost(Shape.of(*qkv), params).flops)
    if name == "dat":
        rows, columns = params.counts(63)
        flops["project"] -= 2 * 2 * 4 * rows * columns * 6 * params.strides(63)[1] ** 2
        flops["score"] -= 8 * 2 * 4 * rows * columns * 63 if params.bias else 0
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params, weights=own)
    assert counter.get_total_flops() == flops["project"] + flops.get("score", 0) + flops["attend"]
    points = rows * columns if name == "dat" else 63 * params.points
    assert flops["gather"] == 2 * 4 * points * 4 * 2 * (5 + (6 if name == "dat" else 0))


@pytest.mark.parametrize(
    ("name", "setting"), [("deformable", {"points": 2}), ("dat", {"points": 16}), ("dat", {"points": 16, "bias": True})]
)
def test_backward_keeps_what_grows_with_the_tokens_alone(name, setting, monkeypatch):
    monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    method, saved = attnbench.get(f"{name}@{PRACTICAL[name]}"), []
    for n in (1024, 4096):
        sizes, qkv = {}, [torch.randn(1, 2, n, 16).requires_grad_() for _ in range(3)]

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = method(*qkv, **setting)
        saved.append(sum(sizes.values()))
        assert saved[-1] < 7 * qkv[0].numel() * 4
        out.sum().backward()
    assert saved[1] < 4.1 * saved[0]


def test_bad_input_is_one_line_that_says_what_to_do():
    q = torch.randn(1, 3, 12, 4)
    cases = [
        ("deformable", {"points": 0}, "points = 0 is below its least value 1"),
        ("deformable", {"grid": "2x5"}, "grid = 2x5 holds 10 tokens, not N = 12: change grid or N"),
        ("deformable", {"causal": True}, "no causal form: a query looks to all sides of itself"),
        ("dat", {}, "group_heads = 2 does not divide the 3 heads: change group_heads"),
        ("dat", {"group_heads": 3, "stride": 5, "kernel": 5}, "does not fit the grid"),
        ("dat", {"group_heads": 3, "release": "2024"}, "unknown value of dat.release '2024'"),
        ("dat", {"group_heads": 3, "causal": True}, "no causal form: all queries together say where points lie"),
    ]
    for name, setting, message in cases:
        with pytest.raises(UserError, match=message):
            attnbench.get(name)(q, q, q, **setting)
