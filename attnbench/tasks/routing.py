"""Routing of a trained model: which tokens no expert keeps, and how evenly queries spread over experts.

Tokens that no expert of a layer keeps are pruned from that layer: no query can read them there, whatever it asks for. MiTA's authors see
this emerge on images, https://arxiv.org/abs/2602.01219.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnbench.fastweights import kept, load

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.batches import Prepared
    from attnbench.nn import TinyTransformer

_EXAMPLES = 8
"""examples looked at: fast weights of a long sequence are large"""


@dataclass(frozen=True)
class Layer:
    """Routing of one layer on some examples."""

    kept: Tensor | None
    """`[B, H, N]`: tokens that at least one expert of the head holds; None where experts hold no tokens"""
    load: Tensor | None
    """`[B, H, E]`: queries of each routed expert; None where nothing is routed"""

    @property
    def pruned(self) -> float | None:
        """Share of (example, head, token) that no expert keeps."""
        return None if self.kept is None else float(1 - self.kept.double().mean())

    @property
    def busiest(self) -> float | None:
        """Queries of the busiest expert over those of a mean one, averaged over examples and heads."""
        if self.load is None:
            return None
        counts = self.load.double()
        return float((counts.amax(-1) / counts.mean(-1).clamp(min=1e-9)).mean())


def layers(model: TinyTransformer, batch: Prepared) -> list[Layer]:
    """The routing of each layer on the first examples of a batch; empty where the method has no fast weights."""
    operators: list[Any] = list(model.operators)
    if any(getattr(operator, "method", None) is None or operator.method.experts is None for operator in operators):
        return []
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [o.register_forward_pre_hook(lambda _, arguments: seen.append(arguments)) for o in operators]
    try:
        with torch.no_grad():
            model.features(batch.inputs[:_EXAMPLES])
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer(operator, *qkv) for operator, qkv in zip(operators, seen, strict=True)]


def _layer(operator: Any, q: Tensor, k: Tensor, v: Tensor) -> Layer:
    own = {"weights": dict(operator.weights.items())} if hasattr(operator, "weights") else {}
    with torch.no_grad():
        fast = operator.method.experts(q.float(), k.float(), v.float(), operator.params, **own)
    held = any(bank.index is not None for bank in fast.banks)
    routed = [bank for bank in fast.banks if bank.routes is not None]
    return Layer(kept(fast, k.shape[2]) if held else None, load(routed[0]) if routed else None)
