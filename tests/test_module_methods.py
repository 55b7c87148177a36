"""Inner models that are trained while the sequence is read: TTT and ViT^3 against gradients that autograd takes token by token."""

from __future__ import annotations

import math

import pytest
import torch
from method_support import close
from torch.nn.functional import conv2d, gelu, layer_norm, silu
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.check import gate
from attnbench.errors import UserError
from attnbench.method import Shape

TTT = [{"inner": inner, "causal": causal} for inner in ("linear", "mlp") for causal in (False, True)]
VIT3 = [{}, {"conv": 3}, {"conv": 5, "lr": 0.5, "grid": "3x11"}]
CASES = [*(("ttt", {"minibatch": 5, **setting}) for setting in TTT), *(("vit3", setting) for setting in VIT3)]


def make(method, setting, n=33, kv_heads=2, *, dim=6, dtype=torch.float64, seed=0):
    """q, k, v, parameters, and learned parameters far from their initial values."""
    g = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(2, heads, n, dim, generator=g, dtype=torch.float64).to(dtype) for heads in (2, kv_heads, kv_heads)]
    params = method.parse(setting)
    drawn = method.initial(Shape.of(*qkv), params, torch.empty(0, dtype=torch.float64))
    return qkv, params, {name: (x + 0.3 * torch.randn(x.shape, generator=g, dtype=x.dtype)).to(dtype) for name, x in drawn.items()}


@pytest.fixture(params=["roomy", "tight"])
def budget(request, monkeypatch):
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 15, "cuda": 1 << 15})
        monkeypatch.setattr("attnbench.methods._ttt._SEGMENT", 2)
        monkeypatch.setattr("attnbench.methods.ttt._SEGMENT", 3)
        monkeypatch.setattr("attnbench.methods._products._SUMMED", 4)


def network(x, model):
    """The inner model of one head, from its list of weights and biases."""
    first, *rest = zip(model[::2], model[1::2], strict=True)
    x = x @ first[0] + first[1]
    for w, b in rest:
        x = gelu(x, approximate="tanh") @ w + b
    return x


def trained_token_by_token(qkv, params, own):
    """TTT in its primal form, one batch element and head at a time, every gradient by autograd."""
    batch, heads, n, d = qkv[0].shape
    out = torch.empty_like(qkv[0])
    names = [name for name in ("w1", "b1", "w2", "b2") if name in own]
    for b in range(batch):
        for h in range(heads):
            gamma, beta = own["norm_weight"][h, 0], own["norm_bias"][h, 0]
            model = [own[name][h] for name in names]
            q, (k, v) = qkv[0][b, h], (x[b, h * x.shape[1] // heads] for x in qkv[1:])
            logits = [own["rate_weight"][h] @ qkv[0][b, :, t].flatten() + own["rate_bias"][h] for t in range(n)]
            rate = [params.base_lr / d / (1 + math.exp(-float(x))) for x in logits]
            length = params.minibatch if params.causal else n
            for start in range(0, n, length):
                tokens = range(start, min(start + length, n))
                steps = []
                for t in tokens:
                    leaves = [x.detach().requires_grad_() for x in model]
                    guess = layer_norm(network(k[t : t + 1], leaves), (d,), gamma, beta, 1e-6)
                    loss = (guess - (v[t] - k[t])).square().sum() / 2
                    steps.append([rate[t] * g for g in torch.autograd.grad(loss, leaves)])
                for i, t in enumerate(tokens):
                    seen = steps[: i + 1] if params.causal else steps
                    factor = max(0.0, 1 / (i + 1) + float(own["token"][i])) if params.causal else 1 / n
                    current = [w - factor * sum(s[j] for s in seen) for j, w in enumerate(model)]
                    out[b, h, t] = q[t] + layer_norm(network(q[t : t + 1], current), (d,), gamma, beta, 1e-6)[0]
                model = current
    return out


@pytest.mark.parametrize(("n", "minibatch", "kv_heads"), [(33, 5, 2), (20, 16, 1), (7, 1, 2)])
@pytest.mark.parametrize("setting", TTT)
def test_ttt_is_its_primal_form(setting, n, minibatch, kv_heads):
    method = attnbench.get("ttt")
    qkv, params, own = make(method, {**setting, "minibatch": minibatch, "base_lr": 3.0}, n, kv_heads)
    want = trained_token_by_token(qkv, params, own)
    close(method.reference(*qkv, params, weights=own), want)
    close(attnbench.get("ttt@chunked")(*qkv, weights=own, **params.as_dict()), want)


@pytest.mark.parametrize(("n", "kv_heads", "grid"), [(35, 2, "5x7"), (12, 1, "auto"), (13, 2, "auto")])
@pytest.mark.parametrize("conv", [0, 3])
def test_vit3_is_one_step_of_autograd(conv, n, kv_heads, grid):
    method = attnbench.get("vit3")
    qkv, params, own = make(method, {"conv": conv, "grid": grid, "lr": 0.7}, n, kv_heads)
    q, k, v = (x.repeat_interleave(2 // x.shape[1], 1) for x in qkv)

    def step(model, loss, axes):
        moved = []
        for w, g in zip(model, torch.autograd.grad(loss.sum(), model), strict=True):
            moved.append((w - 0.7 * g / (g.norm(dim=axes, keepdim=True) + 1)).detach())
        return moved

    w1, w2 = (own[name].expand(2, -1, -1, -1).clone().requires_grad_() for name in ("w1", "w2"))
    loss = -((k @ w1) * silu(k @ w2) * v).sum(-1).mean(-1) / 3
    w1, w2 = step([w1, w2], loss, -2)
    want = (q @ w1) * silu(q @ w2)
    if conv:
        sides = params.sides(n)
        flat = [x.transpose(1, 2).flatten(2) @ own[f"conv_{name}"] for name, x in zip("qkv", qkv, strict=True)]
        for b in range(2):
            a, c, e = (x[b].T.reshape(1, -1, *sides) for x in flat)
            kernel = own["kernel"].unsqueeze(1).clone().requires_grad_()
            loss = -(conv2d(c, kernel, padding=1, groups=6) * e).mean((-2, -1)) / 3
            (kernel,) = step([kernel], loss, (-2, -1))
            mapped = conv2d(a, kernel, padding=1, groups=6)[0].flatten(1).T @ own["conv_out"]
            want[b] += mapped.view(n, 2, -1).transpose(0, 1)
    close(method.reference(*qkv, params, weights=own), want)
    close(attnbench.get("vit3@chunked")(*qkv, weights=own, **params.as_dict()), want)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("name", "setting"), CASES)
@pytest.mark.usefixtures("budget")
def test_chunks_and_segments_change_nothing(name, setting, kv_heads):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 33, kv_heads)
    results = []
    for run in (method.reference, method.function(method.implementation("chunked"))):
        leaves = [x.clone().requires_grad_() for x in (*qkv, *own.values())]
        out = run(*leaves[:3], params, weights=dict(zip(own, leaves[3:], strict=True)))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_the_last_token_of_one_mini_batch_reads_what_all_read_in_both_directions():
    method = attnbench.get("ttt")
    for inner in ("linear", "mlp"):
        qkv, params, own = make(method, {"inner": inner, "causal": True, "minibatch": 33})
        own["token"] = torch.zeros_like(own["token"])
        both = {name: x for name, x in own.items() if name != "token"}
        out = method(*qkv, inner=inner, weights=both)
        close(out[:, :, -1], method.reference(*qkv, params, weights=own)[:, :, -1])
        assert not torch.allclose(out[:, :, -2], method.reference(*qkv, params, weights=own)[:, :, -2])


@pytest.mark.parametrize(("name", "setting"), [*(("ttt", {**s, "base_lr": 0.0}) for s in TTT), ("vit3", {"lr": 0.0})])
def test_without_a_step_keys_and_values_are_not_read(name, setting):
    method = attnbench.get(name)
    (q, k, v), params, own = make(method, setting)
    out = method.reference(q, k, v, params, weights=own)
    close(method.reference(q, 2 * k, v + 1, params, weights=own), out)
    if name == "ttt":
        inner = [own[x].unsqueeze(0) for x in ("w1", "b1", "w2", "b2") if x in own]
        z = network(q, inner)
        close(out, q + layer_norm(z, (6,), None, None, 1e-6) * own["norm_weight"] + own["norm_bias"])
    else:
        close(out, (q @ own["w1"]) * silu(q @ own["w2"]))


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_order_matters_only_where_there_is_one(name, setting):
    method = attnbench.get(name)
    (q, k, v), params, own = make(method, setting)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(4))
    out = method.reference(q, k, v, params, weights=own)[:, :, order]
    permuted = method.reference(*(x[:, :, order] for x in (q, k, v)), params, weights=own)
    assert torch.allclose(permuted, out, rtol=1e-9, atol=1e-10) != (params.causal or bool(getattr(params, "conv", 0)))


@pytest.mark.parametrize("setting", [s for s in TTT if s["causal"]])
def test_a_token_reads_its_own_mini_batch_up_to_itself(setting):
    method = attnbench.get("ttt")
    (q, k, v), params, own = make(method, {**setting, "minibatch": 8})
    own["token"] = own["token"].abs()  # a factor that is clamped to 0 would hide the mini-batch
    before = method.reference(q, k, v, params, weights=own)
    for changed in (10, 15, 16):
        other = v.clone()
        other[:, :, changed] *= -2
        moved = (method.reference(q, k, other, params, weights=own) != before).any(-1).all(0).all(0)
        assert moved.nonzero()[:, 0].tolist() == list(range(changed, 33))


@pytest.mark.parametrize("moved", [0.0, 0.1])
@pytest.mark.parametrize(("name", "setting"), [*(("ttt", s) for s in TTT), ("vit3", {}), ("vit3", {"conv": 3})])
def test_half_precision_passes_the_gate(name, setting, moved):
    method = attnbench.get(name)
    g = torch.Generator().manual_seed(0)
    qkv = tuple(torch.randn(1, 2, 210, 32, generator=g).bfloat16() for _ in range(3))
    params = method.parse(setting)
    drawn = method.initial(Shape.of(*qkv), params, qkv[0])
    own = {a: (x.float() + moved * torch.randn(x.shape, generator=g)).bfloat16() for a, x in drawn.items()}
    result = gate(method, method.implementation("chunked"), params, qkv, own, backward=True)
    assert result.passed, {name: (e, result.bounds[name]) for name, e in result.errors.items() if e > result.bounds[name]}
    assert set(result.errors) >= {"out rms", "dq rms", "dv max", "dw1 rms"}


@pytest.mark.parametrize(
    ("name", "setting"), [("ttt", {"inner": "linear"}), ("ttt", {"inner": "mlp"}), ("ttt", {"causal": True, "minibatch": 1}), ("vit3", {})]
)
def test_costs_are_what_torch_counts(name, setting):
    """With mini-batches of one token no pair is masked out. Step sizes and inner models alone: no factor is a product of matrices."""
    method = attnbench.get(name)
    qkv, params, own = make(method, setting)
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params, weights=own)
    assert counter.get_total_flops() == method.cost(Shape.of(*qkv), params).total()


def test_costs_of_mini_batches_count_pairs_and_those_of_the_convolution_its_taps():
    ttt, vit3, shape = attnbench.get("ttt"), attnbench.get("vit3"), Shape(2, 3, 37, 8)
    pairs = sum(s <= t for t in range(37) for s in range(t - t % 5, 37))
    for inner, each in (("linear", 4), ("mlp", 20)):
        causal, single = (ttt.cost(shape, ttt.parse({"inner": inner, "causal": True, "minibatch": b})).flops["attend"] for b in (5, 1))
        assert causal - single == 2 * 3 * each * 8 * (pairs - 37)
    one, two = (vit3.cost(shape, vit3.parse({"conv": c})).flops for c in (0, 3))
    assert two["state"] + two["attend"] - one["state"] - one["attend"] == 36 * 2 * 37 * 8
    assert two["project"] == 2 * 2 * 37 * 8 * (4 * 3 * 8)


@pytest.mark.parametrize(("name", "setting"), [*(("ttt", {"minibatch": 16, **s}) for s in TTT), ("vit3", {})])
def test_backward_keeps_inputs_and_states_alone(name, setting, monkeypatch):
    """What autograd saves: at most a few tensors of the size of q, whatever the chunks make."""
    monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    method, sizes = attnbench.get(f"{name}@chunked"), {}
    qkv = [torch.randn(1, 2, 2048, 16).requires_grad_() for _ in range(3)]

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = method(*qkv, **setting)
    assert sum(sizes.values()) < 5 * qkv[0].numel() * 4
    out.sum().backward()


def test_bad_input_is_one_line_that_says_what_to_do():
    q = torch.randn(1, 2, 12, 4)
    cases = [
        ("ttt", {"minibatch": 0}, "minibatch = 0 is below its least value 1"),
        ("ttt", {"inner": "conv"}, "unknown value of ttt.inner 'conv'"),
        ("vit3", {"conv": 2}, "conv = 2 is even: give an odd kernel size, or 0"),
        ("vit3", {"grid": "5x5"}, "grid = 5x5 holds 25 tokens, not N = 12"),
        ("vit3", {"causal": True}, "no causal form: the one gradient step is taken on all tokens"),
        ("ttt@triton", {}, "runs on cuda only"),
    ]
    for name, setting, message in cases:
        with pytest.raises(UserError, match=message):
            attnbench.get(name)(q, q, q, **setting)
    with pytest.raises(UserError, match="needs as many keys as queries"):
        attnbench.get("vit3")(q, q[:, :, :6], q[:, :, :6], conv=3)
    assert attnbench.get("vit3")(q, q[:, :, :6], q[:, :, :6]).shape == q.shape


def test_what_the_fused_kernel_takes_is_said_before_it_runs():
    method, shape = attnbench.get("ttt"), Shape(1, 2, 64, 64)
    fused = method.implementation("triton")

    def reasons(**setting):
        return " ".join(fused.limits.reasons(shape, torch.bfloat16, "cuda", method.parse(setting), backward=True))

    assert reasons(causal=True) == ""
    assert "no recurrence to fuse" in reasons()
    assert "two layers" in reasons(causal=True, inner="mlp")
    assert "up to 64 tokens, not 65" in reasons(causal=True, minibatch=65)
