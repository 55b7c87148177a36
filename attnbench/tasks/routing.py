"""Routing of a trained model: which tokens no expert keeps, and how evenly queries spread over experts.

Tokens that no expert of a layer keeps are pruned from that layer: no query can read them there, whatever it asks for, but as part of what a
shared expert compresses. MiTA's authors see this emerge on images, https://arxiv.org/abs/2602.01219.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnbench.fastweights import kept, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from attnbench.batches import Prepared
    from attnbench.nn import TinyTransformer

_EXAMPLES = 8
"""examples looked at: fast weights of a long sequence are large"""
PICTURED = 2
"""examples whose map of kept tokens is recorded"""
LEVELS = 11
"""points at which the load of experts is recorded, from the busiest to the idlest"""


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
        return self.loads[0]

    @property
    def loads(self) -> tuple[float, ...]:
        """Queries of an expert over those of a mean one, at `LEVELS` even places from the busiest expert to the idlest.

        Averaged over examples and heads; places between two experts are interpolated. Empty where nothing is routed.
        """
        if self.load is None:
            return ()
        counts = self.load.double()
        ranked = (counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)).sort(-1, descending=True).values.mean((0, 1))
        places = np.linspace(0, len(ranked) - 1, LEVELS)
        return tuple(np.interp(places, np.arange(len(ranked)), ranked.cpu().numpy()).tolist())


def summary(layers: Sequence[Layer], tokens: int, *, pictures: bool) -> dict[str, tuple[Any, ...]]:
    """What a record keeps of the routing of a model, by field of `attnbench.record.Training`: `pruned`, `busiest`, `loads`, `kept`.

    Maps of the last `tokens` tokens of the first examples are kept with `pictures` alone.
    """
    held = [layer for layer in layers if layer.kept is not None]
    return {
        "pruned": tuple(layer.pruned for layer in held),
        "busiest": tuple(x for layer in layers if (x := layer.busiest) is not None),
        "loads": tuple(layer.loads for layer in layers if layer.loads),
        "kept": tuple(packed(_heads(layer.kept, tokens)) for layer in held if layer.kept is not None) if pictures else (),
    }


def _heads(kept: Tensor, tokens: int) -> np.ndarray:
    """`[B, H, N]` -> `[PICTURED, N]`: heads in which some expert keeps each token of the first examples."""
    found: np.ndarray = kept[:PICTURED, :, kept.shape[2] - tokens :].sum(1).to(torch.uint8).cpu().numpy()
    return found


def packed(heads: np.ndarray) -> str:
    """Numbers of heads, a byte each, deflated, as text."""
    return base64.b64encode(zlib.compress(heads.tobytes(), 9)).decode()


def unpacked(text: str, tokens: int) -> np.ndarray:
    """What `packed` packed, `[examples, N]`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8).reshape(-1, tokens)


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
