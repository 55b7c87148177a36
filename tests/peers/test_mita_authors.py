"""`MiTAAttention` against the authors' own modules, with their weights, on the CPU.

Their code is not part of this project: `ATTNBENCH_PEER_MITA` names a checkout of https://github.com/QishuaiWen/MiTA (read at commit
55491ab). It needs `einops`, and flash-attn 2.6.3, for which `flash_attn_stub` stands in. `pytest -m peers -rP` prints the errors.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import flash_attn_stub
import pytest
import torch
from torch import Tensor, nn

from attnbench.nn import MiTAAttention

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = os.environ.get("ATTNBENCH_PEER_MITA", "")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not CHECKOUT, reason="ATTNBENCH_PEER_MITA names no checkout of github.com/QishuaiWen/MiTA"),
]
DIM, HEADS, N = 192, 3, 197  # DeiT-Tiny
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mita_attention": ("MiTA_Attention", {}, {}),
    "mita_attention, 7 x 7 landmarks of 16": ("MiTA_Attention", {"pool_size": 7, "kv_topk": 4}, {"landmarks": 49, "topk": 16}),
    "_mita_attention": ("MiTA_Attention", {}, {"experts_per_query": 2, "topk": 12}),
    "mita_attention_route": ("MiTA_Attention_Route", {}, {"shared": False, "topk": 50}),
    "mita_attention_conv": ("MiTA_Attention_Conv", {}, {"conv": True}),
    "mita_attention_conv_gate": ("MiTA_Attention_Conv_Gate", {}, {"conv": True, "gate": True}),
}


@pytest.fixture(scope="module", autouse=True)
def authors() -> Iterator[None]:
    """Their package as `mita_authors`, without running its `__init__`, and the stand-in for flash-attn."""
    pytest.importorskip("einops", reason="the authors' modules import einops")
    with pytest.MonkeyPatch.context() as patch:
        flash_attn_stub.install(patch)
        for name, folder in (("mita_authors", "mita"), ("vit5_authors", "MiTA-ViT-5/mita")):
            package = ModuleType(name)
            package.__path__ = [str(Path(CHECKOUT) / folder)]
            patch.setitem(sys.modules, name, package)
        patch.syspath_prepend(str(Path(CHECKOUT) / "MiTA-ViT-5"))  # for its module `rope`
        yield
    for name in [name for name in sys.modules if name.startswith(("mita_authors.", "vit5_authors.")) or name == "rope"]:
        del sys.modules[name]


def pair(variant: str, **options: Any) -> tuple[nn.Module, MiTAAttention]:
    """Their module and our layer with its weights, all keys matched; `options` go to both."""
    kind, theirs_options, ours_options = VARIANTS[variant]
    module = importlib.import_module(f"mita_authors.{variant.partition(',')[0]}")
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # they print sizes
        theirs = getattr(module, kind)(DIM, HEADS, **theirs_options, **options)
    if "gate" in variant:
        repair(theirs, module)
    ours = MiTAAttention(DIM, HEADS, **ours_options, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def repair(theirs: nn.Module, module: ModuleType) -> None:
    """Give their forward pass the name `qkv` that it reads and never sets: what it calls `qkvg`."""

    def remember(layer: nn.Module, args: Any, out: Tensor) -> None:
        module.qkv = out.unflatten(-1, (4, DIM)).permute(2, 0, 1, 3)  # type: ignore[attr-defined]

    theirs.qkvg.register_forward_hook(remember)


def evaluate(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the input and of every weight."""
    dtype = next(module.parameters()).dtype
    x = x.to(dtype).requires_grad_()
    named = {"x": x, **dict(module.named_parameters())}
    out = module(x)
    grads = torch.autograd.grad(out, list(named.values()), grad.to(dtype))
    return {"out": out.detach(), **{f"d {name}": g for name, g in zip(named, grads, strict=True)}}


def inputs(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(2, n, DIM, generator=generator), torch.randn(2, n, DIM, generator=generator)


def held(name: str, theirs: nn.Module, ours: MiTAAttention, n: int = N, order: Tensor | None = None) -> None:
    """Their results are as near to ours in float64 as ours in float32 are, but for a factor and the rounding of the longest sum."""
    x, grad = inputs(n)
    order = torch.arange(n) if order is None else order
    found = evaluate(theirs, x, grad)
    mine, exact = (evaluate(ours.to(dtype), x[:, order], grad[:, order]) for dtype in (torch.float32, torch.float64))
    for key in ("out", "d x"):
        found[key] = found[key][:, order]
    assert found.keys() == exact.keys()
    epsilon = torch.finfo(torch.float32).eps * (x.shape[0] * n + DIM) ** 0.5
    for key, want in exact.items():
        worst, usual = (float((a[key].double() - want).abs().max() / want.abs().max()) for a in (found, mine))
        print(f"{name}: {key}: theirs {worst:.1e}, ours {usual:.1e} of the largest value")
        assert worst <= (2 if key == "out" else 3) * usual + epsilon, key


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_the_authors(variant: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(variant, qkv_bias=bias)
    if "route" in variant:  # its output buffer is float16 whatever the input: here that name means float32
        wide = SimpleNamespace(**{**vars(torch), "float16": torch.float32})
        monkeypatch.setattr("mita_authors.mita_attention_route.torch", wide)
    held(variant, theirs, ours)


@pytest.mark.parametrize("other", [{"legacy_cls_shift": False}, {"topk": 24}, {"shared": False}, {"shared_scale": "1/sqrt(d)"}])
def test_another_layer_is_told_apart(other: dict[str, Any]) -> None:
    theirs, _ = pair("mita_attention")
    ours = MiTAAttention(DIM, HEADS, **other)
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(AssertionError, match="out"):
        held(f"with {other}", theirs, ours)


def test_their_gate_reads_a_name_that_nothing_sets() -> None:
    module = importlib.import_module("mita_authors.mita_attention_conv_gate")
    module.__dict__.pop("qkv", None)
    with pytest.raises(NameError, match="qkv"):
        module.MiTA_Attention_Conv_Gate(DIM, HEADS)(inputs()[0])


def test_their_route_only_module_takes_half_precision_alone() -> None:
    module = importlib.import_module("mita_authors.mita_attention_route")
    with pytest.raises(RuntimeError, match="scalar type"):
        module.MiTA_Attention_Route(DIM, HEADS)(inputs()[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_differs_by_rounding_and_flipped_choices_alone(variant: str) -> None:
    """As they train, under float16 autocast. Theirs compares scores in float16, ours in float32, so that near ties may differ."""
    theirs, ours = pair(variant, qkv_bias=True)
    x, _ = inputs()
    with torch.no_grad():
        exact = ours.double()(x.double())
        ours.float()
        with torch.autocast("cpu", torch.float16):
            outs = theirs(x), ours(x)
    a, b = (((out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten() for out in outs)
    print(f"{variant}: float16: theirs {a.median():.1e} median, {a.quantile(0.9):.1e} p90; ours {b.median():.1e}, {b.quantile(0.9):.1e}")
    epsilon = torch.finfo(torch.float16).eps
    for quantile in (0.5, 0.9):
        assert b.quantile(quantile) <= 2 * a.quantile(quantile) + epsilon
    assert a.median() <= 2 * b.median() + epsilon


@pytest.mark.parametrize("kind", ["mita_attention", "mita_attention_conv"])
def test_vit5_with_registers_behind_the_class_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens: class, 196 patches, four registers; ours: class, registers, patches. Rotation of patches alone."""
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)  # their positions are made on a GPU
    module, conv = importlib.import_module(f"vit5_authors.{kind}"), kind.endswith("conv")
    torch.manual_seed(0)
    theirs = (module.MiTA_Attention_Conv if conv else module.MiTA_Attention)(DIM, HEADS, qk_norm=True, rope_size=14, num_registers=4)
    ours = MiTAAttention(
        DIM, HEADS, prefix=5, grid=(14, 14), legacy_cls_shift=False, topk=30, qk_norm=True, positions="rotary-2d", conv=conv
    )
    for norm in (theirs.q_norm, theirs.k_norm):
        nn.init.uniform_(norm.weight, 0.5, 2)
    state = theirs.state_dict()
    assert state.pop("rope.freqs").numel() == DIM // HEADS // 4
    ours.load_state_dict(state, strict=True)
    order = torch.cat([torch.tensor([0]), torch.arange(197, 201), torch.arange(1, 197)])
    held(f"ViT-5 {kind}", theirs, ours, 201, order)
