"""What lies between the operators of a model, compiled: norms, projections, positions, the MLP, the loss.

A small model is bound by memory traffic and launches between its matrix products, which are the same for every method; a compiler fuses
them. The operator stays what the registry chose. https://docs.pytorch.org/docs/stable/generated/torch.compile.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .block import Block

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .transformer import TinyTransformer

_SHAPES = 256
"""sizes that one process may compile the same lines for: each length of a suite, in training and in evaluation"""


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, compiled at its first call for the sizes that it is then given, and again for others."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * _SHAPES)
    out: Callable[..., Any] = torch.compile(work, dynamic=False)
    return out


def fuse(model: TinyTransformer) -> None:
    """From now on the model computes all but its operators in compiled kernels, until it is dropped: a copy of it would compute with its
    weights, and hooks of its attention layers are no longer called. Blocks of the same sizes share what is compiled, unless their
    `drop_path` differs."""
    if any(not isinstance(block, Block) for block in getattr(model, "blocks", [None])):
        return
    model.begin, model.end = compiled(model.begin), compiled(model.end)  # type: ignore[method-assign]
    for block in model.blocks:
        block.forward = _Fused(block)


class _Fused:
    """The forward pass of a block in two compiled parts, with the operator between them."""

    def __init__(self, block: nn.Module) -> None:
        assert isinstance(block, Block)
        self.mix, self.before, self.after = block.attention.mix, compiled(block.before), compiled(block.after)

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v, *gate = self.before(x)
        out: Tensor = self.after(x, self.mix(q, k, v), v, *gate)
        return out
