"""The kernels that select and gather: in Triton's interpreter where there is no GPU, else on the GPU, against float64 autograd."""

import pytest
import torch
from triton_support import DEVICE, interpreter, replayed  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
import attnbench
from attnbench.kernels import gather, topk
from attnbench.kernels.gather import gather_attention, gather_forward
from attnbench.kernels.topk import select_indexed, select_topk, topk_select
from attnbench.method import Shape

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def first_best(scores, count, causal):
    """The keys with the largest scores, the earlier of equal ones, ascending, then -1."""
    n, m = scores.shape[-2:]
    seen = torch.arange(m, device=DEVICE) <= (torch.arange(n, device=DEVICE)[:, None] if causal else m)
    best = scores.masked_fill(~seen, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., : min(count, m)]
    best = best.masked_fill(~seen.expand_as(scores).gather(-1, best), m).sort(-1).values
    return best.masked_fill(best == m, -1)


def grouped(q, k):
    return q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT


CASES = {  # heads, key heads, N, M, D, K, causal, dtype
    "one key": (1, 1, 1, 1, 32, 1, False, torch.float32),
    "fewer keys than K": (1, 1, 3, 9, 32, 20, False, torch.float32),
    "fewer blocks than K": (2, 1, 9, 150, 32, 12, False, torch.float32),
    "more blocks than K, more chunks than K": (1, 1, 5, 700, 64, 3, False, torch.float32),
    "a single one of many": (1, 1, 4, 520, 96, 1, False, torch.float32),
    "bfloat16": (1, 1, 5, 400, 64, 10, False, torch.bfloat16),
    "float16, wide heads": (1, 1, 4, 200, 128, 7, False, torch.float16),
    "causal, grouped heads": (2, 1, 20, 20, 32, 5, True, torch.float32),
    "causal, more visible blocks than K": (1, 1, 200, 200, 32, 2, True, torch.float32),
    "causal, more keys than queries": (1, 1, 7, 90, 32, 4, True, torch.float32),
    "many keys a query": (1, 1, 2, 600, 32, 256, False, torch.float32),
    "an odd head dimension": (1, 1, 6, 100, 20, 6, False, torch.float32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_selection_is_exact(case):
    h, hk, n, m, d, count, causal, dtype = case
    q, k = make((1, h, n, d), (1, hk, m, d), dtype=dtype)
    assert torch.equal(select_topk(q, k, count, causal=causal).long(), first_best(grouped(q, k), count, causal))


@pytest.mark.parametrize("slab", [1, 1 << 17])
def test_queries_in_slabs_and_keys_in_splits(monkeypatch, slab):
    monkeypatch.setattr(topk, "SLAB_BYTES", slab)
    monkeypatch.setattr(topk, "_processors", lambda device: 2)
    q, k = make((1, 1, 70, 32), (1, 1, 70, 32))
    assert torch.equal(select_topk(q, k, 2, causal=True).long(), first_best(grouped(q, k), 2, True))


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_every_size_of_chunk_is_exact(monkeypatch, chunk):
    monkeypatch.setattr(topk, "_chunk", lambda keys, count: chunk)
    q, k = make((1, 1, 4, 32), (1, 1, 333, 32), seed=chunk)
    assert torch.equal(select_topk(q, k, 5).long(), first_best(grouped(q, k), 5, False))


@pytest.mark.parametrize(("n", "m", "causal"), [(5, 300, False), (30, 30, True)])
def test_the_earlier_of_equal_keys_is_taken(n, m, causal):
    q, k = make((1, 1, n, 32), (1, 1, 10, 32))
    k = k.repeat(1, 1, m // 10, 1)  # every key over and over, ten apart: over chunks and over blocks
    assert torch.equal(select_topk(q, k, 14, causal=causal).long(), first_best(grouped(q, k), 14, causal))
    for count in (9, 2):  # of few keys blocks and chunks are searched for too
        found = select_topk(q, torch.zeros_like(k), count, causal=causal)
        assert torch.equal(found.long(), first_best(torch.zeros(1, 1, n, m, device=DEVICE), count, causal))


def test_keys_in_one_place_and_keys_far_apart():
    q = torch.ones(1, 1, 1, 32, device=DEVICE)
    for places in ([*range(200, 230)], [*range(0, 690, 23)]):
        k = torch.zeros(1, 1, 700, 32, device=DEVICE)
        k[0, 0, places] = torch.arange(1.0, 31.0, device=DEVICE)[:, None]
        assert select_topk(q, k, 30)[0, 0, 0].tolist() == places
        assert set(select_topk(q, k, 20)[0, 0, 0].tolist()) == set(places[10:])


def test_a_bad_score_is_the_smallest_and_reaches_nobody_else():
    q, k = make((1, 1, 6, 32), (1, 1, 100, 32))
    want = select_topk(q, k, 8)
    spoiled = q.index_fill(2, torch.tensor([3], device=DEVICE), float("nan"))
    keep = torch.arange(6, device=DEVICE) != 3
    got = select_topk(spoiled, k, 8)
    assert torch.equal(got[:, :, keep], want[:, :, keep])
    assert ((got >= 0) & (got < 100)).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("j", "d"), [(1, 32), (3, 20)])
def test_indexed_scores_are_summed_over_heads_and_tie_at_zero(j, d, causal):
    q, gate, k = make((1, j, 12, d), (1, j, 12), (1, 1, 90, d))
    scores = (gate.double()[..., None] * (q.double() @ k.double().mT).relu()).sum(1, keepdim=True)
    assert (scores == 0).double().mean() > 0.05
    assert torch.equal(select_indexed(q, gate, k, 15, causal=causal).long(), first_best(scores, 15, causal))


def oracle(q, k, v, index):
    """The definition over given lists."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    member = torch.zeros(*q.shape[:3], k.shape[2] + 1, dtype=torch.bool, device=q.device)
    lists = index.long().expand(*q.shape[:2], -1, -1)
    mask = member.scatter_(3, lists.masked_fill(lists < 0, k.shape[2]), True)[..., :-1]
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask, 0.0) @ v


GATHERS = {  # heads, key heads, N, M, D, Dv, K, lists, dtype
    "fp32": (2, 2, 9, 50, 32, 32, 7, 2, torch.float32),
    "bf16, several tiles of keys": (1, 1, 5, 120, 64, 64, 100, 1, torch.bfloat16),
    "fp16, grouped heads, one list for all": (4, 2, 7, 40, 32, 32, 12, 1, torch.float16),
    "Dv > D": (1, 1, 6, 30, 20, 96, 5, 1, torch.float32),
    "wide heads": (1, 1, 4, 40, 128, 32, 20, 1, torch.float32),
    "one key": (1, 1, 1, 1, 32, 32, 1, 1, torch.float32),
}


@pytest.mark.parametrize("case", GATHERS.values(), ids=GATHERS)
def test_attention_to_lists_and_its_gradients(case):
    h, hk, n, m, d, dv, count, lists, dtype = case
    q, k, v, grad = make((2, h, n, d), (2, hk, m, d), (2, hk, m, dv), (2, h, n, dv), dtype=dtype)
    order = make((2, lists, n, m))[0].argsort(-1)[..., :count]
    index = order.masked_fill(make((2, lists, n, count), seed=1)[0] > 1.0, -1)
    if n > 2:
        index[:, :, 2] = -1  # a query that reads nothing
    index = index.to(torch.int32)
    found = []
    for function, dtype_ in ((gather_attention, dtype), (oracle, torch.float64)):
        leaves = [x.to(dtype_).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, index)
        found.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype_))))
    for mine, theirs in zip(*found, strict=True):
        assert mine.isfinite().all()
        assert mine.dtype == dtype
        assert float((mine.double() - theirs).detach().norm()) < TOLERANCE[dtype] * max(1.0, float(theirs.detach().norm()))
    if n > 2:
        assert not found[0][0][:, :, 2].any()


def test_offsets_beyond_32_bits():
    rows, stride = (1 << 19) + 1, 1 << 12
    try:
        base = torch.empty((rows - 1) * stride + 32, dtype=torch.float16, device=DEVICE)  # on a CPU, pages that nobody writes cost nothing
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    k, last = base.as_strided((1, 1, rows, 32), (0, 0, stride, 1)), torch.tensor([0, rows - 1], device=DEVICE)
    k[0, 0, last], q = make((2, 32), (1, 1, 1, 32), dtype=torch.float16)
    near = k[:, :, last].double()
    want = (q.double() @ near.mT * 32**-0.5).softmax(-1) @ near
    got = gather_attention(q, k, k, last.to(torch.int32).view(1, 1, 1, 2))
    assert float((got.double() - want).norm()) < 1e-3 * float(want.norm())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "setting"), [("topk", {"topk": 6}), ("dsa", {"topk": 6, "index_heads": 2, "index_dim": 16}),
                                               ("dsa", {"topk": 6, "index_heads": 3, "index_dim": 5})])  # fmt: skip
def test_methods_agree_with_their_definitions(name, setting, causal):
    method, (q, k, v, grad) = attnbench.get(name), make((1, 2, 20, 32), (1, 1, 20, 32), (1, 1, 20, 32), (1, 2, 20, 32))
    params = method.parse({**setting, "causal": causal})
    drawn = {name: x + 0.2 for name, x in method.initial(Shape.of(q, k, v), params, q).items()}
    found = []
    for function, dtype in ((method.implementation("triton").load(), torch.float32), (method.reference, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        own = {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}
        out = function(*leaves, params, **({"weights": own} if own else {}))
        found.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype), retain_graph=True)))
        if dtype == torch.float32 and own:
            assert all(g is not None and not g.any() for g in torch.autograd.grad(out, list(own.values()), grad, allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        assert float((mine.double() - theirs).detach().norm()) < 2e-5 * float(theirs.detach().norm())


def test_many_keys_are_selected_in_chunks_and_gathered():
    method, (q, k, v) = attnbench.get("dsa"), make((1, 2, 3, 32), (1, 2, 300, 32), (1, 2, 300, 32))
    params = method.parse({"topk": 270})
    got = method.implementation("triton").load()(q, k, v, params, weights=method.initial(Shape.of(q, k, v), params, q))
    torch.testing.assert_close(got, method.reference(q, k, v, params), rtol=1e-4, atol=1e-5)


def test_strided_inputs_equal_contiguous_ones():
    q, k, v = make((1, 7, 3, 2, 32))[0].permute(2, 0, 3, 1, 4)
    index = select_topk(q, k, 4)
    assert torch.equal(index, select_topk(q.contiguous(), k.contiguous(), 4))
    assert torch.equal(gather_attention(q, k, v, index), gather_attention(*(x.contiguous() for x in (q, k, v)), index))


def test_the_operators_are_well_formed_and_compile():
    q, k, v = (x.requires_grad_() for x in make((1, 1, 6, 32), (1, 1, 6, 32), (1, 1, 6, 32)))
    index = select_topk(q, k, 3)
    torch.library.opcheck(topk_select, (q.detach(), q.detach().new_empty(0), k.detach(), 3, 0, True))
    torch.library.opcheck(gather_forward, (q, k, v, index, 0.2))

    def layer(q, k, v):
        return gather_attention(q * 1.0, k, v, select_topk(q, k, 3)).sin()

    want = layer(q, k, v)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, want)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_unsupported_calls_say_why():
    assert topk.supported(64, 4096, 64, torch.bfloat16) == []
    assert topk.supported(64, 100, 300, torch.bfloat16) == []
    assert "1 to 256 keys a query" in topk.supported(64, 4096, 300, torch.bfloat16)[0]
    assert "up to 128, not 256" in topk.supported(256, 4096, 64, torch.bfloat16)[0]
    assert "not float64" in topk.supported(64, 4096, 64, torch.float64)[0]
    assert "keys, not" in topk.supported(64, (1 << 20) + 1, 64, torch.float32)[0]
    assert "not 300" in gather.supported(300, 64, torch.float32)[0]
    q, k, v = make((1, 3, 8, 32), (1, 2, 8, 32), (1, 2, 8, 32))
    with pytest.raises(ValueError, match="do not fit"):
        select_topk(q, k, 2)
    with pytest.raises(ValueError, match="do not fit"):
        gather_attention(q, k, v, torch.zeros(1, 1, 8, 2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="int32"):
        gather_attention(q[:, :2], k, v, torch.zeros(1, 1, 8, 2, dtype=torch.int64, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "count", "dtype"),
    [(4096, 64, 64, torch.bfloat16), (20000, 128, 256, torch.bfloat16), (70000, 64, 64, torch.float16), (5000, 96, 17, torch.float32)],
)
def test_large_selections_on_a_gpu(n, d, count, dtype, causal):
    """The scores of what was chosen are the largest there are, at sampled queries."""
    q, k = make((1, 2, n, d), (1, 1, n, d), dtype=dtype)
    index = select_topk(q, k, count, causal=causal)
    rows = torch.tensor([0, count, n // 2, n - 1], device=DEVICE)
    scores = grouped(q[:, :, rows], k)
    if causal:
        scores = scores.masked_fill(torch.arange(n, device=DEVICE) > rows[:, None], -torch.inf)
    best = scores.topk(count, -1).values
    lists = index[:, :, rows].long()
    got = scores.gather(-1, lists.clamp(min=0)).masked_fill(lists < 0, -torch.inf).sort(-1, descending=True).values
    torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-3)
    assert (lists.diff(dim=-1) > 0)[lists[..., 1:] >= 0].all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("label", "count"), [("topk@triton", 64), ("dsa@triton", 64), ("dsa@triton", 400)])
def test_the_gate_on_a_gpu(label, count, dtype, causal):
    from attnbench.check import gate

    method, qkv = attnbench.get(label), tuple(make((2, 4, 2000, 64), (2, 2, 2000, 64), (2, 2, 2000, 64), dtype=dtype))
    params = method.parse({"topk": count, "causal": causal})
    found = gate(method, method.implementation(method.pinned), params, qkv, backward=True)
    assert found.passed, {key: (e, found.bounds[key]) for key, e in found.errors.items() if e > found.bounds[key]}
    assert found.operator == "attnbench::gather_forward"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("label", ["topk@triton", "dsa@triton"])
def test_a_cuda_graph_replays_without_synchronising(label):
    method, qkv = attnbench.get(label), [x.requires_grad_() for x in make(*[(1, 4, 4096, 64)] * 3, dtype=torch.bfloat16)]
    params = method.parse({"topk": 64})
    own = method.initial(Shape.of(*qkv), params, qkv[0])
    grad, implementation = torch.randn_like(qkv[0]), method.implementation(method.pinned)

    def step():
        out = method.run(implementation, *qkv, params, weights=own or None)
        return out, *torch.autograd.grad(out, qkv, grad)

    want, got = replayed(step)
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0)  # the gradients of k and v are summed in no fixed order
    for a, b in zip(got[2:], want[2:], strict=True):
        assert float((a - b).float().norm()) < 1e-2 * float(b.float().norm())
