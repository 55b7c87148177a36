"""The fused MiTA kernels: in Triton's interpreter where there is no GPU, else on the GPU, against float64 autograd."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_support import DEVICE, interpreter, replayed  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
from attnbench.kernels.mita import _forward as launches
from attnbench.kernels.mita import mita_attention, supported
from attnbench.kernels.mita._operator import mita_forward

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(b=1, h=1, n=60, d=32, *, hk=None, dv=None, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = ((h, d), (hk or h, d), (hk or h, dv or d))
    return tuple(torch.randn(b, heads, n, dim).to(DEVICE, dtype).requires_grad_() for heads, dim in shapes)


def pooled(q, grid):
    """Adaptive average as torch defines it."""
    prefix, height, width, rows, columns = grid
    tokens = q[:, :, prefix : prefix + height * width].unflatten(2, (height, width)).movedim(-1, 2).flatten(0, 1)
    return torch.nn.functional.adaptive_avg_pool2d(tokens, (rows, columns)).flatten(2).mT.unflatten(0, q.shape[:2])


def chosen(index, order, start, s):
    """Expert `[B, H, S, N]` of every pair, from the permutation; fails where it is none."""
    b, h, pairs = order.shape
    expert = torch.full((b, h, pairs), -1, device=order.device)
    for i in range(b):
        for j in range(h):
            ends = start[i, j].tolist()
            for m in range(len(ends) - 1):
                expert[i, j, order[i, j, ends[m] : ends[m + 1]].long()] = m
    assert (expert >= 0).all()
    return expert.unflatten(2, (s, -1))


def oracle(q, k, v, r, selection, *, shared=True, routed=True):
    """The definition over a frozen selection; a key in two chosen experts counts twice."""
    (index, expert), groups = selection, q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale, logits, m = q.shape[-1] ** -0.5, [], r.shape[2]
    if shared:
        logits.append(q @ r.mT / q.shape[-1])
    if routed:
        member = torch.zeros(*q.shape[:2], m, k.shape[2], dtype=q.dtype, device=q.device).scatter_(3, index.long(), 1.0)
        times = sum(member.gather(2, e[..., None].expand(-1, -1, -1, k.shape[2])) for e in expert.unbind(2))
        logits.append(scale * (q @ k.mT) + times.log())
    weights = torch.cat(logits, -1).softmax(-1)
    out = weights[..., :m] @ ((scale * (r @ k.mT)).softmax(-1) @ v) if shared else 0
    return out + weights[..., m if shared else 0 :] @ v if routed else out


def error(got, want):
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm().clamp_min(1e-9))


# most tests share the sizes of `inputs`, 4 landmarks and 7 keys, in float32 or as here: what is compiled once on a GPU serves them all
BF16 = {"dtype": torch.bfloat16, "h": 2, "d": 64}
GRID = [0, 1, 60, 1, 4]
CASES = {
    "fp32": {},
    "bf16": BF16,
    "fp16 grid, one token before it, grouped heads": {"dtype": torch.float16, "n": 50, "h": 2, "hk": 1, "grid": [1, 7, 7, 2, 3]},
    "three experts, Dv < D": {"h": 2, "d": 96, "dv": 32, "s": 3, "grid": [0, 1, 60, 1, 5]},
    "more landmarks than tokens": {"n": 3, "k": 8, "grid": [0, 1, 3, 1, 5], "s": 4},
    "one token": {"n": 1, "k": 1, "grid": [0, 1, 1, 1, 1]},
    "landmarks over several tiles": {"n": 40, "k": 3, "grid": [0, 1, 40, 1, 34]},
    "keys over several tiles": {"n": 90, "k": 70, "grid": [0, 1, 90, 1, 2]},
    "routed experts alone": {"shared": False},
    "landmarks alone": {"routed": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_selection_and_gradients_are_the_definitions(case):
    options = {"k": 7, "s": 1, "shared": True, "routed": True, **case}
    top, s, shared, routed = (options.pop(name) for name in ("k", "s", "shared", "routed"))
    grid = options.pop("grid", None)
    q, k, v = inputs(**options)
    n, d = q.shape[2:]
    grid = grid or [0, 1, n, 1, 4]
    out, _, r, _, _, index, order, start, _ = mita_forward(q, k, v, None, top, s, shared, routed, d**-0.5, 1 / d, grid)
    s, limit = min(s, r.shape[2]), TOLERANCE[q.dtype]
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), grad)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    r64 = pooled(q64, grid)
    assert error(r, r64) < limit
    expert = None
    if routed:
        expert = chosen(index, order, start, s)
        probe = r.detach().double() @ k64.detach().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        best = probe.topk(min(top, n), -1).values
        assert torch.allclose(probe.gather(3, index.long()).sort(-1, descending=True).values, best, atol=1e-4)
        gate = q64.detach() @ r.detach().double().mT
        assert torch.allclose(gate.gather(3, expert.transpose(2, 3)), gate.topk(s, -1).values, atol=1e-4)
    want = oracle(q64, k64, v64, r64, (index, expert), shared=shared, routed=routed)
    assert error(out, want) < limit
    for a, b in zip(got, torch.autograd.grad(want, (q64, k64, v64), grad.double()), strict=True):
        assert a.isfinite().all()
        assert float((a.double() - b).norm()) < limit * max(float(b.norm()), 1.0)


@pytest.mark.parametrize("shared", [True, False])
def test_given_landmarks_learn_through_the_shared_expert_alone(shared):
    q, k, v = inputs()
    r = torch.randn(1, 1, 4, 32, device=DEVICE, requires_grad=True)
    out, _, _, _, _, index, order, start, _ = mita_forward(q, k, v, r, 7, 1, shared, True, 32**-0.5, 1 / 32, [])
    (dr,) = torch.autograd.grad(out, r, torch.ones_like(out))
    if not shared:
        assert (dr == 0).all()
        return
    q64, k64, v64, r64 = (x.detach().double().requires_grad_() for x in (q, k, v, r))
    want = oracle(q64, k64, v64, r64, (index, chosen(index, order, start, 1)))
    assert error(out, want) < 2e-5
    assert error(dr, torch.autograd.grad(want, r64, torch.ones_like(want))[0]) < 2e-5


def planned(monkeypatch, **choices):
    """Plans take these choices."""
    make = launches.plan
    monkeypatch.setattr(launches, "plan", lambda *args: dataclasses.replace(make(*args), **choices))


@pytest.mark.parametrize(("chunk", "group"), [(4, 1), (8, 2), (4, 4), (16, 1)])
def test_every_level_of_the_selection_is_exact(monkeypatch, chunk, group):
    planned(monkeypatch, chunk=chunk, group=group)
    q, k, v = inputs(n=333, seed=chunk + group)
    _, _, r, _, _, index, *_ = mita_forward(q, k, v, None, 9, 1, True, True, 0.2, 0.1, [0, 1, 333, 1, 2])
    assert torch.equal(index.long(), (r @ k.mT).topk(9, -1).indices.sort(-1).values)


@pytest.mark.parametrize("choices", [{"run": 3}, {"attend_ahead": True}, {"attend_ahead": True, "run": 2}], ids=str)
def test_whatever_attention_reads_first_it_gives_the_same(monkeypatch, choices):
    q, k, v = inputs(n=200)
    setting = (7, 1, True, True, 0.2, 0.1, [0, 1, 200, 1, 4])
    want = mita_forward(q, k, v, None, *setting)[0]
    planned(monkeypatch, **choices)
    assert error(mita_forward(q, k, v, None, *setting)[0], want) < TOLERANCE[q.dtype]


def test_strided_inputs_equal_contiguous_ones():
    x = torch.randn(1, 60, 3, 1, 32, device=DEVICE)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    assert torch.equal(mita_attention(q, k, v, 4, 7), mita_attention(q.contiguous(), k.contiguous(), v.contiguous(), 4, 7))


def test_same_input_same_bits():
    q, k, v = inputs(**BF16)
    runs = [
        torch.autograd.grad(mita_attention(q, k, v, 4, 7).float().square().sum(), (q, k, v)) for _ in range(3 if DEVICE == "cuda" else 2)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", ["all to one", "all equal", "zeros"])
def test_adversarial_routing(kind):
    q, k, v = (x.detach() for x in inputs())
    r = torch.randn(1, 1, 4, 32, device=DEVICE)
    if kind == "all to one":
        q, r = q.abs(), r.index_fill(2, torch.tensor([3], device=DEVICE), 9.0)
    else:
        fill = torch.ones_like if kind == "all equal" else torch.zeros_like
        q, k, r = fill(q), fill(k), fill(r)
    out, _, _, _, _, index, order, start, _ = mita_forward(q, k, v, r, 7, 1, True, True, 32**-0.5, 1 / 32, [])
    assert start[0, 0].diff().max() == 60
    want = oracle(*(x.double() for x in (q, k, v, r)), (index, chosen(index, order, start, 1)))
    assert error(out, want) < 2e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_reaches_only_its_readers(bad):
    q, k, v = (x.detach() for x in inputs())
    r = torch.randn(1, 1, 4, 32, device=DEVICE)
    setting = (7, 1, True, True, 0.2, 0.1, [])
    spoiled = q.index_fill(2, torch.tensor([7], device=DEVICE), bad)
    good, other = mita_forward(q, k, v, r, *setting)[0], mita_forward(spoiled, k, v, r, *setting)[0]
    keep = torch.arange(60, device=DEVICE) != 7
    assert torch.equal(good[:, :, keep], other[:, :, keep])
    read = mita_forward(q, k, v, r, *setting)[5][0, 0, 0, 3]
    spoiled = v.index_fill(2, read.long(), bad)
    out, _, _, _, _, index, order, start, _ = mita_forward(q, k, spoiled, r, 7, 1, False, True, 0.2, 0.1, [])
    readers = (index == read).any(-1).gather(2, chosen(index, order, start, 1)[:, :, 0])
    assert readers.any()
    assert torch.equal(~out.isfinite().all(-1), readers)


def test_compile_checkpoint_and_autocast():
    from torch.utils.checkpoint import checkpoint

    q, k, v = inputs()

    def layer(q, k, v):
        return mita_attention(q * 1.0, k, v, 4, 7).sin()

    want = layer(q, k, v)
    grads = torch.autograd.grad(want.sum(), (q, k, v))
    for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), lambda *x: checkpoint(layer, *x, use_reentrant=False)):
        out = run(q, k, v)
        assert torch.equal(out, want)
        for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), grads, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    q, k, v = inputs(**{**BF16, "dtype": torch.float32})
    with torch.autocast(DEVICE, torch.bfloat16):
        out = mita_attention(q, k, v, 4, 7)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


def test_the_operator_is_well_formed():
    q, k, v = inputs()
    torch.library.opcheck(mita_forward, (q, k, v, None, 7, 1, True, True, 0.2, 0.1, GRID))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_repeated_launches_are_those_of_triton():
    """Kernel, grid and arguments, for what Triton may specialise on; a script, since here Triton interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_launches.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = {name: (int(forward), int(both)) for forward, both, name in (line.split(" ", 2) for line in done.stdout.splitlines())}
    assert counts["plain"] == (6, 15)
    assert counts["three experts"] == (7, 17)
    assert all(forward <= 12 and both <= 25 for forward, both in counts.values())


def test_unsupported_calls_say_why():
    q, k, v = inputs()
    assert supported(q, k, v, 5, 7) == []
    assert "landmarks" in supported(q, k, v, 257, 7)[0]
    assert "keys an expert" in supported(q, k, v, 5, 300)[0]
    assert "experts a query" in supported(q, k, v, 5, 7, 5)[0]
    assert "float64" in supported(q.double(), k.double(), v.double(), 5, 7)[0]
    assert "head dimensions" in supported(q[..., :16], k[..., :16], v, 5, 7)[0]
    with pytest.raises(ValueError, match="neither"):
        mita_attention(q, k, v, 5, 7, shared=False, routed=False)
    with pytest.raises(ValueError, match="does not fit"):
        mita_attention(q, k, v, (2, 2), 7, grid=(8, 8))


@pytest.mark.parametrize("options", [{}, {"routed": False}, {"shared": False}], ids=["both", "landmarks", "experts"])
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter repeats no launches")
def test_repeated_calls_give_what_the_operator_gives(options):
    from attnbench.kernels.mita import _eager

    _eager.forget()
    flags = [options.get(name, True) for name in ("shared", "routed")]
    for seed in range(3):
        q, k, v = inputs(seed=seed)
        want = mita_forward(q, k, v, None, 7, 1, *flags, 32**-0.5, 1 / 32, GRID)[0]
        got = mita_attention(q, k, v, 4, 7, **options)
        assert type(got.grad_fn).__name__.startswith("_Attention") == (seed > 0), "not repeated"
        assert torch.equal(got, want)
        assert torch.equal(mita_attention(q.detach(), k.detach(), v.detach(), 4, 7, **options), want)
        grads = [torch.autograd.grad(x, (q, k, v), torch.ones_like(x)) for x in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("n", [4096, 65536])
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_cuda_graph_replays_without_synchronising(n):
    q, k, v = inputs(h=4, n=n, d=64, dtype=torch.bfloat16)
    grad = torch.randn_like(q)

    def step():
        out = mita_attention(q, k, v, 64, 64)
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    want, got = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_million_tokens_pass_the_gate():
    import attnbench
    from attnbench import check
    from attnbench.inputs import draw
    from attnbench.method import Shape

    method = attnbench.get("mita@triton")
    params = method.parse({"landmarks": 64, "topk": 64})
    tensors = draw("randn", Shape(1, 1, 1 << 20, 64), 0, torch.bfloat16, DEVICE)
    verdict = check.gate(method, method.implementation("triton"), params, tensors, backward=True, rows=64)
    assert verdict.passed, (verdict.errors, verdict.bounds)
    assert verdict.deterministic
