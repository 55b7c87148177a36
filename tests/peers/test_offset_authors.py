"""`deformable` and `dat` against their authors' own modules, with the same weights, in float64 on the CPU.

Their code is not part of this project: `ATTNBENCH_PEER_DEFORMABLE` names a checkout of https://github.com/fundamentalvision/Deformable-DETR
(read at commit 11169a6), of which the sampling is their `ms_deform_attn_core_pytorch`; `ATTNBENCH_PEER_DAT` one of
https://github.com/LeapLabTHU/DAT (32173fc), which needs `einops`, `ATTNBENCH_PEER_DAT_2022` one at commit 81c67ea. Stand-ins take the place
of timm and of a compiled extension. Projections are taken out. `pytest -m peers -rP` prints the errors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import attnbench
from attnbench.method import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.peers
DEFORMABLE, DAT, DAT_2022 = (os.environ.get(f"ATTNBENCH_PEER_{name}", "") for name in ("DEFORMABLE", "DAT", "DAT_2022"))
BATCH, HEADS, DIM = 2, 4, 8


def load(name: str, path: Path) -> Any:
    """A module of theirs."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def inputs(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(BATCH, HEADS, n, DIM, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


def stirred(method: attnbench.Method, n: int, **setting: object) -> dict[str, Tensor]:
    shape, g = Shape(BATCH, HEADS, n, DIM), torch.Generator().manual_seed(5)
    drawn = method.initial(shape, method.parse(setting), torch.empty(0, dtype=torch.float64))
    return {name: (x + 0.2 * torch.randn(x.shape, generator=g, dtype=x.dtype)).requires_grad_() for name, x in drawn.items()}


def give(module: nn.Module, **values: Tensor) -> None:
    """Put tensors in the place of parameters."""
    for name, value in values.items():
        shape = getattr(module, name).shape
        delattr(module, name)
        setattr(module, name, value.reshape(shape))


def difference(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> float:
    """Largest error of the output and of the gradients of `leaves`, relative to the largest entry of each."""
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=ours.dtype)
    pairs = [(ours, theirs), *zip(*(torch.autograd.grad(x, leaves, g, retain_graph=True) for x in (ours, theirs)), strict=True)]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


@pytest.mark.skipif(not DEFORMABLE, reason="ATTNBENCH_PEER_DEFORMABLE names no checkout of github.com/fundamentalvision/Deformable-DETR")
@pytest.mark.parametrize("points", [1, 4])
def test_deformable(monkeypatch: pytest.MonkeyPatch, points: int) -> None:
    stand_in(monkeypatch, "MultiScaleDeformableAttention")
    folder = Path(DEFORMABLE) / "models" / "ops"
    functions = load("deformable_functions", folder / "functions" / "ms_deform_attn_func.py")

    class Core:
        @staticmethod
        def apply(value: Tensor, shapes: Tensor, _: Tensor, places: Tensor, shares: Tensor, _step: int) -> Tensor:
            out: Tensor = functions.ms_deform_attn_core_pytorch(value, shapes.tolist(), places, shares)
            return out

    for package in ("deformable_ops", "deformable_ops.modules"):
        stand_in(monkeypatch, package, __path__=[])
    stand_in(monkeypatch, "deformable_ops.functions", MSDeformAttnFunction=Core)
    theirs = load("deformable_ops.modules.ms_deform_attn", folder / "modules" / "ms_deform_attn.py")
    module = theirs.MSDeformAttn(HEADS * DIM, 1, HEADS, points).double()
    method, n, (height, width) = attnbench.get("deformable"), 35, (5, 7)
    drawn = method.initial(Shape(BATCH, HEADS, n, DIM), method.parse({"points": points}), torch.empty(0, dtype=torch.float64))
    assert torch.allclose(module.sampling_offsets.bias, drawn["offset_bias"].flatten(), atol=1e-6)
    (q, k, v), own = inputs(n), stirred(method, n, points=points)
    give(module.sampling_offsets, weight=own["offset_weight"], bias=own["offset_bias"])
    give(module.attention_weights, weight=own["point_weight"], bias=own["point_bias"])
    module.value_proj = module.output_proj = nn.Identity()
    centres = torch.stack([torch.arange(n) % width, torch.arange(n) // width], -1).double() + 0.5
    reference = centres / torch.tensor([width, height])
    want = module(
        q.transpose(1, 2).flatten(2), reference.view(1, n, 1, 2).expand(BATCH, -1, -1, -1), v.transpose(1, 2).flatten(2),
        torch.tensor([[height, width]]), torch.zeros(1, dtype=torch.long),
    ).unflatten(2, (HEADS, DIM)).transpose(1, 2)  # fmt: skip
    for label in ("deformable@eager", "deformable@chunked"):
        got = attnbench.get(label)(q, k, v, weights=own, points=points, grid="5x7")
        error = difference(got, want, [q, v, *own.values()])
        print(f"{label} points={points}: {error:.1e}")
        assert error < 1e-12


@pytest.fixture
def dat_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In float64 their constants too."""
    pytest.importorskip("einops", reason="the authors' module imports einops")
    names = {"to_2tuple": lambda x: (x, x), "trunc_normal_": nn.init.trunc_normal_}
    for module in ("timm", "timm.models", "timm.models.layers"):
        stand_in(monkeypatch, module, **names)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SETTINGS = [
    ("2023", {"stride": 2, "kernel": 5, "bias": True}),
    ("2023", {"stride": 1, "kernel": 3, "bias": False}),
    ("2023", {"stride": 4, "kernel": 4, "reach": 3.0, "bias": True}),
    ("2022", {"stride": 1, "kernel": 5, "reach": 2.0, "bias": True}),
    ("2022", {"stride": 1, "kernel": 5, "bias": True}),
]


@pytest.mark.usefixtures("dat_imports")
@pytest.mark.parametrize(("release", "setting"), SETTINGS)
def test_dat(release: str, setting: dict[str, Any]) -> None:
    """One image is queries, keys and values: their maps are the identity. A side of 14 makes the kernel of 2022 5 wide."""
    checkout = DAT if release == "2023" else DAT_2022
    if not checkout:
        pytest.skip(f"ATTNBENCH_PEER_DAT{'' if release == '2023' else '_2022'} names no checkout of github.com/LeapLabTHU/DAT")
    theirs = load(f"dat_{release}", Path(checkout) / "models" / "dat_blocks.py")
    n, sides, groups = 196, (14, 14), 2
    kv = tuple(side // setting["stride"] for side in sides)
    module = theirs.DAttentionBaseline(
        sides, kv, HEADS, DIM, groups, 0.0, 0.0, setting["stride"], setting.get("reach", -1), setting["bias"], False, False, False,
        **({"ksize": setting["kernel"], "log_cpb": False} if release == "2023" else {}),
    ).double()  # fmt: skip
    method, values = attnbench.get("dat"), {**setting, "release": release}
    own, (x, _, _) = stirred(method, n, **values), inputs(n)
    conv, norm, last = module.conv_offset[0], module.conv_offset[1].norm, module.conv_offset[3]
    give(conv, weight=own["conv_weight"], bias=own["conv_bias"])
    give(norm, weight=own["norm_weight"], bias=own["norm_bias"])
    give(last, weight=own["offset_weight"])
    if setting["bias"]:
        give(module, rpe_table=own["table"])
    for name in ("proj_q", "proj_k", "proj_v", "proj_out"):
        setattr(module, name, nn.Identity())
    image = x.transpose(2, 3).reshape(BATCH, HEADS * DIM, *sides)
    want = module(image)[0].reshape(BATCH, HEADS, DIM, n).transpose(2, 3)
    for label in ("dat@eager", "dat@sdpa"):
        error = difference(attnbench.get(label)(x, x, x, weights=own, **values), want, [x, *own.values()])
        print(f"{label} {release} {setting}: {error:.1e}")
        assert error < 1e-11
