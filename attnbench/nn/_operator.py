"""The operator of a layer: what its method learns of the layer, and the module that owns its learned weights."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from attnbench.errors import UserError
from attnbench.method import Shape

from . import _grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from attnbench.method import Method

    from ._grid import Grid

_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""types of device that know autocast; asked here, since torch 2.11 cannot trace the question"""
_LENGTHS = 16 * 16, 24 * 24
"""numbers of tokens at which learned weights are compared where none is given"""


def told(method: Method, prefix: int, grid: Grid, *, causal: bool) -> dict[str, Any]:
    """What the method learns of the layer, as far as it asks for it; of a square, where it may have to skip a prefix.

    Raises `UserError` where the method has no place for a prefix or no causal form.
    """
    asked = {f.name for f in fields(method.params)}
    if causal and method.limits.no_causal:
        raise UserError(f"{method.name} has no causal form: {method.limits.no_causal}")
    if prefix and "grid" in asked and "prefix" not in asked and (grid is None or _grid.is_known(grid)):
        raise UserError(f"{method.name} lays all tokens on its grid, class and register tokens too: average tokens instead, prefix = 0")
    known: dict[str, Any] = {"causal": causal, "prefix": prefix}
    if grid is not None and (grid != _grid.SQUARE or "prefix" in asked):
        known["grid"] = _grid.text(grid)
    return {name: value for name, value in known.items() if name in asked}


def build(method: Method, heads: int, dim: int, tokens: int | None, params: dict[str, Any]) -> nn.Module:
    """The operator for heads of `dim` channels; without `tokens`, for any number of them.

    Raises `UserError` for parameters that make no sense, and without `tokens` where learned weights depend on it.
    """
    shapes = [Shape(1, heads, n, dim) for n in (_LENGTHS if tokens is None else (tokens,))]
    if tokens is not None and (problems := method.parse(params).problems(shapes[0])):
        raise UserError(f"{method.name}: {'; '.join(problems)}")
    built = [method.build(shape, **params) for shape in shapes]
    sizes = [{name: x.shape for name, x in module.state_dict().items()} for module in built]
    if sizes[0] != sizes[-1]:
        raise UserError(f"learned weights of {method.name} depend on the number of tokens: give tokens = N or grid = (height, width)")
    return built[0]


def mix(operator: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator, outside autocast: what it computes in float32 stays so, and a module of a method casts its own weights."""
    device = q.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return operator(q, k, v)
    with torch.autocast(device, enabled=False):
        return operator(q, k, v)
