"""What surrounds MiTA's kernels: memory that a call takes, buffers that share it, plans, and the selection's search by itself."""

from types import SimpleNamespace

import pytest
import torch
from triton_support import DEVICE, interpreter  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from attnbench.kernels.mita import _forward as launches
from attnbench.kernels.mita import _launch, _layout
from attnbench.kernels.mita._plan import even_splits, plan
from attnbench.kernels.mita._select import keep_top


class OnPaper(_launch.Recorder):
    """Compiles and launches nothing."""

    def run(self, kernel, programs, args, constants):
        return SimpleNamespace(run=None, function=kernel.__name__, packed_metadata=None)


def program(monkeypatch, setting, sms=132):
    """(what a GPU with `sms` multiprocessors would repeat for a forward pass in bfloat16, bytes of its buffers, of q, k and v together)."""
    b, h, n, m, k, *grid = setting
    monkeypatch.setattr(launches, "processors", lambda _: sms)
    monkeypatch.setattr(_launch, "_KNOWN", True)
    monkeypatch.setattr(_launch, "_PROGRAMS", {})
    qkv = [torch.empty(b, h, n, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    side = int(m**0.5)
    launch = OnPaper(*qkv)
    results = launches.first_forward(
        launch, launches.Setting(k, 1, True, True, 0.125, 1 / 64, (0, *grid[0], side, side) if grid else (0, 1, n, 1, m))
    )
    launch.note("key", results, own=1)
    scratch = [x for x, _ in launch.buffers if not any(x is y for y in results)]
    return _launch.find("key"), [x.nbytes for x in (*results, *scratch)], sum(x.nbytes for x in qkv)


SETTINGS = [(1, 16, n, 64, 64) for n in (4096, 16384, 65536, 1 << 20)] + [(64, 6, 3136, m, m, (56, 56)) for m in (25, 49)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_little_memory_beyond_inputs_and_output(monkeypatch, setting):
    got, _, qkv = program(monkeypatch, setting)
    assert got.workspace <= 0.1 * qkv
    assert got.packed_bytes <= 0.5 * qkv


@pytest.mark.parametrize("n", [300, 4096, 65536])
def test_buffers_that_live_at_the_same_time_lie_apart(monkeypatch, n):
    got, (room, *sizes), _ = program(monkeypatch, (1, 16, n, 64, 64))
    output, *buffers = ({i for i, x in enumerate(got.launches) if place in x.places} for place in range(3, 4 + len(got.spare.places)))
    names = [x.compiled.function for x in got.launches]
    fork, join = names.index("probe_kernel"), names.index("attend_kernel")
    assert names[fork:join] == ["probe_kernel", "select_kernel", "gate_kernel", "permute_kernel"]

    def over(a, b):
        """Whether all of launches `a` are over when any of `b` begins: the two pairs from `fork` to `join` run side by side."""
        return all(i < j and (i < fork or j >= join or (i - fork) // 2 == (j - fork) // 2) for i in a for j in b)

    spans = [(host, at, at + size, uses) for (host, at), size, uses in zip(got.spare.places, sizes, buffers, strict=True)]
    assert {host for host, *_ in spans} == {0, -1}
    for i, (host, at, end, uses) in enumerate(spans):
        assert end <= (room if host == 0 else got.spare.bytes)
        assert host < 0 or over(uses, output), "written into the output too late"
        for other, first, last, others in spans[:i]:
            assert host != other or end <= first or last <= at or over(uses, others) or over(others, uses)


def test_memory_is_shared_only_in_turn():
    steps = [_layout.Step(*x) for x in ((False, False), (True, False), (False, False), (False, True))]
    assert [sorted(x) for x in _layout.followers(steps)] == [[1, 2, 3], [3], [3], []]
    one, side, main, last = (_layout.Piece(100, frozenset(x)) for x in ([0], [0, 1], [2], [3]))
    # the last may lie over any other, the two streams' not over each other
    assert _layout.shared([side, main, last], [], steps) == _layout.Layout(((-1, 0), (-1, 256), (-1, 0)), 512)
    # a host takes what is over before it is written, as far as it has room
    assert _layout.shared([one, side, main], [_layout.Piece(360, frozenset([3]))], steps) == _layout.Layout(((0, 0), (0, 256), (0, 0)), 0)
    assert _layout.shared([main], [_layout.Piece(500, frozenset([2]))], steps) == _layout.Layout(((-1, 0),), 256)


@pytest.mark.parametrize(
    ("programs", "most", "splits"),
    [(16, 512, 8), (384, 25, 1), (16, 4, 4), (1, 8192, 132), (50, 64, 5), (128, 32, 1), (1000, 9, 1)],
)
def test_a_pass_over_the_keys_fills_the_multiprocessors_evenly(programs, most, splits):
    assert even_splits(programs, most, 132) == splits


@pytest.mark.parametrize(
    ("heads", "n", "rows"),
    [(1, 1, 64), (16, 4096, 128), (16, 16384, 512), (16, 65536, 2048), (16, 1 << 17, 4096), (16, 1 << 20, 4096), (384, 3136, 512)],
)
def test_a_block_of_the_gate_is_long_where_there_are_blocks_enough(heads, n, rows):
    assert plan(heads, n, n, min(n, 64), 64, 1, 64, 64, False, 132).gate_rows == rows


@triton.jit
def keep_top_kernel(x, found, K, L: tl.constexpr):
    o_l = tl.arange(0, L)
    b_keep, b_place = keep_top(tl.load(x + o_l).to(tl.uint32, bitcast=True), K)
    tl.store(found + o_l, tl.where(b_keep, b_place, -1))


@pytest.mark.parametrize("values", ["any", "few", "one", "ends"])
def test_the_largest_are_kept_and_listed_once(values):
    torch.manual_seed(0)
    last = (1 << 32) - 1
    x = {
        "any": torch.randint(1 << 32, (64,)), "few": torch.randint(3, (64,)) + (5 << 28), "one": torch.full((64,), last - 1),
        "ends": torch.randint(2, (64,)) * last,
    }[values]  # fmt: skip
    found = torch.empty(64, dtype=torch.int32, device=DEVICE)
    bits = torch.where(x < 1 << 31, x, x - (1 << 32)).to(DEVICE, torch.int32)
    for top in (1, 7, 64):
        keep_top_kernel[(1,)](bits, found, top, L=64)
        place = found.cpu()
        kept = place >= 0
        assert torch.equal(x[kept].sort(descending=True).values, x.topk(top).values)
        assert sorted(place[kept].tolist()) == list(range(top))
        tied = (x == x[kept].min()).nonzero()[:, 0]
        assert torch.equal(kept[tied], torch.arange(len(tied)) < kept[tied].sum()), "of equals not the first"
