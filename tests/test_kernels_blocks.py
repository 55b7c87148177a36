"""Kernels of routed blocks and compressed keys against float64 autograd: in Triton's interpreter where there is no GPU, else on the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_support import DEVICE, interpreter, replayed  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
import attnbench
from attnbench.check import gate
from attnbench.inputs import draw
from attnbench.kernels.blocks import _operator as launches
from attnbench.kernels.blocks import _sort as sorting
from attnbench.kernels.blocks import attend_blocks, attend_regions, route_blocks, supported
from attnbench.kernels.compress import Selection, attend_compressed
from attnbench.method import Shape

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.5e-2}
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def inputs(b=1, h=2, hk=None, *, n=70, d=32, dv=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((h, d), (hk or h, d), (hk or h, dv or d))
    return [torch.randn(b, heads, n, dim, generator=g).to(DEVICE, dtype).requires_grad_() for heads, dim in shapes]


def oracle(q, k, v, mask, scale):
    """Softmax attention where `mask` allows; 0 where it allows nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return ((scale * q @ k.mT).masked_fill(~mask, -1e300).softmax(-1) * mask) @ v


def compare(run, qkv, mask, factor):
    out = run(*qkv)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want = oracle(*exact, mask, factor)
    got = out, *torch.autograd.grad(out, qkv, grad)
    for a, b in zip(got, (want, *torch.autograd.grad(want, exact, grad.double())), strict=True):
        assert a.isfinite().all()
        assert a.dtype == out.dtype
        scale = max(float(b.detach().norm()), float(grad.double().norm()))  # where a softmax has one key, its scores have no gradient
        assert float((a.double() - b).detach().norm()) <= TOLERANCE[out.dtype] * scale


def draw_routes(b, heads, n, width, s, *, causal=False, idle=0.0, seed=2):
    """Random blocks `[B, heads, N, S]`: causal, the query's own and earlier ones; a share of the slots idle."""
    g, own = torch.Generator().manual_seed(seed), torch.arange(n) // width
    scores = torch.randn(b, heads, n, -(-n // width), generator=g)
    if causal:
        scores = scores.masked_fill(torch.arange(scores.shape[3]) > own[:, None], -1e9).scatter(
            -1, own[:, None].expand(b, heads, n, 1), 1e9
        )
    best = scores.topk(min(s, scores.shape[3]), -1)
    drop = (best.values == -1e9) | (torch.rand(best.values.shape, generator=g) < idle)
    return best.indices.masked_fill(drop, -1).to(DEVICE)


def seen(routes, heads, width, causal):
    """`[B, H, N, N]`, which keys the queries with these routes read."""
    n = routes.shape[2]
    blocks, place = -(-n // width), torch.arange(n, device=DEVICE)
    read = torch.zeros(*routes.shape[:3], blocks + 1, dtype=torch.bool, device=DEVICE)
    read.scatter_(-1, routes.masked_fill(routes < 0, blocks), True)
    mask = read.repeat_interleave(heads // routes.shape[1], 1)[..., place // width]
    return mask & (place <= place[:, None]) if causal else mask


CASES = {
    "two blocks a query": {},
    "causal": {"causal": True},
    "one block a query": {"s": 1, "dtype": torch.float16},
    "one block or none": {"s": 1, "idle": 0.4},
    "some slots idle, Dv > D, no powers of two": {"idle": 0.4, "d": 24, "dv": 40},
    "grouped heads, each with routes": {"h": 4, "hk": 2, "hr": 4},
    "grouped heads share routes, causal": {"h": 4, "hk": 2, "hr": 2, "causal": True},
    "all heads share routes": {"b": 2, "h": 4, "hk": 2, "hr": 1},
    "blocks over several tiles, causal": {"n": 150, "width": 100, "causal": True},
    "blocks over several tiles, one a query": {"n": 250, "width": 100, "s": 1, "dtype": torch.float16},
    "more blocks asked for than there are": {"s": 9, "n": 40},
    "one token": {"n": 1, "width": 4},
    "bf16": {"dtype": torch.bfloat16, "d": 64},
    "wide heads": {"d": 128, "dv": 96, "dtype": torch.float16, "n": 50},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_are_the_definition(case):
    options = {"n": 70, "width": 16, "s": 2, "causal": False, "idle": 0.0, "hr": 2, **case}
    width, s, causal, idle, hr = (options.pop(name) for name in ("width", "s", "causal", "idle", "hr"))
    qkv = inputs(**options)
    routes = draw_routes(qkv[0].shape[0], hr, options["n"], width, s, causal=causal, idle=idle)
    mask = seen(routes, qkv[0].shape[1], width, causal)
    compare(lambda *x: attend_blocks(*x, routes, width, causal=causal), qkv, mask, qkv[0].shape[-1] ** -0.5)


def cut(sides, tile):
    """`[E, W]` tokens of the regions of a grid, -1 where one is short."""
    y, x = (torch.arange(-(-side // step) * step).view(-1, step) for side, step in zip(sides, tile, strict=True))
    absent = (y >= sides[0])[:, None, :, None] | (x >= sides[1])[None, :, None, :]
    token = y[:, None, :, None] * sides[1] + x[None, :, None, :]
    return token.masked_fill(absent, -1).reshape(-1, tile[0] * tile[1]).to(DEVICE)


REGIONS = {
    "short regions at the ends": {},
    "grouped heads, batch": {"b": 2, "h": 4, "hk": 2},
    "runs, causal, own alone": {"sides": (1, 50), "tile": (1, 7), "own": True},
    "regions over several tiles": {"sides": (20, 20), "tile": (10, 10), "dtype": torch.float16},
    "three regions, bf16": {"sides": (12, 12), "tile": (6, 6), "s": 3, "dtype": torch.bfloat16, "d": 64},
    "Dv < D": {"d": 48, "dv": 16},
    "one token": {"sides": (1, 1), "tile": (1, 1)},
}


@pytest.mark.parametrize("case", REGIONS.values(), ids=REGIONS)
def test_regions_are_the_definition(case):
    options = {"sides": (7, 9), "tile": (3, 3), "s": 2, "own": False, **case}
    sides, tile, s, own = (options.pop(name) for name in ("sides", "tile", "s", "own"))
    n, members = sides[0] * sides[1], cut(sides, tile)
    qkv, count = inputs(**options, n=n), len(members)
    b = qkv[0].shape[0]
    chosen = torch.randn(b, count, count, generator=torch.Generator().manual_seed(3)).topk(min(s, count), -1).indices.to(DEVICE)
    chosen = torch.arange(count, device=DEVICE).expand(b, -1).unsqueeze(2) if own else chosen
    owner = torch.zeros(n + 1, dtype=torch.long, device=DEVICE)
    owner[members.flatten()] = torch.arange(members.numel(), device=DEVICE) // members.shape[1]
    owner, read = owner[:n], torch.zeros(b, count, count, dtype=torch.bool, device=DEVICE).scatter_(-1, chosen, True)
    mask = read[:, owner][:, :, owner].unsqueeze(1)
    mask = mask & torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril() if own else mask
    compare(lambda *x: attend_regions(*x, chosen, members, scale=0.3, causal=own), qkv, mask, 0.3)


def test_a_region_may_choose_none():
    qkv, members = inputs(n=30), cut((5, 6), (3, 3))
    chosen = torch.tensor([[[0, -1], [-1, -1], [3, 1], [-1, 2]]], device=DEVICE)
    owner = torch.empty(30, dtype=torch.long, device=DEVICE)
    for region, tokens in enumerate(members):
        owner[tokens[tokens >= 0]] = region
    mask = (chosen[0, owner][:, None] == owner[None, :, None]).any(-1)[None, None]
    compare(lambda *x: attend_regions(*x, chosen, members), qkv, mask, 32**-0.5)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_in_several_launches_equal_one(monkeypatch, causal):
    """Partial results that exceed the budget are made a few heads at a time."""
    qkv, routes = inputs(2, 3, n=60), draw_routes(2, 3, 60, 16, 2, causal=causal)
    once = attend_blocks(*qkv, routes, 16, causal=causal)
    want = torch.autograd.grad(once.square().sum(), qkv)
    monkeypatch.setattr(launches, "PART_BYTES", 4 * 60 * 2 * 32 * 4)
    assert len(launches.passes(launches.Call.of(*qkv, routes, None, 16), 32)) == 2
    again = attend_blocks(*qkv, routes, 16, causal=causal)
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again.square().sum(), qkv), want, strict=True))


@pytest.mark.parametrize("kind", ["all to one block", "two blocks never chosen", "equal"])
def test_adversarial_routing(kind):
    """A block whose pairs fill many runs, and blocks without pairs."""
    qkv, n = inputs(h=1, n=300), 300
    routes = torch.full((1, 1, n, 1), 2, device=DEVICE) if kind == "all to one block" else draw_routes(1, 1, n, 30, 2)
    if kind == "two blocks never chosen":
        routes = routes.masked_fill((routes == 0) | (routes == 9), 4)
        routes = routes.masked_fill((routes == 4).cumsum(-1) > 1, -1)
    if kind == "equal":
        qkv = [torch.ones_like(x).requires_grad_() for x in qkv]
    compare(lambda *x: attend_blocks(*x, routes, 30), qkv, seen(routes, 1, 30, False), 32**-0.5)


@pytest.mark.parametrize(("block", "tile"), [(16, 1024), (1, 32), (90, 32)])
def test_every_pair_is_in_one_run(monkeypatch, block, tile):
    monkeypatch.setattr(sorting, "_TILE", tile)
    routes, blocks = draw_routes(2, 3, 90, block, 2, idle=0.3).int(), -(-90 // block)
    pairs = routes[0, 0].numel()
    order, start = sorting.group(routes, blocks)
    for run in (1, 7, 1000):
        table, edges = sorting.items(start, run, pairs // run + blocks)
        for x in range(6):
            found = []
            for own, first, last in table[x].tolist():
                assert last - first <= run
                found += [(own, pair - pairs * x) for pair in order[first:last].tolist()] if last > first else []
            flat = routes.flatten(0, 1)[x].flatten().tolist()
            assert sorted(found) == sorted((own, pair) for pair, own in enumerate(flat) if own >= 0)
            assert edges[x].diff().tolist() == [-(-(start[x, e + 1] - start[x, e]).item() // run) for e in range(blocks)]


def test_strided_inputs_equal_contiguous_ones():
    q, k, v = torch.randn(1, 40, 3, 2, 32, device=DEVICE).permute(2, 0, 3, 1, 4)
    routes, members = draw_routes(1, 2, 40, 8, 2), cut((5, 8), (3, 3))
    chosen = torch.tensor([[[0, 1], [1, 2], [2, 5], [3, 0], [4, 1], [5, 3]]], device=DEVICE)
    for run in (lambda *x: attend_blocks(*x, routes, 8), lambda *x: attend_regions(*x, chosen, members)):
        assert torch.equal(run(q, k, v), run(q.contiguous(), k.contiguous(), v.contiguous()))


def test_same_input_same_bits():
    qkv, routes = inputs(n=100, dtype=torch.float16), draw_routes(1, 2, 100, 16, 3)
    runs = [torch.autograd.grad(attend_blocks(*qkv, routes, 16).float().square().sum(), qkv) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_reaches_only_its_readers(bad):
    q, k, v = (x.detach() for x in inputs(h=1))
    routes = draw_routes(1, 1, 70, 16, 2, idle=0.2)
    at = torch.tensor([37], device=DEVICE)
    good, other = (attend_blocks(x, k, v, routes, 16) for x in (q, q.index_fill(2, at, bad)))
    keep = torch.arange(70, device=DEVICE) != 37
    assert torch.equal(good[:, :, keep], other[:, :, keep])
    out = attend_blocks(q, k, v.index_fill(2, at, bad), routes, 16)
    readers = (routes == 37 // 16).any(-1)
    assert 0 < readers.sum() < 70
    assert torch.equal(~out.isfinite().all(-1), readers)


def test_compile_checkpoint_and_the_operator():
    from torch.utils.checkpoint import checkpoint

    qkv, routes = inputs(h=1, n=40), draw_routes(1, 1, 40, 8, 2)

    def layer(q, k, v):
        return attend_blocks(q * 1.0, k, v, routes, 8, causal=True).sin()

    want = layer(*qkv)
    grads = torch.autograd.grad(want.sum(), qkv)
    for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), lambda *x: checkpoint(layer, *x, use_reentrant=False)):
        out = run(*qkv)
        assert torch.equal(out, want)
        for a, b in zip(torch.autograd.grad(out.sum(), qkv), grads, strict=True):
            torch.testing.assert_close(a, b)
    members, chosen = cut((5, 8), (5, 4)).int(), torch.tensor([[[[0, 1], [1, 0]]]], device=DEVICE, dtype=torch.int32)
    torch.library.opcheck(launches.blocks_forward, (*qkv, routes.int(), None, 8, 0.2, True))
    torch.library.opcheck(launches.blocks_forward, (*qkv, chosen, members, 20, 0.2, False))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_for_an_h100(tmp_path):
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in shared} == {
        *("block_route_kernel", "pair_attend_kernel", "merge_kernel", "sum_kernel", "pair_query_gradient_kernel"),
        *("region_attend_kernel", "region_query_gradient_kernel", "key_gradient_kernel", "key_sum_kernel", "delta_kernel"),
        *("number_kernel", "start_kernel", "item_kernel"),
        *("compressed_attend_kernel", "importance_kernel", "block_select_kernel"),
        *("compressed_query_gradient_kernel", "compressed_key_gradient_kernel"),
    }
    assert all(int(size) <= 227 << 10 for _, size in shared), "more shared memory than a multiprocessor has"


def test_unsupported_calls_say_why():
    q, k, v = inputs()
    routes = draw_routes(1, 2, 70, 16, 2)
    assert supported(q, k, v, 140, 5) == []
    assert "float64" in supported(q.double(), k.double(), v.double(), 140, 5)[0]
    assert "up to 128" in supported(*inputs(d=136), 140, 5)[0]
    assert "32-bit" in supported(q, k, v, 1 << 30, 5)[0]
    assert "differ in dtype" in supported(q, k.half(), v, 140, 5)[0]
    with pytest.raises(ValueError, match="routes"):
        attend_blocks(q, k, v, routes[:, :, :60], 16)
    with pytest.raises(ValueError, match="route heads and 2 key heads"):
        attend_blocks(*inputs(h=6, hk=2), draw_routes(1, 3, 70, 16, 2), 16)
    with pytest.raises(ValueError, match="regions"):
        attend_regions(q, k, v, torch.zeros(1, 4, 1, device=DEVICE), cut((7, 10), (3, 3)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("sizes", "block", "topk", "dtype"),
    [((1, 2, 2, 70), 16, 2, torch.float32), ((2, 4, 2, 70), 16, 3, torch.float16), ((1, 2, 1, 200), 2, 5, torch.float32),
     ((1, 1, 1, 5), 8, 3, torch.float32), ((1, 2, 2, 90), 1, 7, torch.bfloat16)],
)  # fmt: skip
def test_routes_are_the_largest_products(sizes, block, topk, dtype, causal):
    *heads, n = sizes
    q, k, _ = (x.detach() for x in inputs(*heads, n=n, dtype=dtype))
    means = torch.stack([part.float().mean(2) for part in k.split(block, 2)], 2)
    found = route_blocks(q, means, topk, block, causal).long()
    scores = q.double() @ means.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    own, place = torch.arange(n, device=DEVICE)[:, None] // block, torch.arange(means.shape[2], device=DEVICE)
    if causal:
        scores = scores.masked_fill(place > own, float("-inf")).masked_fill(place == own, float("inf"))
    best = scores.topk(min(topk, len(place)), -1)
    want = best.indices.masked_fill(best.values == float("-inf"), -1)
    assert torch.equal(found.sort(-1).values, want.sort(-1).values)


def test_routes_of_ties_and_of_what_is_not_finite():
    q, means = torch.ones(1, 1, 6, 16, device=DEVICE), torch.ones(1, 1, 4, 16, device=DEVICE)
    assert route_blocks(q, means, 2, 2, False).sort(-1).values.eq(torch.tensor([0, 1], device=DEVICE)).all(), "ties go to the first"
    q[0, 0, 2], means[0, 0, 3] = float("nan"), float("inf")
    found = route_blocks(q, means, 2, 2, False)[0, 0].sort(-1).values.tolist()
    assert found[0] == [0, 3]
    assert min(found[2]) >= 0, "a query that is no number still reads, and shows it"
    torch.library.opcheck(route_blocks, (q.nan_to_num(), means.nan_to_num(posinf=1.0), 2, 2, True))


def compressed(n, *, h=2, hk=2, d=32, dv=None, dtype=torch.float32, phi="mean", **values):
    """q, compressed keys and values, and NSA's parameters."""
    from attnbench.methods._nsa_compress import compressed as fold

    params = attnbench.get("nsa").parse({"compress": 8, "stride": 4, "block": 12, "topk": 4, "window": 9, **values})
    q, k, v = (x.detach() for x in inputs(h=h, hk=hk, n=n, d=d, dv=dv, dtype=dtype))
    return [x.requires_grad_() for x in (q, *fold(k, v, params, {}))], params


def selected(n, p):
    return Selection(n, p.compress, p.stride, p.block, p.topk, p.first, p.local, p.causal)


COMPRESSED = {
    "bidirectional": {},
    "causal, grouped heads": {"causal": True, "h": 4},
    "causal, nothing to read": {"n": 5, "causal": True},
    "one key": {"n": 5},
    "a stride a block": {"compress": 4, "stride": 4, "block": 4, "topk": 3},
    "nothing forced, fp16": {"first": 0, "local": 0, "dtype": torch.float16},
    "one key head, Dv < D, bf16, causal": {"h": 4, "hk": 1, "d": 64, "dv": 40, "dtype": torch.bfloat16, "causal": True},
    "a compressed key a block": {"n": 60, "compress": 12},
    "all blocks": {"topk": 30},
}


@pytest.mark.parametrize("case", COMPRESSED.values(), ids=COMPRESSED)
def test_compressed_attention_and_its_choice_are_the_definitions(case):
    options = {"n": 45, **case}
    n = options.pop("n")
    leaves, p = compressed(n, **options)
    (q, k, _), ends = leaves, torch.arange(leaves[1].shape[2], device=DEVICE) * p.stride + p.compress - 1
    last = torch.arange(n, device=DEVICE)[:, None]
    mask = ends <= last if p.causal else torch.ones(n, len(ends), dtype=torch.bool, device=DEVICE)
    compare(lambda *x: attend_compressed(*x, selected(n, p))[0], leaves, mask, q.shape[3] ** -0.5)
    chosen = attend_compressed(*leaves, selected(n, p))[1].long()
    keys = k.detach().double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.shape[3] ** -0.5 * q.detach().double() @ keys.mT).masked_fill(~mask, -1e300)
    from attnbench.methods._nsa_select import choose, importance

    weights = scores.softmax(-1) * mask
    want = choose(weights, last[:, 0], k.shape[1], n, p)
    assert chosen.shape == want.shape
    assert torch.equal(chosen < 0, (chosen < 0).sort(-1).values)
    assert ((chosen.diff(dim=-1) > 0) | (chosen[..., 1:] < 0)).all()
    value = torch.nn.functional.pad(importance(weights, k.shape[1], -(-n // p.block), p), (0, 1))  # -1 is the last
    picked, best = (value.gather(-1, x % value.shape[-1]).sort(-1).values for x in (chosen, want))
    torch.testing.assert_close(picked, best, rtol=0, atol=TOLERANCE[q.dtype])
    assert torch.equal((chosen >= 0).sum(-1), (want >= 0).sum(-1))


def test_importances_in_slabs_equal_those_at_once(monkeypatch):
    from attnbench.kernels.compress import _operator

    leaves, p = compressed(80, causal=True)
    want = attend_compressed(*leaves, selected(80, p))[1]
    monkeypatch.setattr(_operator, "SLAB_BYTES", 4 * 2 * 7 * 40)
    assert torch.equal(attend_compressed(*leaves, selected(80, p))[1], want)


def test_the_compressed_operator_is_well_formed():
    from attnbench.kernels import compress
    from attnbench.kernels.compress._operator import compressed_forward

    leaves, p = compressed(40, causal=True, h=1, hk=1)
    torch.library.opcheck(compressed_forward, (*leaves, [int(x) for x in selected(40, p)], 0.2))
    assert compress.supported(*leaves, selected(40, p)) == []
    assert "stride" in compress.supported(*leaves, selected(40, p)._replace(length=10))[0]
    assert "compressed keys" in compress.supported(*leaves, selected(12, p))[0]
    with pytest.raises(ValueError, match="differ in dtype"):
        attend_compressed(leaves[0].half(), *leaves[1:], selected(40, p))


METHODS = [
    ("moba", {"block": 16, "topk": 2}), ("moba", {"block": 16, "topk": 3, "causal": True}), ("moba", {"block": 16, "topk": 1}),
    ("nsa", {"compress": 8, "stride": 4, "block": 12, "topk": 4, "window": 9}),
    ("nsa", {"compress": 8, "stride": 4, "block": 12, "topk": 4, "window": 9, "causal": True, "phi": "mlp"}),
    ("bra", {"region": 9, "topk": 3}), ("bra", {"region": 16, "topk": 2, "lepe": 3, "scale": "1/sqrt(d)"}),
    ("bra", {"grid": "line", "region": 10, "topk": 2}),
    ("block_window", {"window": 9}), ("block_window", {"grid": "line", "window": 12, "causal": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values"), METHODS, ids=str)
def test_fused_methods_are_their_definitions(name, values):
    method = attnbench.get(name)
    qkv = inputs(h=2, hk=1, n=80, d=16)
    params = method.parse(values).fitted(Shape.of(*qkv))
    own = method.initial(Shape.of(*qkv), params, qkv[0])
    leaves = [*qkv, *(x.requires_grad_() for x in own.values())]
    out = method.run(method.implementation("triton"), *qkv, params, weights=own)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weights = {"weights": dict(zip(own, exact[3:], strict=True))} if own else {}
    want = method.reference(*exact[:3], params, **weights)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = out, *torch.autograd.grad(out, leaves, grad)
    for a, b in zip(got, (want, *torch.autograd.grad(want, exact, grad.double())), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("profile", ["needle"] if DEVICE == "cpu" else ["randn", "clustered", "needle", "local"])
@pytest.mark.parametrize(("name", "values"), METHODS, ids=str)
def test_half_precision_passes_the_gate(name, values, profile):
    """In float16 under the interpreter, which truncates bfloat16; on a GPU in both."""
    method = attnbench.get(name)
    n, dtypes = (90, [torch.float16]) if DEVICE == "cpu" else (3000, [torch.float16, torch.bfloat16])
    for dtype in dtypes:
        shape = Shape(1, 2, n, 16 if DEVICE == "cpu" else 64)
        params = method.parse(values).fitted(shape)
        found = gate(method, method.implementation("triton"), params, draw(profile, shape, 1, dtype, DEVICE), backward=True)
        assert found.passed, {k: (v, found.bounds[k]) for k, v in found.errors.items() if v > found.bounds[k]}
        assert found.operator == "attnbench::blocks_forward"
        assert found.deterministic or name == "nsa"


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("n", [4096, 65536])
@pytest.mark.parametrize("name", ["moba", "bra", "block_window", "nsa"])
def test_a_cuda_graph_replays_without_synchronising(name, n):
    method = attnbench.get(f"{name}@triton")
    qkv = inputs(h=4, n=n, d=64, dtype=torch.bfloat16)
    grad, params = torch.randn_like(qkv[0]), method.parse({})
    weights = method.initial(Shape.of(*qkv), params, qkv[0])

    def step():
        out = method.dispatch(*qkv, params, weights)
        return out, *torch.autograd.grad(out, qkv, grad)

    want, got = replayed(step)
    for a, b in zip(got, want, strict=True):
        if name == "nsa":  # the backward pass of flash attention over windows adds up in no fixed order
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
