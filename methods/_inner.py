"""The inner model of test-time training: its layers, the gradient of its loss, a step, and a mini-batch in dual form.

For a layer with inputs `x` and `z = x W + b`, the weights that token t reads give
`x_t W_t + b_t = x_t W + b - a_t sum_{s <= t} r_s (x_t . x_s + 1) dz_s`: no weights of single tokens are ever made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from attnbench.eager import wide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EPS = 1e-6
"""added to the variance in the layer norm"""

Layer = tuple[Tensor, Tensor]
"""Weight `[.., H, D, F]` and bias `[.., H, 1, F]`."""


class Inner(NamedTuple):
    """An inner model with its layer norm, whose weight and bias are `[.., H, 1, D]`; all in at least float32."""

    layers: tuple[Layer, ...]
    norm: Layer

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Inner:
        """The model before it is trained."""
        layers = tuple((wide(weights[f"w{i}"]), wide(weights[f"b{i}"])) for i in (1, 2) if f"w{i}" in weights)
        return cls(layers, (wide(weights["norm_weight"]), wide(weights["norm_bias"])))


def hidden(z: Tensor) -> Tensor:
    """What the next layer reads: `z (1 + tanh u) / 2` with `u = sqrt(2 / pi) (z + 0.044715 z^3)`."""
    out: Tensor = gelu(z, approximate="tanh")
    return out


def hidden_gradient(z: Tensor) -> Tensor:
    """Derivative of `hidden`."""
    root = (2 / torch.pi) ** 0.5
    tanh = torch.tanh(root * (z + 0.044715 * z**3))
    slope: Tensor = (1 + tanh + z * (1 - tanh * tanh) * root * (1 + 3 * 0.044715 * z * z)) / 2
    return slope


def standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """`z` with mean 0 and variance 1 over its last axis, and the factor that makes it so."""
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    factor = (variance + EPS).rsqrt()
    return (z - mean) * factor, factor


def residual(q: Tensor, z: Tensor, norm: Layer) -> Tensor:
    """`q + LN(z)`."""
    return q + norm[0] * standardise(z)[0] + norm[1]


def loss_gradient(z: Tensor, target: Tensor, norm: Layer) -> Tensor:
    """Gradient of `|LN(z) - target|^2 / 2` with respect to z."""
    x, factor = standardise(z)
    inner = (norm[0] * x + norm[1] - target) * norm[0]
    return factor * (inner - inner.mean(-1, keepdim=True) - x * (inner * x).mean(-1, keepdim=True))


def gradients(k: Tensor, target: Tensor, model: Inner) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each layer for these keys, and the gradient `[.., N, F]` of the loss with respect to what leaves it."""
    (w, b), *rest = model.layers
    inputs, outputs = [k], [k @ w + b]
    for w, b in rest:
        inputs.append(hidden(outputs[-1]))
        outputs.append(inputs[-1] @ w + b)
    found = [loss_gradient(outputs[-1], target, model.norm)]
    for (w, _), z in zip(rest[::-1], outputs[-2::-1], strict=True):
        found.insert(0, found[0] @ w.transpose(-1, -2) * hidden_gradient(z))
    return inputs, found


def read(q: Tensor, model: Inner) -> Tensor:
    """`q + LN(f(q))`."""
    (w, b), *rest = model.layers
    z = q @ w + b
    for w, b in rest:
        z = hidden(z) @ w + b
    return residual(q, z, model.norm)


def step(inputs: Sequence[Tensor], found: Sequence[Tensor], size: Tensor) -> tuple[Layer, ...]:
    """How far each layer goes: the sum of all tokens' gradients, `size: [B, H, N]` the factor of each."""
    scaled = [size.unsqueeze(-1) * g for g in found]
    return tuple((x.transpose(-1, -2) @ g, g.sum(-2, keepdim=True)) for x, g in zip(inputs, scaled, strict=True))


def moved(model: Inner, steps: Sequence[Layer]) -> Inner:
    """The model after such steps downhill."""
    return model._replace(layers=tuple((w - dw, b - db) for (w, b), (dw, db) in zip(model.layers, steps, strict=True)))


def mini_batch(qkv: tuple[Tensor, Tensor, Tensor], eta: Tensor, model: Inner) -> tuple[Tensor, Inner]:
    """Outputs of one mini-batch, and the model after it; `eta[t, s] = a_t r_s`."""
    q, k, v = qkv
    inputs, found = gradients(k, v - k, model)
    x = q
    for i, ((w, b), key, g) in enumerate(zip(model.layers, inputs, found, strict=True)):
        x = hidden(x) if i else x
        x = x @ w + b - (eta * (x @ key.transpose(-1, -2) + 1)).tril() @ g
    return residual(q, x, model.norm), moved(model, step(inputs, found, eta[..., -1, :]))
