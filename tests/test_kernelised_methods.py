"""Performer, cosFormer, focused linear attention and PolaFormer: brute force, identities, their implementation, half precision, costs."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from attnbench.methods.performer import directions
from method_support import close
from torch.nn.functional import conv2d, linear, softplus
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.errors import UserError
from attnbench.inputs import draw
from attnbench.method import Method, Params, Shape

SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("performer", {}),
    ("performer", {"features": 11, "lengths": "fixed", "seed": 5, "eps": 0.01}),
    ("performer", {"kernel": "relu", "relu_eps": 0.02}),
    ("cosformer", {}),
    ("focused_linear", {}),
    ("focused_linear", {"power": 4.5}),
    ("polaformer", {}),
    ("polaformer", {"alpha": 2.0}),
]
BESIDE: list[tuple[str, dict[str, object]]] = [
    ("focused_linear", {"position": True, "conv": 3, "grid": "6x7"}),
    ("polaformer", {"position": True, "conv": 3, "grid": "6x7"}),
    ("polaformer", {"gate": True}),
]
NAMES = ["performer", "cosformer", "focused_linear", "polaformer"]
Qkv = list[torch.Tensor]


def make(
    n: int, *, heads: int = 2, kv_heads: int = 0, keys: int = 0, dim: int = 6, dim_v: int = 5, dtype: torch.dtype = torch.float64
) -> Qkv:
    g = torch.Generator().manual_seed(n)
    sizes = [(2, heads, n, dim), (2, kv_heads or heads, keys or n, dim), (2, kv_heads or heads, keys or n, dim_v)]
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]


def stirred(method: Method, qkv: Qkv, params: Params) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    drawn = method.initial(Shape.of(*qkv), params, qkv[0].double())
    return {name: (x + 0.3 * torch.randn(x.shape, generator=g, dtype=x.dtype)).to(qkv[0].dtype) for name, x in drawn.items()}


def options(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": weights} if weights else {}


# brute force: what query i weighs key j of `keys` tokens with, one pair at a time, and what it divides by


def performer_weights(q: Qkv, k: Qkv, i: int, params: Params, _w: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    rows = directions(params, len(q[i]), torch.float64, torch.device("cpu"))
    a, b = q[i] / len(q[i]) ** 0.25, [x / len(x) ** 0.25 for x in k]
    if params.kernel == "relu":
        phi, keys = (rows @ a).relu() + params.relu_eps, [(rows @ x).relu() + params.relu_eps for x in b]
    else:
        top = max(float((rows @ x).max()) for x in b)
        phi = (rows @ a - a @ a / 2 - (rows @ a).max()).exp() + params.eps
        keys = [(rows @ x - x @ x / 2 - top).exp() + params.eps for x in b]
    weights = [phi @ x for x in keys]
    return weights, torch.stack(weights).sum()


def cosformer_weights(
    q: Qkv, k: Qkv, i: int, _params: Params, _w: dict[str, torch.Tensor], total: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    weights = [q[i].relu() @ x.relu() * math.cos(math.pi * (i - j) / (2 * total)) for j, x in enumerate(k)]
    return weights, torch.stack(weights).sum().clamp(min=1e-6)


def brute_force(name: str, qkv: Qkv, params: Params, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[B, H, N, Dv]`; causal, query i with the first i + 1 keys, as if there were no others."""
    q, k, v = qkv
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = i + 1 if params.causal else k.shape[2]
            for h in range(q.shape[1]):
                own = h * k.shape[1] // q.shape[1]
                keys, values = list(k[b, own, :seen]), v[b, own, :seen]
                if name == "performer":
                    weights, total = performer_weights(list(q[b, h]), keys, i, params, w)
                elif name == "cosformer":
                    weights, total = cosformer_weights(list(q[b, h]), keys, i, params, w, max(q.shape[2], k.shape[2]))
                elif name == "focused_linear":
                    weights = [focused(q[b, :, i], w, params)[h] @ focused(k[b, :, j], w, params)[h] for j in range(seen)]
                    total = torch.stack(weights).sum() + 1e-6 * seen
                else:
                    out[b, h, i] = polarised(q[b, h, i], keys, values, params.alpha, {name: x[h] for name, x in w.items()})
                    continue
                out[b, h, i] = torch.stack(weights) @ values / total
    return out


def focused(x: torch.Tensor, w: dict[str, torch.Tensor], params: Params) -> torch.Tensor:
    """Features `[H, D]` of one token's `[H, D]`."""
    y = (x.relu() + 1e-6) / softplus(w["scale"])
    return y**params.power * y.norm() / (y**params.power).norm()


def polarised(q: torch.Tensor, keys: Qkv, values: torch.Tensor, alpha: float, w: dict[str, torch.Tensor]) -> torch.Tensor:
    power, half = 1 + alpha * w["power"].sigmoid(), -(-values.shape[1] // 2)

    def weight(a: torch.Tensor, b: torch.Tensor, sign: int) -> torch.Tensor:
        a, b = a / softplus(w["scale"]), b / softplus(w["scale"])
        terms = (a * b).abs() ** power
        return terms[(a * b).sign() == sign].sum()

    parts = []
    for sign, columns in ((1, values[:, :half]), (-1, values[:, half:])):
        weights = torch.stack([weight(q, k, sign) for k in keys])
        parts.append(weights @ columns / (weights.sum() + 1e-6 * len(keys)))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=str)
def test_definition_is_the_formula_pair_by_pair(name: str, setting: dict[str, object], causal: bool) -> None:
    method = attnbench.get(name)
    qkv = make(13, kv_heads=1 if method.limits.gqa else 0, keys=0 if causal else 17)
    params = method.parse({**setting, "causal": causal})
    w = stirred(method, qkv, params)
    close(method.reference(*qkv, params, **options(w)), brute_force(name, qkv, params, w))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_equal_values_are_read_as_they_are(name: str, causal: bool) -> None:
    q, k, v = make(40, dim=32)
    out = attnbench.get(f"{name}@chunked")(q, k, torch.full_like(v, 3.0), causal=causal)
    torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_only_positions_of_cosformer_matter(name: str) -> None:
    q, k, v = make(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    method = attnbench.get(name)
    moved, whole = method(q[:, :, order], k[:, :, order], v[:, :, order]), method(q, k, v)[:, :, order]
    assert torch.allclose(moved, whole, rtol=1e-9, atol=1e-11) == (name != "cosformer")


def test_performer_estimates_the_softmax_kernel_without_bias() -> None:
    """Products of features, their stabilisers undone, have `exp(q.k / sqrt(D))` as mean over draws: within 5 standard errors."""
    from attnbench.methods.performer import half_square, projected

    q, k, _ = (0.3 * x for x in make(6, dim=8))
    estimates = []
    for seed in range(400):
        params = attnbench.get("performer").parse({"seed": seed, "features": 16})
        a, b = ((projected(x, params) - half_square(x)).exp() for x in (q, k))
        estimates.append(a @ b.transpose(-1, -2) / 16)
    drawn = torch.stack(estimates)
    error = (drawn.mean(0) - (q @ k.transpose(-1, -2) * 8**-0.5).exp()).abs()
    assert bool((error < 5 * drawn.std(0) / len(drawn) ** 0.5).all())
    assert float((drawn.std(0) / drawn.mean(0)).max()) < 1.0


def test_performer_comes_closer_to_softmax_with_more_features() -> None:
    q, k, v = (0.5 * x for x in make(64, dim=16, dim_v=16))
    exact = attnbench.get("softmax")(q, k, v)
    errors = [float((attnbench.get("performer")(q, k, v, features=r, eps=1e-9) - exact).norm()) for r in (16, 256, 4096)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_directions_are_orthogonal_in_blocks_and_follow_the_seed() -> None:
    params, cpu = attnbench.get("performer").parse({"features": 20}), torch.device("cpu")
    rows = directions(params, 8, torch.float64, cpu)
    for block in rows.split(8):
        gram = block @ block.T
        close(gram, torch.diag(gram.diagonal()))
    other = directions(attnbench.get("performer").parse({"features": 20, "seed": 1}), 8, torch.float64, cpu)
    assert not torch.allclose(rows, other)
    fixed = directions(attnbench.get("performer").parse({"features": 20, "lengths": "fixed"}), 8, torch.float64, cpu)
    close(fixed.norm(dim=1), torch.full((20,), 8**0.5, dtype=torch.float64))
    assert params.count(64) == 20
    assert attnbench.get("performer").params().count(64) == 266


def test_gradients_of_performer_take_maxima_for_constants() -> None:
    """Where the definition is written with its maxima as given numbers, its gradient is that of its values."""
    from attnbench.methods import _kernelised
    from attnbench.methods.performer import NORM, half_square, projected

    method = attnbench.get("performer")
    params, (q, k, v) = method.params(), make(7, dim=4)
    tops = projected(q, params).amax(-1, keepdim=True), projected(k, params).amax((-1, -2), keepdim=True)

    def frozen(*x: torch.Tensor) -> torch.Tensor:
        phi = [(projected(y, params) - half_square(y) - top).exp() + params.eps for y, top in zip(x, tops, strict=False)]
        return _kernelised.attend(*phi, x[2], NORM)

    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(frozen, leaves)
    g = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    got, want = (torch.autograd.grad(f(*leaves), leaves, g) for f in (lambda *x: method.reference(*x, params), frozen))
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_focused_features_keep_their_length_and_one_is_no_focus() -> None:
    from attnbench.methods.focused_linear import feature

    x, zero = make(9)[0], torch.zeros(2, 6, dtype=torch.float64)
    plain = feature(x, zero, 1.0)
    close(plain, (x.relu() + 1e-6) / math.log(2))
    for power in (3.0, 12.0):
        sharp = feature(x, zero, power)
        close(sharp.square().sum((1, 3)), plain.square().sum((1, 3)))
        assert float(sharp.square().square().sum()) > float(plain.square().square().sum())


def test_signs_of_polaformer_add_up_to_magnitudes() -> None:
    from attnbench.methods.polaformer import feature, opposite

    q, k, _ = make(9)
    w = {"scale": torch.randn(2, 6, dtype=torch.float64), "power": torch.randn(2, 6, dtype=torch.float64)}
    a, b = feature(q, w, 4.0), feature(k, w, 4.0)
    magnitudes = [x[..., :6] + x[..., 6:] for x in (a, b)]
    close((a + opposite(a)) @ b.transpose(-1, -2), magnitudes[0] @ magnitudes[1].transpose(-1, -2))


# the shared implementation


@pytest.fixture(params=["roomy", "tight"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tight: parts of a few tokens or of one head, and causal segments of one chunk."""
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 12, "cuda": 1 << 12})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "setting"), [*SETTINGS, *BESIDE], ids=str)
@pytest.mark.usefixtures("budget")
def test_parts_and_segments_make_the_whole(name: str, setting: dict[str, object], causal: bool) -> None:
    method = attnbench.get(name)
    n = 300 if causal else 42
    if causal and ("conv" in setting):
        pytest.skip("the convolution reads later tokens")
    qkv = make(n, heads=4, kv_heads=2 if method.limits.gqa else 0, keys=0 if causal or "conv" in setting else 31)
    params = method.parse({**setting, "causal": causal})
    w = stirred(method, qkv, params)
    leaves = [x.requires_grad_() for x in (*qkv, *w.values())]
    want = method.reference(*qkv, params, **options(w))
    got = method.run(method.implementation("chunked"), *qkv, params, weights=w or None)
    close(got, want)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=want.dtype)
    for a, b in zip(*(torch.autograd.grad(x, leaves, g) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_need_not_be_contiguous(name: str) -> None:
    method = attnbench.get(f"{name}@chunked")
    qkv = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in make(20)]
    out = method(*qkv)
    close(out, attnbench.get(f"{name}@eager")(*qkv))
    for x, grad in zip(qkv, torch.autograd.grad(out.sum(), qkv), strict=True):
        assert grad.shape == x.shape


@pytest.mark.parametrize(("name", "width"), [("performer", 266), ("cosformer", 2 * 64), ("focused_linear", 64), ("polaformer", 2 * 64)])
def test_features_are_not_kept_for_the_backward_pass(name: str, width: int) -> None:
    """Kept are inputs, denominators and a state that does not grow with N."""
    kept = []
    for n in (512, 1024):
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        qkv = [x.requires_grad_() for x in make(n, dim=64, dim_v=64)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attnbench.get(f"{name}@chunked")(*qkv)
        kept.append(sum(sizes.values()))
    grown, inputs = kept[1] - kept[0], 3 * 512 * 2 * 2 * 64 * 8
    assert inputs <= grown < inputs + 512 * 2 * 2 * 8 * min(width, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cosformer", "polaformer"])
def test_a_query_without_features_reads_nothing_and_changes_nothing(name: str, dtype: torch.dtype) -> None:
    q, k, v = make(24, dtype=dtype)
    dead = -q.abs() if name == "cosformer" else torch.zeros_like(q)
    q = torch.where(torch.arange(24)[:, None] == 5, dead, q)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if name == "polaformer" and dtype == torch.float16:
        pytest.skip("powers leave its range")
    out = attnbench.get(f"{name}@chunked")(*leaves)
    assert bool((out[:, :, 5] == 0).all())
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(bool(x.isfinite().all()) for x in grads)
    assert bool((grads[0][:, :, 5] == 0).all())
    without = [x.detach()[:, :, torch.arange(24) != 5] if x is q else x.detach() for x in leaves]
    others = [x.requires_grad_() for x in without]
    if name == "polaformer":  # positions of cosFormer would move
        rest = attnbench.get(f"{name}@chunked")(*others)
        for a, b in zip(grads[1:], torch.autograd.grad(rest, others[1:], torch.ones_like(rest)), strict=True):
            assert float((a - b).norm()) <= 4 * torch.finfo(dtype).eps * float(b.norm())


def test_a_huge_later_key_leaves_early_causal_rows_of_performer_alone() -> None:
    q, k, v = make(300, dtype=torch.float32)
    method = attnbench.get("performer@chunked")
    before = method(q, k, v, causal=True)
    for times, bound in ((8, 1e-4), (100, torch.inf)):
        after = method(q, torch.where(torch.arange(300)[:, None] == 290, times * k, k), v, causal=True)
        assert bool(after.isfinite().all())
        assert float((after[:, :, :290] - before[:, :, :290]).abs().max()) < bound


HALF = [
    *[(name, setting, causal) for name, setting in SETTINGS for causal in (False, True)],
    ("focused_linear", {"position": True, "conv": 3}, False),
    ("polaformer", {"position": True, "conv": 3, "gate": True}, False),
    ("linear", {}, False),
    ("linear", {}, True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "setting", "causal"), HALF, ids=str)
def test_half_precision_passes_the_gate(name: str, setting: dict[str, object], causal: bool, dtype: torch.dtype) -> None:
    method = attnbench.get(name)
    shape = Shape(2, 4, 320, 32, kv_heads=2 if method.limits.gqa else 0, dim_v=24)
    params, implementation = method.parse({**setting, "causal": causal}), method.implementation("chunked")
    if reasons := method.reasons(implementation, shape, dtype, "cpu", params, backward=True):
        assert name in ("performer", "focused_linear", "polaformer"), "nothing else is refused"
        assert (dtype, causal) == (torch.float16, False)
        pytest.skip("; ".join(reasons))
    inputs = draw("randn", shape, 0, dtype, "cpu")
    found = gate(method, implementation, params, inputs, stirred(method, list(inputs), params), backward=True)
    assert found.passed, {key: (found.errors[key], found.bounds[key]) for key in found.errors if found.errors[key] > found.bounds[key]}
    assert found.deterministic


@pytest.mark.parametrize("label", ["linear@chunked", *(f"{name}@chunked" for name in NAMES), "mhla@blocked"])
def test_half_precision_passes_the_gate_where_queries_have_few_features(label: str) -> None:
    """With one channel above 0 the values and the denominator of a query move together: its gradient is a difference near 0."""
    method, shape = attnbench.get(label), Shape(1, 2, 96, 16)
    q, k, v = draw("randn", shape, 0, torch.bfloat16, "cpu")
    alone = (torch.arange(16) == torch.arange(96)[:, None] % 16) & (torch.arange(96)[:, None] % 3 == 0)
    few = torch.where(torch.arange(96)[:, None] % 3 == 0, torch.where(alone, 0.04, -q.abs()), q).to(q.dtype)
    found = gate(method, method.implementation(method.pinned), method.params(), (few, k, v), backward=True)
    assert found.passed, {key: (found.errors[key], found.bounds[key]) for key in found.errors if found.errors[key] > found.bounds[key]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [320, 5000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("label", [*(f"{name}@{how}" for name in ("linear", *NAMES) for how in ("chunked", "triton")), "linear@fla"])
def test_half_precision_passes_the_gate_on_a_gpu(label: str, causal: bool, n: int) -> None:
    method = attnbench.get(label)
    shape = Shape(1, 8, n, 64, kv_heads=4 if method.limits.gqa else 0)
    params, implementation = method.parse({"causal": causal}), method.implementation(method.pinned)
    if reasons := method.reasons(implementation, shape, torch.bfloat16, "cuda", params, backward=True):
        pytest.skip("; ".join(reasons))
    found = gate(method, implementation, params, draw("randn", shape, 0, torch.bfloat16, "cuda"), backward=True)
    assert found.passed, {key: (found.errors[key], found.bounds[key]) for key in found.errors if found.errors[key] > found.bounds[key]}


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_flash_linear_attention_is_asked_for_is_the_definition(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    """With a stand-in for its kernel, which adds up as it is documented to."""

    def chunk_linear_attn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, normalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert (scale, normalize) == (1.0, False)
        assert q.shape[:3] == k.shape[:3] == v.shape[:3]
        assert v.shape[3] % 8 == 0
        weights = torch.einsum("bihd,bjhd->bhij", q, k).tril()
        return torch.einsum("bhij,bjhd->bihd", weights, v), None

    for name, content in (("fla", {}), ("fla.ops", {}), ("fla.ops.linear_attn", {"chunk_linear_attn": chunk_linear_attn})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "attnbench.methods._linear_fla", raising=False)
    method, qkv = attnbench.get("linear"), [x.requires_grad_() for x in make(50, kv_heads=kv_heads)]
    params = method.parse({"causal": True})
    got, want = method.run(method.implementation("fla"), *qkv, params), method.reference(*qkv, params)
    monkeypatch.delitem(sys.modules, "attnbench.methods._linear_fla")
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), qkv) for x in (got, want)), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["linear", *NAMES])
def test_prefix_sums_have_one_implementation(name: str) -> None:
    method, shape = attnbench.get(name), Shape(1, 2, 64, 64)
    pinned, own, causal = method.implementation("triton"), method.params(), method.parse({"causal": True})
    assert method.choose(shape, torch.bfloat16, "cuda", causal)[0] == method.implementation("chunked")
    reasons = method.reasons(pinned, shape, torch.bfloat16, "cuda", causal)
    assert "no causal form: features of prefix sums are those of `chunked`" in reasons
    assert "runs on cuda only, not on cpu" in method.reasons(pinned, shape, torch.bfloat16, "cpu", own)


def test_flash_linear_attention_says_what_it_cannot_do() -> None:
    method, shape = attnbench.get("linear"), Shape(1, 2, 64, 64)
    reasons = method.reasons(method.implementation("fla"), shape, torch.float16, "cpu", method.params())
    assert {"runs on cuda only, not on cpu", "takes bfloat16, not float16", "flash-linear-attention is causal"} <= set(reasons)
    assert method.choose(shape, torch.bfloat16, "cuda", method.parse({"causal": True}))[0] == method.implementation("chunked")


# costs, fast weights, bad input


@pytest.mark.parametrize(("name", "setting"), [*SETTINGS, *BESIDE], ids=str)
def test_cost_is_what_torch_counts(name: str, setting: dict[str, object]) -> None:
    method = attnbench.get(name)
    qkv = make(42, heads=4, kv_heads=2 if method.limits.gqa else 0)
    params = method.parse(setting)
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params)
    flops = method.cost(Shape.of(*qkv), params).flops
    assert counter.get_total_flops() == sum(flops.values()) - flops["pool"]
    width = {"performer": params.count(6) if name == "performer" else 0, "focused_linear": 6}.get(name, 12)
    assert flops["pool"] == 2 * qkv[1].shape[1] * 42 * width


@pytest.mark.parametrize(("name", "width"), [("performer", 10), ("cosformer", 12), ("focused_linear", 6), ("polaformer", 24)])
def test_fast_weights_do_not_grow_with_the_sequence(name: str, width: int) -> None:
    method = attnbench.get(name)
    for n in (10, 50):
        assert fastweights.width_per_query(method.experts(*make(n), method.params())) == width


@pytest.mark.parametrize(("name", "setting"), BESIDE, ids=str)
def test_what_stands_beside_the_attention(name: str, setting: dict[str, object]) -> None:
    method, qkv = attnbench.get(name), make(42)
    params = method.parse(setting)
    w = stirred(method, qkv, params)
    whole, every = method.reference(*qkv, params, weights=w), dict(w)
    bare = method.reference(qkv[0], qkv[1] + w.pop("position", 0), qkv[2], method.params(), weights=w)
    if "conv" in w:
        image = qkv[2].transpose(-1, -2).reshape(4, 5, 6, 7)
        maps = conv2d(image, w["conv"].unsqueeze(1), w["conv_bias"], padding=1, groups=5)
        bare = bare + maps.flatten(2).transpose(-1, -2).view_as(bare)
    if "gate" in w:
        gates = linear(qkv[0].transpose(1, 2).flatten(2), w["gate"], w["gate_bias"])
        close(whole, bare * gates.unflatten(2, (2, 5)).transpose(1, 2))
        return
    close(whole, bare)
    close(fastweights.apply(method.experts(*qkv, params, weights=every), qkv[0]), whole)
    rows = torch.tensor([41, 0, 17])
    close(method.reference(*qkv, params, rows, weights=every), whole[:, :, rows])


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("performer", {"features": -1}, "features = -1 is below its least value 0"),
        ("performer", {"eps": 0}, "eps = 0.0 is below its least value"),
        ("performer", {"kernel": "cosine"}, "unknown value of performer.kernel"),
        ("focused_linear", {"power": 0.5}, r"power = 0.5 is below its least value 1.0"),
        ("focused_linear", {"conv": 4}, "conv = 4 is even: give an odd side, or 0"),
        ("polaformer", {"conv": 3, "causal": True}, "conv reads later tokens: set conv = 0 where causal"),
        ("polaformer", {"conv": 3, "grid": "5x5"}, "grid = 5x5 holds 25 tokens, not N = 24"),
    ],
)
def test_parameters_that_make_no_sense(name: str, setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attnbench.get(name)(*make(24), **setting)


@pytest.mark.parametrize("name", ["focused_linear", "polaformer"])
def test_weights_of_a_head_need_a_key_head(name: str) -> None:
    with pytest.raises(UserError, match="needs as many key heads as query heads, not 2 for 4"):
        attnbench.get(name)(*make(24, heads=4, kv_heads=2))
    with pytest.raises(UserError, match="conv needs as many keys as queries, not 30 for 24: set conv = 0"):
        attnbench.get(name)(*make(24, keys=30), conv=3)


def test_causal_queries_have_their_keys() -> None:
    for name in NAMES:
        with pytest.raises(UserError, match="causal, needs as many keys as queries, not 30 for 24"):
            attnbench.get(f"{name}@chunked")(*make(24, keys=30), causal=True)
