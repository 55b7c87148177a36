"""The gate: an implementation against its method's float64 definition, before any number of it is believed.

The bound is relative: the error may not exceed that of the definition run eagerly in the same precision by more than a factor (2
forward, 3 backward) plus an epsilon from the reduction sizes and what chance makes of an error over few entries. Methods that select
by score are held by the quantiles of the error per row, since rounding may legally flip a near tie; rows far off may not be more
frequent than in the eager run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnbench.deviation import held, rounding
from attnbench.method import Implementation, Method, Params, Shape, Weights, resolve
from attnbench.record import Gate
from attnbench.sample import output_gradient, sampled

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnbench.inputs import Inputs
    from attnbench.sample import Sample

_FIT_ELEMENTS = 1 << 26
"""scores of a whole definition that still fit, where it cannot be sampled"""


def gate(
    method: Method,
    implementation: Implementation,
    params: Params,
    inputs: Inputs,
    weights: Weights | None = None,
    *,
    backward: bool,
    rows: int = 256,
    repeat: bool = True,
) -> Gate:
    """Hold an implementation against the definition on these inputs and learned parameters.

    Compared are the output at sampled queries of up to two heads (of all, where heads share learned parameters) and, with `backward`,
    the gradients of the three inputs and of the learned parameters under an output gradient that lives on those queries: `rows` of them,
    fewer where all heads of a long sequence are compared. `repeat` runs a second time, to see whether the bits are the same.
    """
    inputs = _shortened(method, inputs)
    q, k, v = inputs
    weights = method.initial(Shape.of(*inputs), params, q) if weights is None else weights
    sample = sampled(method, q, k, rows)
    grad = output_gradient(q, v, sample) if backward else None
    _poison(q, v)

    def run(a: Tensor, b: Tensor, c: Tensor, own: Weights) -> Tensor:
        return method.run(implementation, a, b, c, params, weights=own or None)

    look = _observed if implementation.operators else _unobserved
    got, seen = look(run, inputs, weights, grad, sample)
    again = _evaluate(run, inputs, weights, grad, sample) if repeat else None
    operator, fallback = _operator(implementation, seen, inputs, params)
    want, eager = (_definition(method, params, inputs, weights, sample, grad=grad, dtype=dtype) for dtype in (torch.float64, q.dtype))
    if fallback or (problem := _malformed(got, want, q)):
        reason = fallback or problem
        return Gate(False, {reason: float("inf")}, {reason: 0.0}, q.shape[2], 0, 0, None, operator)
    errors, bounds = held(got, eager, want, rounding(q, k), selective=method.selective)
    passed = all(errors[key] <= bounds[key] for key in errors)
    same = all(torch.equal(got[name], again[name]) for name in got) if again else None
    return Gate(
        passed, errors, bounds, q.shape[2], len(sample.rows) if sample.rows is not None else q.shape[2], len(sample.heads), same, operator
    )


def _shortened(method: Method, inputs: Inputs) -> Inputs:
    q, k, _ = inputs
    if method.takes_rows or q.shape[2] * k.shape[2] <= _FIT_ELEMENTS:
        return inputs
    n = int(_FIT_ELEMENTS**0.5)
    a, b, c = (x[:, :, :n].contiguous() for x in inputs)
    return a, b, c


def _poison(q: Tensor, v: Tensor) -> None:
    """Leave NaN in freed memory of the output's size, so that an element nobody writes shows."""
    blocks = [torch.full((*q.shape[:3], v.shape[-1]), float("nan"), dtype=q.dtype, device=q.device) for _ in range(3)]
    del blocks


def _evaluate(run: Callable[..., Tensor], inputs: Inputs, weights: Weights, grad: Tensor | None, sample: Sample) -> dict[str, Tensor]:
    """Output, and gradients where `grad` is given, at the sample; the raw output's shape and dtype are kept as they are."""
    leaves = [x.detach().requires_grad_(grad is not None) for x in (*inputs, *weights.values())]
    with torch.set_grad_enabled(grad is not None):
        out = run(*leaves[:3], dict(zip(weights, leaves[3:], strict=True)))
    if out.shape != (*inputs[0].shape[:3], inputs[2].shape[-1]):
        return {"out": out.detach()}
    result = {"out": sample.output(out.detach())}
    if grad is not None:
        grads = _gradients(out, leaves, weights, grad)
        part, heads = slice(sample.batch, sample.batch + 1), {"dq": sample.heads, "dk": sample.kv_heads, "dv": sample.kv_heads}
        result |= {name: g[part, heads[name]] if name in heads else g for name, g in grads.items()}
    return result


def _gradients(out: Tensor, leaves: list[Tensor], weights: Weights, grad: Tensor) -> dict[str, Tensor]:
    """`dq`, `dk`, `dv` and `d` before the name of each learned parameter; zero where the output does not depend on it."""
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    names = ("dq", "dk", "dv", *(f"d{name}" for name in weights))
    return {name: torch.zeros_like(x) if g is None else g for name, g, x in zip(names, found, leaves, strict=True)}


def _observed(
    run: Callable[..., Tensor], inputs: Inputs, weights: Weights, grad: Tensor | None, sample: Sample
) -> tuple[dict[str, Tensor], set[str]]:
    """`_evaluate`, and the names of the torch operators that it dispatched."""
    with profile(activities=[ProfilerActivity.CPU]) as p:
        result = _evaluate(run, inputs, weights, grad, sample)
    return result, {e.key for e in p.key_averages()}


def _unobserved(
    run: Callable[..., Tensor], inputs: Inputs, weights: Weights, grad: Tensor | None, sample: Sample
) -> tuple[dict[str, Tensor], set[str]]:
    """`_evaluate` without a profiler, which costs a call of many small operators several times its own time."""
    return _evaluate(run, inputs, weights, grad, sample), set()


def _operator(implementation: Implementation, seen: set[str], inputs: Inputs, params: Params) -> tuple[str, str]:
    """What ran, and the complaint where it is not what the implementation promises."""
    if implementation.witness:
        return str(resolve(implementation.witness)(*inputs, params)), ""
    ran = [name for name in implementation.operators if name in seen]
    if implementation.operators and not ran:
        return "", f"fallback: none of {', '.join(implementation.operators)} ran"
    return ", ".join(ran), ""


def _definition(
    method: Method, params: Params, inputs: Inputs, weights: Weights, sample: Sample, *, grad: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The reference in `dtype` on the sampled heads alone, in the form of `_evaluate`."""
    q, k, v = inputs
    part = slice(sample.batch, sample.batch + 1)
    pieces = (q[part, sample.heads], k[part, sample.kv_heads], v[part, sample.kv_heads], *weights.values())
    leaves = [x.detach().to(dtype).requires_grad_(grad is not None) for x in pieces]
    extra: dict[str, Any] = {"rows": sample.rows} if method.takes_rows else {}
    if weights:
        extra["weights"] = dict(zip(weights, leaves[3:], strict=True))
    keys = slice(None) if len(sample.heads) == q.shape[1] else torch.searchsorted(sample.kv_heads, sample.heads * k.shape[1] // q.shape[1])
    with torch.set_grad_enabled(grad is not None):
        out = method.reference(leaves[0], leaves[1][:, keys], leaves[2][:, keys], params, **extra)
    return {"out": out.detach()} | ({} if grad is None else _gradients(out, leaves, weights, sample.output(grad).to(dtype)))


def _malformed(got: dict[str, Tensor], want: dict[str, Tensor], q: Tensor) -> str:
    if got["out"].shape != want["out"].shape:
        return f"output has shape {list(got['out'].shape)}"
    if got["out"].dtype != q.dtype:
        return f"output is {got['out'].dtype}, inputs are {q.dtype}"
    for name, x in got.items():
        if not bool(x.isfinite().all()):
            return f"{name} is not finite"
    return ""
