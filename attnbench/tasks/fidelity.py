"""Fidelity: how well a method imitates float64 softmax attention on the same q, k, v, with no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import attend, causal_mask, expand_heads
from attnbench.fastweights import recall, width_per_query

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from attnbench.inputs import Inputs
    from attnbench.method import Method, Params, Weights

_ROWS = 512


def measure(
    method: Method, params: Params, inputs: Inputs, weights: Weights, *, forward: Callable[[], Tensor], layout: str
) -> dict[str, float]:
    """Metrics at up to 512 queries of every head.

    - `rel_error`: Frobenius norm of the difference over that of softmax attention.
    - `cosine`: mean cosine of output rows.
    - `width`: mean number of hidden units that a query reads; absent where the method has no fast weights.
    - `mass_recalled`: mean softmax mass of the tokens that a query reads; absent where no hidden unit is a token.
    - `top1_agreement`: share of queries that read the token which softmax weighs most; absent likewise.
    """
    q, k, v = inputs
    rows = torch.linspace(0, q.shape[2] - 1, min(_ROWS, q.shape[2]), device=q.device).round().long()
    with torch.no_grad():
        out = forward()
        got = (out.transpose(1, 2) if layout == "bnhd" else out)[:, :, rows].double()
        want = softmax_rows(inputs, rows, causal=params.causal)
        result = {
            "rel_error": float((got - want).norm() / want.norm()),
            "cosine": float(torch.nn.functional.cosine_similarity(got, want, dim=-1).mean()),
        }
        if method.experts is not None:
            own = {"weights": weights} if weights else {}
            fast = method.experts(q, k, v, params, **own)
            result["width"] = width_per_query(fast)
            read = recall(fast, q, expand_heads(q, k, v)[0], rows, causal=params.causal)
            if read is not None:
                result |= {"mass_recalled": float(read[0].mean()), "top1_agreement": float(read[1].double().mean())}
    return result


def softmax_rows(inputs: Inputs, rows: Tensor, *, causal: bool) -> Tensor:
    """float64 softmax attention `[B, H, R, Dv]` of the queries at `rows`, one head at a time to bound memory."""
    q, k, v = inputs[0], *expand_heads(*inputs)
    mask = causal_mask(rows, k.shape[2]) if causal else None
    heads = [
        attend(q[:, h : h + 1, rows].double(), k[:, h : h + 1].double(), v[:, h : h + 1].double(), q.shape[-1] ** -0.5, mask)
        for h in range(q.shape[1])
    ]
    return torch.cat(heads, 1)
