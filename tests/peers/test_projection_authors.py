"""`inline`, `mhla`, `pvt` and `linformer` against independent implementations, with their weights, in float64, with gradients.

Their code is not part of this project. `ATTNBENCH_PEER_INLINE` names a checkout of https://github.com/LeapLabTHU/InLine (read at commit
e463a6f), `ATTNBENCH_PEER_MHLA` one of https://github.com/DAGroup-PKU/MHLA (ccf97b2; it needs `einops`), `ATTNBENCH_PEER_PVT` one of
https://github.com/whai362/PVT (57e2dfa); Linformer is the package `linformer`. Classes are taken out of their files, so that nothing else
that the files import is needed. Layers project tokens x to q, k and v; ours are given those. `pytest -m peers -rP` prints the errors.
"""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.method import Shape

pytestmark = pytest.mark.peers
REPOSITORIES = {"INLINE": "LeapLabTHU/InLine", "MHLA": "DAGroup-PKU/MHLA", "PVT": "whai362/PVT"}
MHLA = "mhla_image_classification/models/modules/attention/mhla.py"
BATCH, HEADS, DIM = 2, 3, 8
WIDTH = HEADS * DIM


def load(peer: str, path: str, *names: str) -> Any:
    """Classes and functions of a file of theirs; skips where there is no checkout."""
    checkout = os.environ.get(f"ATTNBENCH_PEER_{peer}")
    if not checkout:
        pytest.skip(f"ATTNBENCH_PEER_{peer} names no checkout of github.com/{REPOSITORIES[peer]}")
    source = ast.parse((Path(checkout) / path).read_text())
    wanted = [node for node in source.body if getattr(node, "name", "") in names]
    assert len(wanted) == len(names)
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "math": math, "trunc_normal_": nn.init.trunc_normal_}
    if peer == "MHLA":
        import numpy as np

        space |= {"np": np, "rearrange": pytest.importorskip("einops").rearrange}
    exec(compile(ast.Module(wanted, []), path, "exec"), space)
    return [space[name] for name in names]


def tokens(n: int) -> Tensor:
    return torch.randn(BATCH, n, WIDTH, generator=torch.Generator().manual_seed(n), dtype=torch.float64, requires_grad=True)


def parted(x: Tensor) -> Tensor:
    """`[B, N, H D]` -> `[B, H, N, D]`."""
    return x.unflatten(2, (-1, DIM)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def stirred(module: nn.Module) -> Any:
    """Their module in float64, its parameters random and so apart from any symmetry."""
    torch.manual_seed(1)
    for x in module.double().parameters():
        nn.init.normal_(x, std=0.3)
    return module


def compare(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Outputs `[B, N, H D]`, and their gradients."""
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = [(ours, theirs), *zip(*(torch.autograd.grad(x, leaves, grad, retain_graph=True) for x in (ours, theirs)), strict=True)]
    errors = [float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs]
    print(f"largest error relative to the largest entry: output {errors[0]:.1e}, gradients {max(errors[1:]):.1e}")
    assert max(errors) < 1e-10


@pytest.mark.parametrize("implementation", ["eager", "products"])
@pytest.mark.parametrize("kernel", ["identity", "relu", "leakyrelu", "exp"])
def test_inline_with_its_convolution(kernel: str, implementation: str) -> None:
    attention, _ = load("INLINE", "models/inline_swin.py", "InLineAttention", "exp_kernel")
    theirs, x = stirred(attention(WIDTH, (6, 6), HEADS, kernel_func=kernel)), tokens(36)
    theirs.proj = nn.Identity()
    with torch.no_grad():  # queries are the tokens, whose mean makes the kernels
        theirs.qkv.weight[:WIDTH], theirs.qkv.bias[:WIDTH] = torch.eye(WIDTH), 0.0
    first, _, second = theirs.residual
    weights = {
        "conv_in": first.weight.view(HEADS, DIM, DIM),
        "conv_in_bias": first.bias.view(HEADS, DIM),
        "conv_out": second.weight.view(HEADS, -1, DIM),
        "conv_out_bias": second.bias.view(HEADS, -1),
    }
    q, k, v = (parted(y) for y in theirs.qkv(x).chunk(3, 2))
    ours = attnbench.get(f"inline@{implementation}")(q, k, v, conv=3, kernel=kernel, weights=weights)
    compare(joined(ours), theirs(x), x, *theirs.residual.parameters())


def in_blocks(x: Tensor, side: int, size: int) -> Tensor:
    """Row-major tokens `[B, N, C]` as their layout has them, `[B, blocks, tokens of a block, C]`."""
    return x.unflatten(1, (side, size, side, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def in_rows(x: Tensor, side: int, size: int) -> Tensor:
    return x.unflatten(2, (size, size)).unflatten(1, (side, side)).transpose(2, 3).flatten(1, 4)


@pytest.mark.parametrize("implementation", ["eager", "blocked"])
@pytest.mark.parametrize(("side", "size"), [(4, 3), (3, 2), (2, 5)])
def test_mhla_with_the_authors_denominator_and_convolution(side: int, size: int, implementation: str) -> None:
    attention = mhla(side, size)
    theirs, x = stirred(attention), tokens((side * size) ** 2)
    with torch.no_grad():  # mixtures of mostly positive weights, so that no denominator is near 0
        theirs.piece_attn.conv.weight.abs_()
    theirs.norm = theirs.to_out = nn.Identity()
    weights = {
        "mix": theirs.piece_attn.conv.weight[..., 0, 0],
        "conv": theirs.lepe.weight.view(HEADS, DIM, 5, 5),
        "conv_bias": theirs.lepe.bias.view(HEADS, DIM),
    }
    q, k, v = (parted(y) for y in theirs.to_qkv(x).chunk(3, 2))
    ours = attnbench.get(f"mhla@{implementation}")(q, k, v, blocks=side**2, normalizer="repo", conv=5, weights=weights)
    with torch.compiler.set_stance("force_eager"):
        out = in_rows(theirs(in_blocks(x, side, size)), side, size)
    compare(joined(ours), out, x, theirs.piece_attn.conv.weight, theirs.lepe.weight)


def mhla(side: int, size: int, transform: str = "cos") -> Any:
    attention, _ = load("MHLA", MHLA, "MHLA_Normed_Torch", "BlockDistanceConv")
    return attention(WIDTH, HEADS, transform=transform, window_size=size**2, embed_len=(side * size) ** 2)


@pytest.mark.parametrize("transform", ["cos", "linear", "exp", "local", "gaussian"])
def test_mhla_starts_from_the_authors_mixtures(transform: str) -> None:
    method = attnbench.get("mhla")
    shape = Shape(1, HEADS, 256, DIM)
    ours = method.initial(shape, method.parse({"transform": transform}), torch.empty(0))["mix"].detach()
    theirs = mhla(4, 4, transform).piece_attn.conv.weight[..., 0, 0].detach()
    print(f"largest difference: {float((ours - theirs).abs().max()):.1e}")
    torch.testing.assert_close(ours, theirs)  # theirs are float32


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("file", "options", "setting"),
    [
        ("pvt.py", {"sr_ratio": 4}, {"reduction": 4}),
        ("pvt.py", {"sr_ratio": 3}, {"reduction": 3}),
        ("pvt.py", {"sr_ratio": 1}, {"reduction": 1}),
        ("pvt_v2.py", {"linear": True}, {"pool": 7}),
    ],
)
def test_pvt(file: str, options: dict[str, object], setting: dict[str, object], implementation: str) -> None:
    (attention,) = load("PVT", f"classification/{file}", "Attention")
    theirs, x = stirred(attention(WIDTH, HEADS, **options)), tokens(90)
    theirs.proj = theirs.q = nn.Identity()
    theirs.kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False).double()
    with torch.no_grad():
        theirs.kv.weight.copy_(torch.eye(WIDTH).repeat(2, 1))
    weights, leaves = {}, []
    if setting != {"reduction": 1}:
        own = {"conv": theirs.sr.weight.permute(0, 2, 3, 1), "bias": theirs.sr.bias, "scale": theirs.norm.weight, "shift": theirs.norm.bias}
        weights = {f"{name}_{part}": w for name in "kv" for part, w in own.items()}
        leaves = [theirs.sr.weight, theirs.sr.bias, theirs.norm.weight, theirs.norm.bias]
    ours = attnbench.get(f"pvt@{implementation}")(*[parted(x)] * 3, weights=weights, **setting)
    compare(joined(ours), theirs(x, 9, 10), x, *leaves)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_linformer(one_kv_head: bool, share: bool, implementation: str) -> None:
    package = pytest.importorskip("linformer")
    theirs = package.LinformerSelfAttention(WIDTH, 50, k=7, heads=HEADS, one_kv_head=one_kv_head, share_kv=share)
    theirs, x = stirred(theirs), tokens(50)
    theirs.to_out = nn.Identity()
    weights = {"e": theirs.proj_k.t(), **({} if share else {"f": theirs.proj_v.t()})}
    k = theirs.to_k(x)
    q, k, v = (parted(y) for y in (theirs.to_q(x), k, k if share else theirs.to_v(x)))
    ours = attnbench.get(f"linformer@{implementation}")(q, k, v, rank=7, share=share, weights=weights)
    compare(joined(ours), theirs(x), x, theirs.proj_k)
