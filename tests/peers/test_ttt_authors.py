"""`ttt` and `vit3` against their authors' own modules, with the same weights, in float64 on the CPU.

Their code is not part of this project: `ATTNBENCH_PEER_TTT` names a checkout of https://github.com/test-time-training/ttt-lm-pytorch (read
at commit cd831db), `ATTNBENCH_PEER_VIT3` one of https://github.com/LeapLabTHU/ViTTT (e347758). Stand-ins take the place of what they import
of transformers and timm. Projections are taken out, positions are not rotated. `pytest -m peers -rP` prints the errors.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.method import Shape

pytestmark = pytest.mark.peers
TTT, VIT3 = (os.environ.get(f"ATTNBENCH_PEER_{name}", "") for name in ("TTT", "VIT3"))
BATCH, HEADS, DIM = 2, 3, 8


def load(monkeypatch: pytest.MonkeyPatch, name: str, path: Path, imports: dict[str, dict[str, Any]]) -> Any:
    """A module of theirs, with stand-ins for what it imports."""
    for module, names in imports.items():
        stand_in = ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def inputs(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(BATCH, HEADS, n, DIM, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


def stirred(method: attnbench.Method, n: int, **setting: object) -> dict[str, Tensor]:
    shape, g = Shape(BATCH, HEADS, n, DIM), torch.Generator().manual_seed(5)
    drawn = method.initial(shape, method.parse(setting), torch.empty(0, dtype=torch.float64))
    return {name: (x + 0.3 * torch.randn(x.shape, generator=g, dtype=x.dtype)).requires_grad_() for name, x in drawn.items()}


def joined(x: Tensor) -> Tensor:
    """`[B, H, N, D]` -> `[B, N, H D]`."""
    return x.transpose(1, 2).flatten(2)


def difference(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> float:
    """Largest error of the output and of the gradients of `leaves`, relative to the largest entry of each."""
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    pairs = [(ours, theirs), *zip(*(torch.autograd.grad(x, leaves, g, retain_graph=True) for x in (ours, theirs)), strict=True)]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


class Config:
    """What their configuration class is based on."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@pytest.mark.skipif(not TTT, reason="ATTNBENCH_PEER_TTT names no checkout of github.com/test-time-training/ttt-lm-pytorch")
@pytest.mark.parametrize("n", [64, 50])
@pytest.mark.parametrize(("inner", "name", "bound"), [("linear", "TTTLinear", 1e-12), ("mlp", "TTTMLP", 1e-7)])
def test_ttt(monkeypatch: pytest.MonkeyPatch, inner: str, name: str, bound: float, n: int) -> None:
    """With two layers they write the constants of GELU's derivative with eight digits."""
    any_class = type("Any", (), {})
    theirs = load(
        monkeypatch, "ttt_authors", Path(TTT) / "ttt.py",
        {
            "transformers": {"PretrainedConfig": Config},
            "transformers.activations": {"ACT2FN": {}},
            "transformers.modeling_outputs": {"BaseModelOutputWithPast": any_class, "CausalLMOutputWithPast": any_class},
            "transformers.modeling_utils": {"PreTrainedModel": nn.Module},
            "transformers.utils": {"ModelOutput": any_class, "logging": SimpleNamespace(get_logger=logging.getLogger)},
            "transformers.utils.import_utils": {"is_causal_conv1d_available": lambda: False},
        },
    )  # fmt: skip
    setting = {"inner": inner, "causal": True, "base_lr": 2.0}
    method, (q, k, v) = attnbench.get("ttt"), inputs(n)
    own = stirred(method, n, **setting)
    config = theirs.TTTConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, ttt_base_lr=2.0, mini_batch_size=16)
    module = getattr(theirs, name)(config, layer_idx=0).double()
    module.token_idx = 1 / torch.arange(1, 17, dtype=torch.float64)
    layers = ("w1", "b1") if inner == "linear" else ("w1", "b1", "w2", "b2")
    names = {x: x.replace("w", "W") for x in layers} | {"token": "learnable_token_idx"}
    names |= {"norm_weight": "ttt_norm_weight", "norm_bias": "ttt_norm_bias"}
    names |= {"rate_weight": "learnable_ttt_lr_weight", "rate_bias": "learnable_ttt_lr_bias"}
    for ours, attribute in names.items():
        shape = getattr(module, attribute).shape
        delattr(module, attribute)
        setattr(module, attribute, own[ours].view(shape))
    module.post_norm = module.o_proj = nn.Identity()
    monkeypatch.setattr(module, "get_qkv_projections", lambda *_, **__: (joined(q), joined(k), joined(v)))
    monkeypatch.setattr(theirs, "apply_rotary_pos_emb", lambda a, b, *_: (a, b))
    want = module(joined(q), position_ids=torch.arange(n).expand(BATCH, n)).unflatten(2, (HEADS, DIM)).transpose(1, 2)
    for label in ("ttt@eager", "ttt@chunked"):
        error = difference(attnbench.get(label)(q, k, v, weights=own, **setting), want, [q, k, v, *own.values()])
        print(f"{label} {inner} N={n}: {error:.1e}")
        assert error < bound


@pytest.mark.skipif(not VIT3, reason="ATTNBENCH_PEER_VIT3 names no checkout of github.com/LeapLabTHU/ViTTT")
@pytest.mark.parametrize("conv", [0, 3])
def test_vit3(monkeypatch: pytest.MonkeyPatch, conv: int) -> None:
    """Their module is given our queries, keys and values of both inner models, and our map as the output projection of the second."""
    trunc_normal = {"trunc_normal_": nn.init.trunc_normal_}
    theirs = load(
        monkeypatch, "vit3_authors", Path(VIT3) / "ttt_block.py", {"timm": {}, "timm.models": {}, "timm.models.layers": trunc_normal}
    )
    method, (q, k, v), sides = attnbench.get("vit3"), inputs(35), (5, 7)
    own = stirred(method, 35, conv=conv)
    module = theirs.TTT(HEADS * DIM, HEADS).double()
    for name in ("w1", "w2"):
        delattr(module, name)
        setattr(module, name, own[name].unsqueeze(0))
    heads = [joined(x) for x in (q, k, v)]
    branch = [torch.zeros(BATCH, 35, DIM, dtype=torch.float64)] * 3
    last = torch.zeros(DIM, HEADS * DIM, dtype=torch.float64)
    if conv:
        branch, last = [x @ own[f"conv_{name}"] for name, x in zip("qkv", heads, strict=True)], own["conv_out"]
        del module.w3
        module.w3 = own["kernel"].unsqueeze(1)
    del module.qkv, module.proj
    module.qkv = lambda _: torch.cat([*heads, *branch], -1)
    module.proj = lambda x: x @ torch.cat([torch.eye(HEADS * DIM, dtype=torch.float64), last])
    want = module(torch.empty(BATCH, 35, HEADS * DIM), *sides).unflatten(2, (HEADS, DIM)).transpose(1, 2)
    for label in ("vit3@eager", "vit3@chunked"):
        got = attnbench.get(label)(q, k, v, weights=own, conv=conv, grid="5x7")
        error = difference(got, want, [q, k, v, *own.values()])
        print(f"{label} conv={conv}: {error:.1e}")
        assert error < 1e-12
