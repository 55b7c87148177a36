"""`performer`, `cosformer`, `focused_linear` and `polaformer` against independent implementations, with the same weights, in float64.

Their code is not part of this project. `ATTNBENCH_PEER_PERFORMER` names a checkout of https://github.com/lucidrains/performer-pytorch (read
at commit fc8b784; it needs `einops`), `ATTNBENCH_PEER_COSFORMER` one of https://github.com/OpenNLPLab/cosFormer (8e12da1),
`ATTNBENCH_PEER_FLATTEN` one of https://github.com/LeapLabTHU/FLatten-Transformer (abdb115), `ATTNBENCH_PEER_POLAFORMER` one of
https://github.com/ZacharyMeng/PolaFormer (44cdd39). Stand-ins take the place of what they import; projections are taken out.
`pytest -m peers -rP` prints the errors.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import attnbench
from attnbench.method import Shape

pytestmark = pytest.mark.peers
REPOSITORIES = {
    "PERFORMER": "lucidrains/performer-pytorch",
    "COSFORMER": "OpenNLPLab/cosFormer",
    "FLATTEN": "LeapLabTHU/FLatten-Transformer",
    "POLAFORMER": "ZacharyMeng/PolaFormer",
}
BATCH, HEADS, SIDE, DIM = 2, 3, 6, 8
TIMM: dict[str, dict[str, Any]] = {
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {"DropPath": nn.Identity, "to_2tuple": lambda x: (x, x), "trunc_normal_": nn.init.trunc_normal_},
}


def load(monkeypatch: pytest.MonkeyPatch, peer: str, path: str, imports: dict[str, dict[str, Any]]) -> Any:
    """A module of theirs, with stand-ins for what it imports; skips where there is no checkout."""
    checkout = os.environ.get(f"ATTNBENCH_PEER_{peer}")
    if not checkout:
        pytest.skip(f"ATTNBENCH_PEER_{peer} names no checkout of github.com/{REPOSITORIES[peer]}")
    for module, names in imports.items():
        stand_in = ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
    spec = importlib.util.spec_from_file_location(f"{peer.lower()}_authors", Path(checkout) / path)
    assert spec is not None
    assert spec.loader is not None
    loaded: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def inputs(n: int, keys: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    sizes = (n, keys or n, keys or n)
    return [torch.randn(BATCH, HEADS, size, DIM, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]


def stirred(method: attnbench.Method, n: int, **setting: object) -> dict[str, Tensor]:
    shape, g = Shape(BATCH, HEADS, n, DIM), torch.Generator().manual_seed(5)
    drawn = method.initial(shape, method.parse(setting), torch.empty(0, dtype=torch.float64))
    return {name: (x + 0.3 * torch.randn(x.shape, generator=g, dtype=x.dtype)).requires_grad_() for name, x in drawn.items()}


def joined(x: Tensor) -> Tensor:
    """`[B, H, N, D]` -> `[B, N, H D]`."""
    return x.transpose(1, 2).flatten(2)


def parted(x: Tensor) -> Tensor:
    """`[B, N, H D]` -> `[B, H, N, D]`."""
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def compare(name: str, want: Tensor, leaves: list[Tensor], setting: dict[str, object], own: dict[str, Tensor] | None = None) -> None:
    """Both implementations of ours, output and gradients of `leaves`, relative to the largest entry of each."""
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
    theirs = (want, *torch.autograd.grad(want, leaves, g, retain_graph=True))
    for label in (f"{name}@eager", f"{name}@chunked"):
        got = attnbench.get(label)(*leaves[:3], weights=own, **setting)
        ours = (got, *torch.autograd.grad(got, leaves, g))
        error = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
        print(f"{label} {setting}: {error:.1e}")
        assert error < 1e-11


def performer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of performer-pytorch."""
    pytest.importorskip("einops", reason="performer-pytorch imports einops")
    imports = {
        "local_attention": {"LocalAttention": None},
        "axial_positional_embedding": {"AxialPositionalEmbedding": None},
        "performer_pytorch": {},
        "performer_pytorch.reversible": {"ReversibleSequence": None, "SequentialSequence": None},
    }
    return load(monkeypatch, "PERFORMER", "performer_pytorch/performer_pytorch.py", imports)


@pytest.mark.parametrize("lengths", ["gaussian", "fixed"])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("causal", [False, True])
def test_performer(monkeypatch: pytest.MonkeyPatch, causal: bool, kernel: str, lengths: str) -> None:
    """Causal, the first key is the one with the largest score, or their stabiliser would be another; and they add nothing to sums."""
    theirs = performer(monkeypatch)
    from attnbench.methods.performer import directions

    setting = {"causal": causal, "kernel": kernel, "lengths": lengths, "seed": 3}
    method, (q, k, v) = attnbench.get("performer"), inputs(150)
    params = method.parse(setting)
    rows = directions(params, DIM, torch.float64, torch.device("cpu"))
    if causal and kernel == "softmax":
        with torch.no_grad():
            k[:, :, 0] = rows[rows.norm(dim=1).argmax()] * 2
    attention = theirs.FastAttention(DIM, ortho_scaling=int(lengths == "fixed"), causal=causal, generalized_attention=kernel == "relu")
    assert attention.projection_matrix.shape == rows.shape
    attention.projection_matrix = rows
    attention.causal_linear_fn = partial(theirs.causal_linear_attention_noncuda, eps=0.0)
    compare("performer", attention(q, k, v), [q, k, v], setting)


def test_performers_directions_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs and ours: orthogonal in blocks, a last one cut short, lengths of the same mean."""
    theirs = performer(monkeypatch)
    from attnbench.methods.performer import directions

    params = attnbench.get("performer").parse({"features": 150})
    torch.manual_seed(0)
    drawn = (theirs.gaussian_orthogonal_random_matrix(150, 64), directions(params, 64, torch.float32, torch.device("cpu")))
    for x in drawn:
        unit = x / x.norm(dim=1, keepdim=True)
        for block in unit.split(64):
            torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=1e-5)
    means = [float(x.norm(dim=1).mean()) for x in drawn]
    assert abs(means[0] - means[1]) < 4 * 0.71 * (2 / 150) ** 0.5  # the standard deviation of a length is near 0.71


@pytest.mark.parametrize("keys", [0, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_cosformer(monkeypatch: pytest.MonkeyPatch, causal: bool, keys: int) -> None:
    """Their positions are put in float64; they make them in float32."""
    if causal and keys:
        pytest.skip("causal, each query has its key")
    theirs = load(monkeypatch, "COSFORMER", "cosformer.py", {})
    q, k, v = inputs(37, keys)
    module = theirs.CosformerAttention(HEADS * DIM, HEADS, causal=causal, has_outproj=False)
    module.q_proj = module.k_proj = module.v_proj = nn.Identity()
    monkeypatch.setattr(module, "get_index", lambda n: torch.pi / 2 * torch.arange(1, n + 1, dtype=torch.float64).view(1, -1, 1))
    want = module(*(joined(x).transpose(0, 1) for x in (q, k, v)))
    compare("cosformer", parted(want.transpose(0, 1)), [q, k, v], {"causal": causal})


def placed(module: nn.Module, own: dict[str, Tensor]) -> None:
    """Give a module of theirs our weights."""
    tokens = SIDE**2
    position = joined(own["position"].unsqueeze(0)) if "position" in own else torch.zeros(1, tokens, HEADS * DIM, dtype=torch.float64)
    values = {"scale": own["scale"].reshape(1, 1, -1), "positional_encoding": position}
    if "power" in own:
        values["power"] = own["power"].view(1, HEADS, 1, DIM)
    for name, value in values.items():
        delattr(module, name)
        setattr(module, name, value)
    del module.dwc, module.proj
    module.proj = nn.Identity()
    if "conv" in own:
        module.dwc = partial(conv2d, weight=own["conv"].unsqueeze(1), bias=own["conv_bias"], padding=own["conv"].shape[-1] // 2, groups=DIM)
    else:
        module.dwc = torch.zeros_like


@pytest.mark.parametrize("beside", [{}, {"position": True, "conv": 5}, {"power": 4.5}], ids=str)
def test_focused_linear(monkeypatch: pytest.MonkeyPatch, beside: dict[str, object]) -> None:
    theirs = load(monkeypatch, "FLATTEN", "models/flatten_swin.py", TIMM)
    method, (q, k, v) = attnbench.get("focused_linear"), inputs(SIDE**2)
    own = stirred(method, SIDE**2, **beside)
    module = theirs.FocusedLinearAttention(HEADS * DIM, (SIDE, SIDE), HEADS, focusing_factor=beside.get("power", 3)).double()
    placed(module, own)
    del module.qkv
    module.qkv = lambda _: torch.cat([joined(x) for x in (q, k, v)], -1)
    want = module(torch.empty(BATCH, SIDE**2, HEADS * DIM))
    compare("focused_linear", parted(want), [q, k, v, *own.values()], beside, own)


@pytest.mark.parametrize("beside", [{}, {"position": True, "conv": 5, "gate": True}, {"alpha": 2.5}], ids=str)
def test_polaformer(monkeypatch: pytest.MonkeyPatch, beside: dict[str, object]) -> None:
    theirs = load(monkeypatch, "POLAFORMER", "models/pola_swin.py", TIMM)
    method, (q, k, v) = attnbench.get("polaformer"), inputs(SIDE**2)
    own = stirred(method, SIDE**2, **beside)
    module = theirs.PolaLinearAttention(HEADS * DIM, (SIDE, SIDE), HEADS, alpha=beside.get("alpha", 4)).double()
    placed(module, own)
    del module.qkvg
    gate = joined(q) @ own["gate"].T + own["gate_bias"] if "gate" in own else torch.ones_like(joined(q))
    module.qkvg = lambda _: torch.cat([*(joined(x) for x in (q, k, v)), gate], -1)
    want = module(torch.empty(BATCH, SIDE**2, HEADS * DIM), SIDE, SIDE)
    compare("polaformer", parted(want), [q, k, v, *own.values()], beside, own)
