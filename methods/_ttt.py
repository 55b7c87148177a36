"""Test-time training in practice: bidirectional in chunks of tokens, causal as a scan over mini-batches, and the way to the fused kernel.

Everything is in at least float32. Chunks and segments are computed again in the backward pass, so what is kept is the inputs, the
inner model between segments, and one chunk. The scan merges what a mini-batch makes of its keys and queries into one product, and takes
all that does not wait for the inner model (products of queries and keys, targets, the norm of the output) a segment at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from attnbench.eager import expand_heads, wide
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._inner import Inner, gradients, hidden, moved, read, residual
from ._products import outer_sum
from ._recompute import recomputed
from .ttt import step_sizes, token_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._inner import Layer
    from .ttt import TttParams

_SEGMENT = 64
"""mini-batches of the scan that are computed again together"""
_COPIES = {1: 12, 2: 36}
"""layers -> tensors of the size of q, in at least float32, that are alive at once in a chunk"""


def chunked(q: Tensor, k: Tensor, v: Tensor, params: TttParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, D]`."""
    model = Inner.of(weights)
    size = rows_per_chunk(q, _COPIES[len(model.layers)] * q[:, :, 0].numel() * wide(q[..., :0]).element_size())
    rate = _rates(q, params, weights, size)
    if params.causal:
        return _scan((q, k, v), rate, token_factors(weights["token"]), model)
    trained = model
    with stage("state"):
        for part in zip(*(x.split(size, 2) for x in (k, v, rate)), strict=True):
            trained = moved(trained, recomputed(_step, *part, q.shape[2], model))
    with stage("attend"):
        return torch.cat([recomputed(_read, part, trained) for part in q.split(size, 2)], 2)


def fused(q: Tensor, k: Tensor, v: Tensor, params: TttParams, weights: Mapping[str, Tensor]) -> Tensor:
    """Causal with a linear inner model, by `attnbench.kernels.ttt`."""
    from attnbench.kernels.ttt import ttt_linear

    model = Inner.of(weights)
    rate = _rates(q, params, weights, rows_per_chunk(q, 4 * q[:, :, 0].numel() * wide(q[..., :0]).element_size()))
    with stage("attend"):
        return ttt_linear(q, k, v, rate, token_factors(weights["token"]), *model.layers[0], *model.norm)


def _rates(q: Tensor, params: TttParams, weights: Mapping[str, Tensor], size: int) -> Tensor:
    """Step sizes `[B, H, N]`, `size` tokens at a time."""
    weight, bias = wide(weights["rate_weight"]), wide(weights["rate_bias"])
    with stage("project"):
        return torch.cat([recomputed(step_sizes, part, weight, bias, params.base_lr) for part in q.split(size, 2)], 2)


def _step(k: Tensor, v: Tensor, rate: Tensor, n: int, model: Inner) -> tuple[Layer, ...]:
    """How far a chunk of N tokens moves each layer."""
    key, value = (x.repeat_interleave(rate.shape[1] // k.shape[1], 1) for x in (wide(k), wide(v)))
    inputs, found = gradients(key, value - key, model)
    scaled = [rate.unsqueeze(-1) / n * g for g in found]
    return tuple((outer_sum(x, g), g.sum(-2, keepdim=True)) for x, g in zip(inputs, scaled, strict=True))


def _read(q: Tensor, model: Inner) -> Tensor:
    return read(wide(q), model).to(q.dtype)


def _scan(qkv: tuple[Tensor, Tensor, Tensor], rate: Tensor, factors: Tensor, model: Inner) -> Tensor:
    """Causal outputs; the models of all B H heads are one batch of matrices."""
    batch, outputs = rate.shape[0], []
    each = [x.repeat(batch, 1, 1) for layer in (*model.layers, model.norm) for x in layer]
    *layers, norm = zip(each[::2], each[1::2], strict=True)
    model = Inner(tuple(layers), norm)
    with stage("attend"):
        for *part, r in zip(*(x.split(_SEGMENT * len(factors), 2) for x in (*qkv, rate)), strict=True):
            out, model = recomputed(_segment, part, r, factors, model)
            outputs.append(out)
        return torch.cat(outputs, 2)


def _segment(qkv: tuple[Tensor, Tensor, Tensor], rate: Tensor, factors: Tensor, model: Inner) -> tuple[Tensor, Inner]:
    """Outputs `[B, H, n, D]` of a segment, and the model after it; tokens that fill the last mini-batch up have step size 0."""
    q, k, v = qkv
    key, value = expand_heads(q, wide(k), wide(v))
    query, key, target, step = (_cut(x, len(factors)) for x in (wide(q), key, value - key, rate.unsqueeze(-1)))
    eta = factors[:, None] * step.transpose(-1, -2)
    seen, found = (eta * (query @ key.transpose(-1, -2) + 1)).tril(), []
    for part in zip(query, key, target, seen, eta, strict=True):
        z, model = _mini_batch(part, model)
        found.append(z)
    out = residual(query, torch.stack(found), model.norm).movedim(0, 1).flatten(1, 2)[:, : q.shape[2]]
    return out.unflatten(0, q.shape[:2]).to(q.dtype), model


def _mini_batch(part: tuple[Tensor, ...], model: Inner) -> tuple[Tensor, Inner]:
    """What the inner model gives the queries `[B H, b, D]` of a mini-batch, and the model after it."""
    q, k, target, seen, eta = part
    inputs, found = gradients(k, target, model)
    (w, b), *rest = model.layers
    z = torch.baddbmm(torch.baddbmm(b, q, w), seen, found[0], alpha=-1)
    for (w, b), key, g in zip(rest, inputs[1:], found[1:], strict=True):
        x = hidden(z)
        z = torch.baddbmm(torch.baddbmm(b, x, w), (eta * (x @ key.transpose(1, 2) + 1)).tril(), g, alpha=-1)
    last = eta[:, -1:]
    layers = tuple(
        (torch.baddbmm(w, x.transpose(1, 2) * last, g, alpha=-1), torch.baddbmm(b, last, g, alpha=-1))
        for (w, b), x, g in zip(model.layers, inputs, found, strict=True)
    )
    return z, model._replace(layers=layers)


def _cut(x: Tensor, length: int) -> Tensor:
    """`[B, H, n, D]` -> `[mini-batches, B H, length, D]`, the last one filled up with zeros."""
    full: Tensor = pad(x, (0, 0, 0, -x.shape[2] % length))
    cut: Tensor = full.flatten(0, 1).unflatten(1, (-1, length))
    return cut.movedim(1, 0)
