"""`block_window`, `bra`, `nsa` and `moba` against independent implementations, with their weights and with gradients.

Their code is not part of this project. `ATTNBENCH_PEER_SWIN` names a checkout of https://github.com/microsoft/Swin-Transformer (read at
commit f82860b), `ATTNBENCH_PEER_BIFORMER` one of https://github.com/rayleizhu/BiFormer (1697bbb), `ATTNBENCH_PEER_NSA` one of
https://github.com/fla-org/native-sparse-attention (bd67af5), `ATTNBENCH_PEER_NSA_PYTORCH` one of
https://github.com/lucidrains/native-sparse-attention-pytorch (83fa271), `ATTNBENCH_PEER_MOBA` one of https://github.com/MoonshotAI/MoBA
(61e456b). All but the first and the last need `einops`, lucidrains' also `einx`, `local-attention` and `rotary-embedding-torch`. Layers
project tokens x to q, k and v; ours are given those. `pytest -m peers -rP` prints the errors.
"""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.method import Method, Params, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peers
REPOSITORIES = {
    "SWIN": "microsoft/Swin-Transformer",
    "BIFORMER": "rayleizhu/BiFormer",
    "NSA": "fla-org/native-sparse-attention",
    "NSA_PYTORCH": "lucidrains/native-sparse-attention-pytorch",
    "MOBA": "MoonshotAI/MoBA",
}
DIM = 8


def load(peer: str, path: str, *names: str, **space: Any) -> Any:
    """Classes and functions of a file of theirs, undecorated, so that nothing else that it imports is needed; skips without a checkout."""
    checkout = os.environ.get(f"ATTNBENCH_PEER_{peer}")
    if not checkout:
        pytest.skip(f"ATTNBENCH_PEER_{peer} names no checkout of github.com/{REPOSITORIES[peer]}")
    source = ast.parse((Path(checkout) / path).read_text())
    wanted = [node for node in source.body if getattr(node, "name", "") in names]
    assert len(wanted) == len(names)
    for node in wanted:
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        node.decorator_list = []
    hints = dict.fromkeys(("Tuple", "Optional", "Union", "List", "LongTensor"), Any)
    space = {"torch": torch, "nn": nn, "F": nn.functional, "math": math, "Tensor": Tensor, "Module": nn.Module} | hints | space
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *wanted], []), path, "exec"), space)
    return [space[name] for name in names]


def image(height: int, width: int, channels: int) -> Tensor:
    g = torch.Generator().manual_seed(height)
    return torch.randn(2, height, width, channels, generator=g, dtype=torch.float64, requires_grad=True)


def tokens(x: Tensor, heads: int) -> Tensor:
    """`[B, height, width, C]` -> `[B, H, N, D]`."""
    return x.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


def stirred(module: nn.Module) -> Any:
    """Their module in float64, its parameters random and so apart from any symmetry."""
    torch.manual_seed(1)
    for x in module.double().parameters():
        nn.init.normal_(x, std=0.3)
    return module


def settled(method: Method, qkv: tuple[Tensor, Tensor, Tensor], **values: Any) -> Params:
    shape = Shape.of(*qkv)
    params = method.parse(values)
    assert params.problems(shape) == []
    return params


def compare(what: str, ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Outputs and their gradients, in float64, or what float32 allows where theirs computes in that."""
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=theirs.dtype)
    gradients = (torch.autograd.grad(x, leaves, grad.to(x.dtype), retain_graph=True) for x in (ours, theirs))
    pairs = [(ours, theirs), *zip(*gradients, strict=True)]
    errors = [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]
    print(f"{what}: largest error relative to the largest entry: output {errors[0]:.1e}, gradients {max(errors[1:]):.1e}")
    assert max(errors) < (1e-10 if theirs.dtype == torch.float64 else 1e-5)


def test_windows_are_those_of_swin() -> None:
    names = ("window_partition", "window_reverse", "WindowAttention")
    partition, reverse, module = load("SWIN", "models/swin_transformer.py", *names, trunc_normal_=nn.init.trunc_normal_)
    theirs, x = stirred(module(3 * DIM, (4, 4), 3)), image(8, 12, 3 * DIM)
    windows = partition(x, 4).flatten(1, 2)
    theirs.proj = nn.Identity()
    out = reverse(theirs(windows).unflatten(1, (4, 4)), 4, 8, 12)
    q, k, v = (tokens(y, 3) for y in theirs.qkv(x).chunk(3, -1))
    method = attnbench.get("block_window")
    params = settled(method, (q, k, v), window=16, grid="8x12", bias=True)
    bias = theirs.relative_position_bias_table.T.view(3, 7, 7)
    for name in ("sdpa", "eager"):
        ours = method.run(method.implementation(name), q, k, v, params, weights={"bias": bias})
        compare(f"block_window@{name} | Swin-Transformer", ours, tokens(out, 3), x, theirs.relative_position_bias_table)


@pytest.mark.parametrize("topk", [1, 3, 16])
def test_bra_is_the_authors_first_version(topk: int) -> None:
    rearrange = pytest.importorskip("einops").rearrange
    names = ("TopkRouting", "KVGather", "QKVLinear", "BiLevelRoutingAttention")
    module = load("BIFORMER", "ops/bra_legacy.py", *names, rearrange=rearrange)[-1]
    theirs = stirred(module(4 * DIM, num_heads=4, n_win=4, topk=topk, side_dwconv=5, param_attention="qkv"))
    x = image(12, 20, 4 * DIM)
    q, k, v = (tokens(y, 4) for y in theirs.qkv.qkv(x).chunk(3, -1))
    own = {"lepe_weight": theirs.lepe.weight, "lepe_bias": theirs.lepe.bias}
    # theirs has a number of regions a side, here 3 x 5 tokens each: as a permutation of tokens that is a line of regions of 15
    order = torch.arange(240).view(4, 3, 4, 5).transpose(1, 2).flatten()
    method, qkv = attnbench.get("bra"), tuple(y[:, :, order] for y in (q, k, v))
    params = settled(method, qkv, region=15, topk=topk, grid="line")  # type: ignore[arg-type]
    from attnbench.methods.bra import convolution

    for name in ("varlen", "eager"):
        ours = method.run(method.implementation(name), *qkv, params, weights={})[:, :, order.argsort()]
        ours = ours + convolution(v, own, (12, 20))
        compare(f"bra@{name} | BiFormer legacy, topk {topk}", ours, tokens(theirs(x), 4), x, theirs.lepe.weight)


@pytest.mark.parametrize("topk", [1, 3])
def test_bra_is_the_authors_second_version(topk: int) -> None:
    pytest.importorskip("einops")
    (grid2seq, seq2grid, attend) = load("BIFORMER", "ops/torch/rrsda.py", "_grid2seq", "_seq2grid", "regional_routing_attention_torch")
    assert grid2seq is not seq2grid
    (module,) = load("BIFORMER", "ops/bra_nchw.py", "nchwBRA", regional_routing_attention_torch=attend)
    theirs = stirred(module(4 * DIM, num_heads=4, n_win=3, topk=topk, side_dwconv=3))
    theirs.output_linear = nn.Identity()
    x = image(12, 12, 4 * DIM)
    q, k, v = (tokens(y.movedim(1, -1), 4) for y in theirs.qkv_linear(x.movedim(-1, 1)).chunk(3, 1))
    own = {"lepe_weight": theirs.lepe.weight, "lepe_bias": theirs.lepe.bias}
    method = attnbench.get("bra")
    params = settled(method, (q, k, v), region=16, topk=topk, lepe=3)
    want = tokens(theirs(x.movedim(-1, 1)).movedim(1, -1), 4)
    for name in ("varlen", "eager"):
        ours = method.run(method.implementation(name), q, k, v, params, weights=own)
        compare(f"bra@{name} | BiFormer nchw, topk {topk}", ours, want, x, theirs.lepe.weight)


def single(n: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, h, n, DIM, generator=g, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    return q, k, v


@pytest.mark.parametrize(("n", "heads", "kv_heads"), [(70, 4, 2), (64, 2, 2), (23, 4, 1)])
def test_nsa_is_the_naive_form_of_fla(n: int, heads: int, kv_heads: int) -> None:
    einops = pytest.importorskip("einops")
    path, names = (
        "native_sparse_attention/ops/naive.py",
        ("compression", "naive_nsa", "naive_nsa_compression", "naive_nsa_with_compression"),
    )
    run: Callable[..., Any] = load("NSA", path, *names, rearrange=einops.rearrange, repeat=einops.repeat)[-1]
    qkv = single(n, heads, kv_heads)
    method = attnbench.get("nsa")
    params = settled(method, qkv, compress=8, stride=8, block=8, topk=4, window=11, first=0, local=1, causal=True)
    own = method.initial(Shape.of(*qkv), params, qkv[0])
    from attnbench.methods.nsa import gates

    compressed, selected, window = gates(qkv[0], own["gate"]).transpose(2, 3)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    theirs, _ = run(q, k, v, compressed, selected, window, 4, block_size=8, window_size=11)
    for name in ("varlen", "eager"):
        ours = method.run(method.implementation(name), *qkv, params, weights=own).transpose(1, 2)
        compare(f"nsa@{name} | fla-org naive, H={heads}/{kv_heads} N={n}", ours, theirs, *qkv)


def test_nsa_is_lucidrains_bidirectional_form() -> None:
    """Without their memory, rotary embedding and norm, where logits and probabilities select alike: a head a group, l = s = l'."""
    for package in ("einops", "einx", "local_attention", "rotary_embedding_torch"):
        pytest.importorskip(package)
    checkout = os.environ.get("ATTNBENCH_PEER_NSA_PYTORCH")
    if not checkout:
        pytest.skip(f"ATTNBENCH_PEER_NSA_PYTORCH names no checkout of github.com/{REPOSITORIES['NSA_PYTORCH']}")
    import importlib.util

    path = Path(checkout) / "native_sparse_attention_pytorch/native_sparse_attention.py"
    spec = importlib.util.spec_from_file_location("peer_nsa", path)
    assert spec is not None
    assert spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    attend = peer.attend

    def without_memory(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, return_sim: bool = False) -> Any:
        if not return_sim:
            return attend(q, k, v, mask=mask)
        out, scores = attend(q, k[:, :, 1:], v[:, :, 1:], return_sim=True)
        return out, nn.functional.pad(scores, (1, 0))

    peer.attend = without_memory
    heads, n, size = 3, 60, 6
    theirs = stirred(
        peer.SparseAttention(
            dim=heads * DIM, dim_head=DIM, heads=heads, sliding_window_size=size, compress_block_size=size, selection_block_size=size,
            compress_block_sliding_stride=size, num_selected_blocks=3, causal=False, norm=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for mlp in (theirs.k_compress, theirs.v_compress):
            mlp[3].weight.mul_(0.1)  # theirs hides blocks of a probability below 1e-10
    theirs.combine_heads = nn.Identity()
    theirs.rotary_emb.rotate_queries_with_cached_keys = lambda q, k: (q, k)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, n, heads * DIM, generator=g, dtype=torch.float64, requires_grad=True)
    q, k, v = (y.unflatten(2, (heads, DIM)).transpose(1, 2) for y in theirs.to_qkv(x).chunk(3, -1))
    method = attnbench.get("nsa")
    params = settled(method, (q, k, v), compress=size, stride=size, block=size, topk=3, window=2 * size + 1, first=0, local=0, phi="mlp")
    own = method.initial(Shape.of(q, k, v), params, q)
    from attnbench.methods.nsa import gates

    theirs.to_strategy_combine = nn.Identity()
    theirs.to_strategy_combine.forward = lambda _: gates(q, own["gate"]).permute(1, 2, 3, 0)
    for name, mlp, place in (
        ("k", theirs.k_compress, theirs.k_intrablock_positions),
        ("v", theirs.v_compress, theirs.v_intrablock_positions),
    ):
        own |= {f"{name}_position": place, f"{name}_w1": mlp[1].weight, f"{name}_b1": mlp[1].bias}
        own |= {f"{name}_w2": mlp[3].weight, f"{name}_b2": mlp[3].bias}
    want = theirs(x).unflatten(2, (heads, DIM)).transpose(1, 2)
    for name in ("varlen", "eager"):
        ours = method.run(method.implementation(name), q, k, v, params, weights=own)
        compare(f"nsa@{name} | native-sparse-attention-pytorch", ours, want, x, own["k_w1"], own["v_w2"], own["k_position"])


@pytest.mark.parametrize(("n", "block", "topk"), [(64, 16, 2), (50, 16, 3), (23, 8, 1), (40, 64, 3)])
def test_moba_is_the_authors_naive_form(n: int, block: int, topk: int) -> None:
    (run,) = load("MOBA", "moba/moba_naive.py", "moba_attn_varlen_naive")
    qkv = single(n, 3, 3)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in qkv]
    theirs = run(*flat, torch.tensor([0, n, 2 * n]), n, block, topk).unflatten(0, (2, n)).transpose(1, 2)
    method = attnbench.get("moba")
    params = settled(method, qkv, block=block, topk=topk, causal=True)
    for name in ("varlen", "eager"):
        ours = method.run(method.implementation(name), *qkv, params)
        compare(f"moba@{name} | MoBA naive, N={n} block={block} topk={topk}", ours, theirs, *qkv)
