"""Health: how a method routes the very q, k, v on which it is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench import health
from attnbench.eager import expand_heads
from attnbench.fastweights import recall

if TYPE_CHECKING:
    from attnbench.inputs import Inputs
    from attnbench.method import Method, Params, Weights

_ROWS = 512


def measure(method: Method, params: Params, inputs: Inputs, weights: Weights, **_: object) -> dict[str, float]:
    """Metrics of all queries and heads; those of `attnbench.health`, and

    - `mass_recalled`: mean softmax mass of the tokens that a query reads, at up to 512 queries; absent where no hidden unit is a token.

    Nothing where the method has no fast weights.
    """
    if method.experts is None:
        return {}
    q, k, v = inputs
    with torch.no_grad():
        fast = method.experts(q, k, v, params, **({"weights": weights} if weights else {}))
        result = health.health(fast, k.shape[2])
        rows = torch.linspace(0, q.shape[2] - 1, min(_ROWS, q.shape[2]), device=q.device).round().long()
        read = recall(fast, q, expand_heads(q, k, v)[0], rows, causal=params.causal)
    return result | ({"mass_recalled": float(read[0].mean())} if read is not None else {})
