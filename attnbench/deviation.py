"""How far an implementation is from the float64 definition, and how far it may be.

Errors are the root mean square and the maximum of the difference, relative to the root mean square of what is wanted. Of methods that
select by score they are quantiles of the error per row, and the share of rows that are far off.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Results = dict[str, Tensor]

_FACTOR = {"out": 2.0}
_BY_ROW = ("out", "dq", "dk", "dv")
"""what has a row a token; the gradient of a learned parameter sums over tokens, and with them over flipped choices"""
_BACKWARD_FACTOR = 3.0


def held(got: Results, eager: Results, want: Results, epsilon: float, *, selective: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of `got`, and the bounds that the errors of the eager run in the same precision set for them; both against `want`.

    All three hold the output `out` and gradients by name, `epsilon` is the `rounding` of their inputs.
    """
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for name in want:
        factor = _FACTOR.get(name, _BACKWARD_FACTOR)
        by_row = selective and name in _BY_ROW
        mine, theirs = (_errors(x[name], want[name], by_row) for x in (got, eager))
        for measure, value in mine.items():
            errors[f"{name} {measure}"] = value
            bounds[f"{name} {measure}"] = _bound(measure, theirs[measure], factor, epsilon, want[name])
        if by_row:
            limit = 10 * bounds[f"{name} p90"]
            share, allowed = (float((_row_errors(x[name], want[name]) > limit).double().mean()) for x in (got, eager))
            count = _row_errors(want[name], want[name]).numel()
            errors[f"{name} far"] = share
            bounds[f"{name} far"] = 2 * allowed + 3 * (max(allowed, 1 / count) / count) ** 0.5
    return errors, bounds


def rounding(q: Tensor, k: Tensor) -> float:
    """Rounding that any order of the sums may cause: the output's own, and an accumulator's over M + D terms."""
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return float(torch.finfo(q.dtype).eps / 2 + torch.finfo(accumulator).eps * (k.shape[2] + q.shape[3]) ** 0.5)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _row_errors(got: Tensor, want: Tensor) -> Tensor:
    """Error of each row that is not zero on both sides, relative to the root mean square of all such rows."""
    got, want = got.double(), want.double()
    norms = want.norm(dim=-1)
    live = (norms > 0) | (got.norm(dim=-1) > 0)
    typical = norms[live].square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    errors: Tensor = (got - want).norm(dim=-1)[live] / typical
    return errors if errors.numel() else norms.new_zeros(1)


def _errors(got: Tensor, want: Tensor, selective: bool) -> dict[str, float]:
    if selective:
        rows = _row_errors(got, want)
        return {"p50": _quantile(rows, 0.5), "p90": _quantile(rows, 0.9)}
    scale = max(_rms(want), torch.finfo(torch.float64).tiny)
    difference = got.double() - want.double()
    return {"rms": _rms(difference) / scale, "max": float(difference.abs().max()) / scale}


def _quantile(x: Tensor, p: float) -> float:
    rank = max(1, min(x.numel(), round(p * x.numel())))
    return float(x.kthvalue(rank).values)


def _bound(measure: str, eager: float, factor: float, epsilon: float, want: Tensor) -> float:
    """`factor` times the eager error, plus epsilon of a typical entry, or of the largest where the maximum is bounded.

    Over n entries the eager error is one draw, and so is the error held against it: their ratio is known to a share of about
    `1 / sqrt(n)`, three of which are allowed. That is nothing for outputs, but something for the gradient of a bias.
    """
    peak = float(want.abs().max()) / max(_rms(want), torch.finfo(torch.float64).tiny) if measure == "max" else 1.0
    return factor * (1 + 3 / math.sqrt(want.numel())) * eager + epsilon * max(1.0, peak)
