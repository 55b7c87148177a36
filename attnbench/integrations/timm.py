"""Methods inside the vision transformers of timm: the mixing changes, the weights stay.

`swap_attention(model, "softmax")` changes nothing but the name; `restore(model)` puts back the very modules that were there.

>>> import timm, torch
>>> from attnbench.integrations.timm import preset, restore, swap_attention
>>> model = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=10)  # pretrained=True keeps its weights
>>> names = list(model.state_dict())
>>> model = swap_attention(model, "mita", landmarks=25, topk=25)  # told: 1 class token, a grid of 14 x 14
>>> model(torch.randn(1, 3, 224, 224)).shape
torch.Size([1, 10])
>>> list(model.state_dict()) == names
True
>>> type(restore(model).blocks[0].attn).__name__
'Attention'
>>> small = preset("deit-s", "agent", landmarks=49, model={"depth": 1})
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

import attnbench
from attnbench.errors import UserError, unknown
from attnbench.nn import _grid, _operator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from attnbench.method import Method
    from attnbench.nn._grid import Grid

__all__ = ["PRESETS", "Geometry", "SwappedAttention", "preset", "restore", "swap_attention"]

Model = TypeVar("Model", bound=nn.Module)

_ATTENTION = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
"""Classes that are swapped: plain multi-head self-attention, where versions of timm have it. Subclasses compute something else."""

_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
"""Submodules of them, which the swapped layer shares; some versions lack some."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a vision transformer."""

    timm: str
    """name in timm"""
    dim: int
    """channels C"""
    depth: int
    """blocks"""
    heads: int
    patch: int = 16
    """side of a patch, in pixels"""
    image: int = 224
    """side of an image, in pixels"""
    prefix: int = 1
    """class tokens"""

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in patches."""
        return self.image // self.patch, self.image // self.patch


PRESETS = {
    "deit-t": Geometry("deit_tiny_patch16_224", dim=192, depth=12, heads=3),
    "deit-s": Geometry("deit_small_patch16_224", dim=384, depth=12, heads=6),
}
"""The models of image classification in Wen et al. 2026, https://arxiv.org/abs/2602.01219; sizes of Touvron et al. 2021,
https://arxiv.org/abs/2012.12877."""


def preset(name: str, method: str = "softmax", *, model: Mapping[str, Any] | None = None, **params: object) -> nn.Module:
    """A freshly initialised model of `PRESETS` with the attention swapped; `model` goes to `timm.create_model`, as `num_classes`.

    Raises `UserError` for an unknown preset, and where timm cannot be imported.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise UserError(f"timm cannot be imported ({error}): pip install 'attnbench[timm]'") from None
    built: nn.Module = timm.create_model(PRESETS[name].timm, **(model or {}))
    return swap_attention(built, method, **params)


def swap_attention(model: Model, method: str, **params: object) -> Model:
    """Replace the mixing of every self-attention of a timm vision transformer by a method, in place; returns the model.

    `qkv`, norms, gate and `proj` are the same modules under the same names, so checkpoints still load. The method is told the class and
    register tokens (`model.num_prefix_tokens`) and the grid (`model.patch_embed.grid_size`) where it asks for them, and `params` win over
    that. Its learned parameters, if any, become `attn.operator`. Swapping again replaces the method.

    Raises `UserError` for a model without such attention, for attention dropout, and for parameters that make no sense.
    """
    found = attnbench.get(method)
    prefix, grid = int(getattr(model, "num_prefix_tokens", 0)), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    wanted = _grid.read(cast("Grid", params.get("grid", grid)))
    try:
        told = _operator.told(found, prefix, wanted, causal=False)
    except UserError as error:
        raise UserError(f"{error}, as timm makes it with class_token=False and global_pool='avg'") from None
    known = told | params | {name: value for name, value in told.items() if name == "grid"}  # as text
    tokens = None if grid is None else prefix + grid[0] * grid[1]

    def swapped(attention: nn.Module) -> nn.Module:
        original = attention.original if isinstance(attention, SwappedAttention) else attention
        return SwappedAttention(original, found, tokens, known)

    if not _replace(model, swapped, lambda m: isinstance(m, SwappedAttention) or _is_attention(m)):
        others = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        why = f"it has {', '.join(others)}, which is not plain self-attention" if others else "it has no attention at all"
        raise UserError(f"{type(model).__name__} has no attention to swap: {why}; give a ViT or DeiT of timm")
    return model


def restore(model: Model) -> Model:
    """Put back the modules that `swap_attention` replaced, with the weights as trained since; returns the model.

    Raises `UserError` where nothing was swapped.
    """
    if not _replace(model, lambda m: m.back() if isinstance(m, SwappedAttention) else m, lambda m: isinstance(m, SwappedAttention)):
        raise UserError(f"{type(model).__name__} has nothing to restore: swap_attention was not called on it")
    return model


def _is_attention(module: nn.Module) -> bool:
    """Whether it is of a class that we know, and has no part or parameter that we would leave out."""
    plain = not module._parameters and set(module._modules) <= set(_PARTS)
    return plain and f"{type(module).__module__}.{type(module).__qualname__}" in _ATTENTION


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every module below the model."""
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _replace(model: nn.Module, change: Callable[[nn.Module], nn.Module], wanted: Callable[[nn.Module], bool]) -> int:
    """Change every wanted module once, and all of them or none; returns how many."""
    places = [place for place in _places(model) if wanted(place[2])]
    new = {id(child): change(child) for _, _, child in {id(place[2]): place for place in places}.values()}
    for parent, name, child in places:
        setattr(parent, name, new[id(child)])
    return len(new)


class SwappedAttention(nn.Module):
    """timm's self-attention `[B, N, C]` -> `[B, N, C]` around a method: the projections and norms are those of the original module.

    `q, k, v = qkv(x)`, `o = method(q_norm(q), k_norm(k), v)`, `y = proj(norm(o) * sigmoid(gate(x)))`, norms and gate where there are any.
    """

    qkv: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    norm: nn.Module | None
    gate: nn.Module | None
    proj: nn.Linear
    proj_drop: nn.Dropout

    def __init__(self, original: nn.Module, method: Method, tokens: int | None, params: dict[str, Any]) -> None:
        super().__init__()
        if drop := getattr(getattr(original, "attn_drop", None), "p", 0):
            raise UserError(f"{method.name} cannot drop attention weights: make the model with attn_drop_rate=0, not {drop}")
        for name in sorted(_PARTS, key=[*original._modules, *_PARTS].index):  # in their order, as in `state_dict()`
            setattr(self, name, getattr(original, name, None))
        self._original = (original,)  # in a tuple, so that its weights are not counted twice
        self.method, self.num_heads = method, int(cast("int", original.num_heads))
        self.head_dim = self.qkv.out_features // (3 * self.num_heads)
        self.operator = _operator.build(method, self.num_heads, self.head_dim, tokens, params).to(self.qkv.weight)
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The module that was replaced."""
        return self._original[0]

    def back(self) -> nn.Module:
        """The original module, with what has become of its parts."""
        for name in _PARTS:
            if hasattr(self.original, name):
                setattr(self.original, name, getattr(self, name))
        return self.original.train(self.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`. Raises `UserError` for a mask."""
        if attn_mask is not None or is_causal:
            raise UserError(f"{self.method.name} in this model takes no mask: give images of one size, or restore(model)")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (x if norm is None else norm(x) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        out = _operator.mix(self.operator, q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        out = out if self.norm is None else self.norm(out)
        out = out if self.gate is None else out * self.gate(x).sigmoid()
        mixed: Tensor = self.proj_drop(self.proj(out))
        return mixed

    def extra_repr(self) -> str:
        """The method."""
        return f"method={self.method.label}"
