"""What a method promises beside its implementations, and what holds it to each promise: its definition, fast weights and cost.

Two results are the same where they differ by less than half the digits of float64: rounding stays far below that, and no other
computation reaches it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attnbench import fastweights
from attnbench.inputs import draw
from attnbench.method import EAGER
from attnbench.plausible import problems
from attnbench.taxonomy import DIMENSIONS
from attnbench.verify import UNDECLARED, verify

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.checks import Verdict
    from attnbench.inputs import Inputs
    from attnbench.method import Method, Params, Shape, Weights

SAME: float = torch.finfo(torch.float64).eps ** 0.5


@dataclass(frozen=True)
class Outcome:
    """What one part of a contract came to."""

    verdict: Verdict
    what: str
    """what is the same, or the reasons"""
    error: float | None = None
    bound: float | None = None


def settled(method: Method, shape: Shape, *, causal: bool) -> tuple[Params, list[str]]:
    """Parameters fitted to the shape, and why the definition does not take them there, if it does not."""
    params = method.parse({"causal": causal}).fitted(shape)
    return params, method.limits.reasons(shape, torch.float64, "cpu", params) + params.problems(shape)


def stirred(method: Method, shape: Shape, params: Params, dtype: torch.dtype = torch.float64) -> Weights:
    """Learned parameters moved off their initial values, where zeros and symmetries would hide mistakes."""
    g = torch.Generator().manual_seed(7)
    drawn = method.initial(shape, params, torch.empty(0, dtype=torch.float64))
    return {name: (x + 0.1 * torch.randn(x.shape, generator=g, dtype=x.dtype)).to(dtype) for name, x in drawn.items()}


def options(weights: Weights) -> dict[str, Any]:
    """Keywords of a call with these learned parameters."""
    return {"weights": weights} if weights else {}


def doubles(shape: Shape, seed: int = 0) -> Inputs:
    """Inputs in float64."""
    return draw("randn", shape, seed, torch.float64, "cpu")


def difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry that is wanted; infinite where it is no number."""
    error = float((got - want).abs().max() / want.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")  # noqa: PLR0124 (NaN)


def _held(errors: dict[str, float]) -> Outcome:
    what = max(errors, key=lambda name: errors[name])
    return Outcome("passed" if errors[what] <= SAME else "failed", what, errors[what], SAME)


def _said(found: list[str], passed: str) -> Outcome:
    return Outcome("failed", "; ".join(found)) if found else Outcome("passed", passed)


def declaration(method: Method, _shape: Shape, _params: Params) -> Outcome:
    """What a method says of itself is complete."""
    names = [item.name for item in method.implementations]
    fields = method.params.__dataclass_fields__.items()
    coordinates = {name: getattr(method.coordinates, name, None) for name in DIMENSIONS}
    checks = (
        (not method.title, "no title"),
        (not method.citation.url.startswith("https://"), f"citation.url = {method.citation.url!r}: give one that begins with https://"),
        (len(set(names)) < len(names), f"two implementations have one name: {', '.join(names)}"),
        (EAGER in names, f"an implementation is called {EAGER!r}, which is the reference's name: rename it"),
        (not inspect.getdoc(inspect.getmodule(method.reference)), "the module of the reference has no docstring that says what it is"),
        *((not isinstance(value, DIMENSIONS[name]), f"coordinates.{name} = {value!r} is no {DIMENSIONS[name].__name__}")
          for name, value in coordinates.items()),
        *((not field.metadata.get("doc"), f"parameter {name} has no description: use param(default, doc)") for name, field in fields),
    )  # fmt: skip
    return _said([problem for wrong, problem in checks if wrong], "title, citation, coordinates, parameters, names")


def reference(method: Method, shape: Shape, params: Params) -> Outcome:
    """The definition is finite and of the right form, is softmax attention where it says so (`exact`), some rows of it are rows of the
    whole, and a batch element is alone."""
    q, k, v = doubles(shape)
    whole, wanted = method.reference(q, k, v, params), (shape.batch, shape.heads, shape.n, shape.dim_v)
    if tuple(whole.shape) != wanted or whole.dtype != q.dtype:
        return Outcome("failed", f"output is {list(whole.shape)} {whole.dtype}, not {list(wanted)} {q.dtype}")
    if not bool(whole.isfinite().all()):
        return Outcome("failed", "output is not finite")
    last = slice(shape.batch - 1, shape.batch)
    errors = {"batch elements apart": difference(method.reference(q[last], k[last], v[last], params), whole[last])}
    if method.takes_rows:
        rows = torch.tensor(sorted({0, shape.n // 3, shape.n - 1}))
        errors["rows of the whole"] = difference(method.reference(q, k, v, params, rows=rows), whole[:, :, rows])
    if method.exact:
        softmax = scaled_dot_product_attention(q, k, v, is_causal=params.causal, enable_gqa=True)
        errors["softmax attention, which exact says it is"] = difference(whole, softmax)
    return _held(errors)


def experts(method: Method, shape: Shape, params: Params) -> Outcome:
    """The generic evaluation of the fast weights is the definition, with learned parameters as initialised and moved off."""
    if method.experts is None:
        return Outcome("unsupported", f"no fast weights: {method.no_experts}") if method.no_experts else Outcome("failed", UNDECLARED)
    if method.no_experts:
        return Outcome("failed", f"both experts and no_experts ({method.no_experts!r}) are given: leave one out")
    q, k, v = doubles(shape)
    errors = {}
    for name, own in {"fast weights": {}, "fast weights, learned parameters moved": options(stirred(method, shape, params))}.items():
        got = fastweights.apply(method.experts(q, k, v, params, **own), q)
        errors[name] = difference(got, method.reference(q, k, v, params, **own))
    return _held(errors)


def heads(method: Method, shape: Shape, params: Params) -> Outcome:
    """A head sees what other heads are given only where the method says so (`couples_heads`)."""
    q, k, v = doubles(shape)
    own = options(stirred(method, shape, params))
    before = method.reference(q, k, v, params, **own)
    for x in (q, k, v):
        x[:, 1] += torch.randn(x[:, 1].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    after = method.reference(q, k, v, params, **own)
    if difference(after[:, 1], before[:, 1]) <= SAME:
        return Outcome("failed", "the output of a head does not depend on what the head is given")
    others = [h for h in range(shape.heads) if h != 1]
    error = difference(after[:, others], before[:, others])
    if method.couples_heads:
        return _said(["couples_heads is declared, but no head sees another"] if error <= SAME else [], "heads coupled, as declared")
    return _held({"heads apart": error})


def causality(method: Method, shape: Shape, params: Params) -> Outcome:
    """In the causal form what comes later changes nothing before it, and changes what is after."""
    q, k, v = doubles(shape)
    before, cut = method.reference(q, k, v, params), shape.n * 5 // 8
    for x in (q, k, v):
        x[:, :, cut:] += 1.0
    after = method.reference(q, k, v, params)
    if difference(after[:, :, cut:], before[:, :, cut:]) <= SAME:
        return Outcome("failed", "outputs do not depend on the tokens beside them")
    return _held({"earlier outputs when later tokens change": difference(after[:, :, :cut], before[:, :, :cut])})


def coordinates(method: Method, _shape: Shape, _params: Params) -> Outcome:
    """Declared coordinates are among those that the fast weights show."""
    rows = verify(method)
    wrong = [f"{row.dimension}: declared {row.declared}, measured {' or '.join(row.measured)} ({row.why})" for row in rows if row.conflict]
    wrong += list(dict.fromkeys(f"cannot be measured: {row.why}" for row in rows if row.broken))
    blind = {row.dimension: row.why for row in rows if not row.measured}
    if not wrong and len(blind) == len(rows):
        return Outcome("unsupported", "; ".join(dict.fromkeys(blind.values())))
    seen = ", ".join(row.dimension for row in rows if row.measured)
    return _said(wrong, "; ".join([seen, *(f"{name} not measurable: {why}" for name, why in blind.items())]))


def cost(method: Method, shape: Shape, params: Params) -> Outcome:
    """The cost model holds what can be held without a machine: see `attnbench.plausible`."""
    return _said(problems(method, shape, params), "stages, reading, bytes, batch, size, growth")
