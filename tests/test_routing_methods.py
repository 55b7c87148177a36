"""Top-k, sliding-window, linear and block attention: definitions, fast weights, implementations, supports and costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from method_support import close, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench import fastweights
from attnbench.eager import causal_mask
from attnbench.method import Shape

SETTINGS = {
    "topk": [{"topk": 1}, {"topk": 7}],
    "sliding_window": [{"window": 1}, {"window": 6}, {"window": 9}],
    "linear": [{}],
    "moba": [{"block": 16, "topk": 1}, {"block": 16, "topk": 3}, {"block": 9, "topk": 2}],
}
CASES = [(name, setting, causal) for name, settings in SETTINGS.items() for setting in settings for causal in (False, True)]
SIZES = [(1, 4), (63, 2), (100, 4)]
PRACTICAL = {"topk": "chunked", "sliding_window": "chunked", "linear": "chunked", "moba": "varlen"}


def make(n, kv_heads=4, *, heads=4, dim=8, dim_v=5, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, n, dim), (2, kv_heads, n, dim), (2, kv_heads, n, dim_v)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def fitted(method, setting, causal, qkv):
    return method.parse({**setting, "causal": causal}).fitted(Shape.of(*qkv))


def gradients(function, qkv, grad):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = function(*leaves)
    return out, torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.fixture(params=["roomy", "tight"])
def budget(request, monkeypatch):
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 13, "cuda": 1 << 13})


@pytest.mark.parametrize(("n", "kv_heads"), SIZES)
@pytest.mark.parametrize(("name", "setting", "causal"), CASES)
def test_fast_weights_are_the_definition(name, setting, causal, n, kv_heads):
    method, qkv = attnbench.get(name), make(n, kv_heads)
    params = fitted(method, setting, causal, qkv)
    close(fastweights.apply(method.experts(*qkv, params), qkv[0]), method.reference(*qkv, params))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_rows_of_the_whole(name, causal):
    method, qkv, rows = attnbench.get(name), make(63, 2), torch.tensor([62, 0, 17])
    params = fitted(method, SETTINGS[name][-1], causal, qkv)
    close(method.reference(*qkv, params, rows), method.reference(*qkv, params)[:, :, rows])


@pytest.mark.parametrize(("n", "kv_heads"), [*SIZES, (300, 2)])
@pytest.mark.parametrize(("name", "setting", "causal"), CASES)
@pytest.mark.usefixtures("budget")
def test_practical_implementation_is_the_definition(name, setting, causal, n, kv_heads):
    method, qkv = attnbench.get(name), make(n, kv_heads)
    params, grad = fitted(method, setting, causal, qkv), make(n, dim=5, seed=1)[0]
    function = method.function(method.implementation(PRACTICAL[name]))
    actual, actual_grads = gradients(lambda *x: function(*x, params), qkv, grad)
    expected, expected_grads = gradients(lambda *x: method.reference(*x, params), qkv, grad)
    close(actual, expected)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["topk", "linear"])
@pytest.mark.usefixtures("budget")
def test_cross_attention(name):
    method, (q, _, _), (_, k, v) = attnbench.get(name), make(40), make(70)
    close(method(q, k, v, **SETTINGS[name][-1]), method.reference(q, k, v, method.parse(SETTINGS[name][-1])))


@pytest.mark.parametrize("n", [1, 33, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["topk", "sliding_window", "moba"])
def test_dense_limit_is_softmax(name, causal, n):
    setting = {"topk": {"topk": n}, "sliding_window": {"window": 2 * n - 1}, "moba": {"block": 16, "topk": 9}}[name]
    qkv = make(n, 2)
    expected = attnbench.get("softmax@eager")(*qkv, causal=causal)
    close(attnbench.get(f"{name}@eager")(*qkv, causal=causal, **setting), expected)
    close(attnbench.get(f"{name}@{PRACTICAL[name]}")(*qkv, causal=causal, **setting), expected)


def read_by(weights, rows, keys):
    """Tokens `[B, H, R, M]` that queries read, from the fast weights."""
    bank = weights.banks[0]
    tokens = bank.tokens(rows).expand(-1, -1, len(rows), -1)
    read = torch.zeros(*tokens.shape[:3], keys + 1, dtype=torch.bool).scatter_(-1, tokens.masked_fill(tokens < 0, keys), True)[..., :-1]
    return read & causal_mask(rows, keys) if bank.causal else read


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "setting"), [("topk", {"topk": 5}), ("sliding_window", {"window": 8}), ("moba", {"block": 9, "topk": 2})])
def test_values_outside_the_support_do_not_matter(name, setting, causal):
    q, k, v = make(50)
    method, row = attnbench.get(f"{name}@{PRACTICAL[name]}"), 31
    weights = method.experts(q, k, v, method.parse({**setting, "causal": causal}))
    outside = ~read_by(weights, torch.tensor([row]), 50)[:, :, 0]
    assert 0 < outside.sum() < outside.numel()
    other = torch.where(outside.unsqueeze(-1), v + 3.0, v)
    before, after = (method(q, k, x, causal=causal, **setting)[:, :, row] for x in (v, other))
    close(after, before)
    inside = torch.where(outside.unsqueeze(-1), v, v + 3.0)
    close(method(q, k, inside, causal=causal, **setting)[:, :, row], before + 3.0)


@pytest.mark.parametrize("implementation", ["eager", "practical"])
@pytest.mark.parametrize("name", SETTINGS)
def test_causal_output_ignores_the_future(name, implementation):
    method = attnbench.get(f"{name}@{'eager' if implementation == 'eager' else PRACTICAL[name]}")
    q, k, v = make(60)
    setting = SETTINGS[name][-1]
    before = method(q, k, v, causal=True, **setting)
    later = [torch.cat([x[:, :, :23], 5 * torch.randn_like(x[:, :, 23:])], 2) for x in (q, k, v)]
    after = method(*later, causal=True, **setting)
    close(after[:, :, :23], before[:, :, :23])
    assert not torch.allclose(after[:, :, 23:], before[:, :, 23:])


def test_window_widths_are_total_widths():
    method, n, rows = attnbench.get("sliding_window"), 30, torch.arange(30)
    for window, causal, low, high in [(5, False, -2, 2), (6, False, -3, 2), (6, True, -5, 0), (1, False, 0, 0)]:
        weights = method.experts(*make(n), method.parse({"window": window, "causal": causal}))
        expected = (rows >= rows[:, None] + low) & (rows <= rows[:, None] + high)
        assert read_by(weights, rows, n)[0, 0].equal(expected)


def test_topk_reads_the_largest_scores():
    q, k, v = make(40)
    method = attnbench.get("topk")
    read = read_by(method.experts(q, k, v, method.parse({"topk": 6})), torch.arange(40), 40)
    scores = q @ k.transpose(-1, -2)
    assert (read.sum(-1) == 6).all()
    assert (scores.masked_fill(~read, torch.inf).amin(-1) > scores.masked_fill(read, -torch.inf).amax(-1)).all()


def test_moba_against_a_loop_over_queries():
    q, k, v = (x[:1, :1] for x in make(41, dim_v=8))
    for causal in (False, True):
        out = attnbench.get("moba@eager")(q, k, v, block=9, topk=2, causal=causal)[0, 0]
        starts = range(0, 41, 9)
        for i in range(41):
            gate = {s: float(q[0, 0, i] @ k[0, 0, s : s + 9].mean(0)) for s in starts}
            if causal:
                gate = {s: (float("inf") if s + 9 > i else g) for s, g in gate.items() if s <= i}
            best = sorted(gate, key=gate.get, reverse=True)[:2]
            tokens = [j for s in best for j in range(s, min(s + 9, 41)) if not causal or j <= i]
            weights = (q[0, 0, i] @ k[0, 0, tokens].T * 8**-0.5).softmax(-1)
            close(out[i], weights @ v[0, 0, tokens])


def test_linear_maps_constant_values_to_themselves():
    q, k, v = make(300)
    for causal in (False, True):
        out = attnbench.get("linear@chunked")(q, k, torch.ones_like(v), causal=causal)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


def test_linear_fast_weights_do_not_grow_with_the_sequence():
    method = attnbench.get("linear")
    for n in (10, 50):
        assert fastweights.width_per_query(method.experts(*make(n), method.parse({}))) == 8


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "setting", "n"),
    [
        *[("topk", {"topk": t}, 37) for t in (1, 5, 37)],
        *[("sliding_window", {"window": w}, 37) for w in (1, 6, 9, 73, 200)],
        *[("moba", {"block": 8, "topk": t}, 40) for t in (1, 2, 9)],
    ],
)
def test_cost_counts_the_pairs_read(name, setting, n, causal, kv_heads):
    qkv, method = make(n, kv_heads), attnbench.get(name)
    params = method.parse({**setting, "causal": causal})
    pairs = int(read_by(method.experts(*qkv, params), torch.arange(n), n).sum())
    flops = method.cost(Shape.of(*qkv), params).flops
    per_pair = {"topk": {"attend": 2 * (8 + 5)}}.get(name, {"score": 2 * 8, "attend": 2 * 5})
    for stage, each in per_pair.items():
        assert flops[stage] == each * pairs


def test_cost_of_a_short_last_block():
    for n, block, top in [(41, 9, 2), (41, 9, 5), (5, 9, 1), (41, 9, 9)]:
        qkv, method = make(n), attnbench.get("moba")
        for causal in (False, True):
            params = method.parse({"block": block, "topk": top, "causal": causal})
            pairs = int(read_by(method.experts(*qkv, params), torch.arange(n), n).sum())
            counted = method.cost(Shape.of(*qkv), params).flops["attend"] // (2 * 5)
            assert counted == pairs if causal or top * block >= n else pairs <= counted < 1.3 * pairs


def test_cost_of_choosing():
    shape = Shape(2, 4, 40, 8)
    topk, moba = attnbench.get("topk"), attnbench.get("moba")
    for causal, pairs, blocks in ((False, 40 * 40, 40 * 5), (True, 40 * 41 // 2, 8 * (0 + 1 + 2 + 3 + 4))):
        chosen = topk.cost(shape, topk.parse({"topk": 3, "causal": causal}))
        assert chosen.flops["score"] == 2 * 8 * pairs * 8
        assert chosen.total("forward+backward") - chosen.total() == 5 * chosen.flops["attend"] // 2
        assert moba.cost(shape, moba.parse({"block": 8, "causal": causal})).flops["route"] == 2 * 8 * blocks * 8


def test_cost_of_linear_is_what_torch_counts():
    qkv, method = make(63, 2), attnbench.get("linear")
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, method.parse({}))
    flops = method.cost(Shape.of(*qkv), method.parse({})).flops
    assert counter.get_total_flops() == sum(flops.values()) - flops["pool"]
    assert flops["pool"] == 2 * 2 * 63 * 8


@pytest.mark.parametrize("name", SETTINGS)
def test_backward_keeps_no_pairs(name):
    """What autograd saves grows with N, not with N x N."""
    method = attnbench.get(f"{name}@{PRACTICAL[name]}")
    setting = {"topk": {"topk": 2}, "sliding_window": {"window": 4}, "moba": {"block": 64, "topk": 2}}.get(name, {})
    saved = [saved_bytes(partial(method, causal=True, **setting), make(n)) for n in (256, 512)]
    assert saved[1] < 2.2 * saved[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "label", ["topk@chunked", "sliding_window@flash", "sliding_window@chunked", "linear@chunked", "moba@varlen", "flash_attn@fa4",
              "flash_attn@fa3", "flash_attn@fa2", "xformers@memory_efficient"],
)  # fmt: skip
def test_half_precision_on_a_gpu(label, causal, kv_heads):
    method, qkv = attnbench.get(label), make(300, kv_heads, dim=64, dim_v=64, dtype=torch.bfloat16, device="cuda")
    implementation = method.implementation(method.pinned)
    if missing := implementation.missing():
        pytest.skip(missing)
    params, grad = fitted(method, SETTINGS.get(method.name, [{}])[-1], causal, qkv), torch.randn_like(qkv[0])
    exact, exact_grads = gradients(lambda *x: method.reference(*x, params), [x.double() for x in qkv], grad)
    eager, eager_grads = gradients(lambda *x: method.reference(*x, params), qkv, grad)
    actual, actual_grads = gradients(lambda *x: method.run(implementation, *x, params), qkv, grad)
    if implementation.witness:
        assert attnbench.method.resolve(implementation.witness)(*qkv, params)
    for a, e, x, factor in zip((actual, *actual_grads), (eager, *eager_grads), (exact, *exact_grads), (2, 3, 3, 3), strict=True):
        unit = torch.finfo(a.dtype).eps * x.square().mean().sqrt()
        assert (a.double() - x).square().mean().sqrt() <= factor * (e.double() - x).square().mean().sqrt() + unit
