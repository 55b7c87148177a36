"""Test-time training: a small network, one a head, whose weights are trained on keys and values while the sequence is read.

The inner model is `f(x) = x W1 + b1`, or `gelu(x W1 + b1) W2 + b2` with 4 D hidden units and the tanh form of GELU. Its loss on token s
is `|LN(f(k_s)) - (v_s - k_s)|^2 / 2`, with a learned layer norm over D, and a token has a step size of its own,
`r_s = base_lr sigmoid(w . x_s + c) / D`. Sun et al. 2024, "Learning to (Learn at Test Time)", https://arxiv.org/abs/2407.04620, sections
2.3 to 2.7. Causal, the published form: tokens come in mini-batches of b; gradients `g_s` are taken at the weights `W` before the mini-batch
and token t of it reads `W_t = W - a_t sum_{s <= t} r_s g_s` with `a_t = max(0, 1 / t + learned a_t)`, t from 1:
`o_t = q_t + LN(f_{W_t}(q_t))`. The next mini-batch starts from the last `W_t`. This is computed in the paper's dual form.

Departures: bidirectional is our addition, one step on all tokens, `W' = W - (1 / N) sum_s r_s g_s`, which every query reads: what the
causal form gives the last token where b = N. Step sizes come from the queries of all heads, where the paper has the layer's input. Rotary
embedding modulo b, the gate and the norm after the heads are the layer's. Everything is in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attnbench.eager import expand_heads, take, wide
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._inner import Inner, Layer, gradients, mini_batch, moved, read, step
from ._recompute import recomputed

if TYPE_CHECKING:
    from collections.abc import Mapping

_HIDDEN = 4  # width of the two-layer inner model, in head dimensions
_SEGMENT = 64  # mini-batches of the definition that the backward pass computes again together, so that it can judge long sequences


@dataclass(frozen=True, kw_only=True)
class TttParams(Params):
    """The inner model and how it is trained; the defaults are those of the authors' code."""

    inner: Literal["linear", "mlp"] = param("linear", "inner model: one linear layer, or two with GELU between and 4 D hidden units")
    minibatch: int = param(16, "tokens whose gradients are taken at the same weights, where causal", unit="tokens", low=1)
    base_lr: float = param(1.0, "inner learning rate, which learned step sizes multiply", low=0)


def initial_weights(shape: Shape, params: TttParams, generator: torch.Generator) -> Weights:
    """As in the authors' code: weights and step-size weights N(0, 0.02), biases and the learned part of `a_t` 0, layer norm 1 and 0."""

    def normal(*size: int) -> Tensor:
        return 0.02 * torch.randn(size, generator=generator, dtype=torch.float64)

    h, d = shape.heads, shape.dim
    widths = (d, d) if params.inner == "linear" else (d, _HIDDEN * d, d)
    drawn: Weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
        drawn |= {f"w{i}": normal(h, inputs, outputs), f"b{i}": torch.zeros(h, 1, outputs, dtype=torch.float64)}
    drawn |= {"norm_weight": torch.ones(h, 1, d, dtype=torch.float64), "norm_bias": torch.zeros(h, 1, d, dtype=torch.float64)}
    drawn |= {"rate_weight": normal(h, h * d), "rate_bias": torch.zeros(h, dtype=torch.float64)}
    return drawn | ({"token": torch.zeros(params.minibatch, dtype=torch.float64)} if params.causal else {})


def step_sizes(q: Tensor, weight: Tensor, bias: Tensor, base_lr: float) -> Tensor:
    """`r [B, H, N]` of each token and head, from the queries of all heads; `weight: [H, H D]`, `bias: [H]`."""
    tokens = wide(q).transpose(1, 2).flatten(2)
    return base_lr / q.shape[-1] * (tokens @ wide(weight).T + wide(bias)).sigmoid().transpose(1, 2)


def token_factors(token: Tensor) -> Tensor:
    """`a_t [b]`, in at least float32."""
    token = wide(token)
    return (1 / torch.arange(1, len(token) + 1, dtype=token.dtype, device=token.device) + token).clamp(min=0)


def _step(k: Tensor, v: Tensor, size: Tensor, model: Inner) -> tuple[Layer, ...]:
    """One step on some tokens, each with a factor of its own."""
    return step(*gradients(k, v - k, model), size)


def _segment(qkv: tuple[Tensor, Tensor, Tensor], rate: Tensor, factors: Tensor, model: Inner) -> tuple[Tensor, Inner]:
    """Outputs of several mini-batches, one after the other, and the model after them."""
    outputs = []
    for *part, r in zip(*(x.split(len(factors), 2) for x in (*qkv, rate)), strict=True):
        out, model = mini_batch((part[0], part[1], part[2]), factors[: r.shape[2], None] * r.unsqueeze(-2), model)
        outputs.append(out)
    return torch.cat(outputs, 2), model


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: TttParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition; causal, the whole sequence is run through for any rows."""
    own = given(weights, initial_weights, (q, k, v), params)
    rate = step_sizes(q, own["rate_weight"], own["rate_bias"], params.base_lr)
    key, value = expand_heads(q, wide(k), wide(v))
    model, outputs, length = Inner.of(own), [], _SEGMENT * params.minibatch
    if not params.causal:
        trained = model
        for part in zip(*(x.split(length, 2) for x in (key, value, rate / q.shape[2])), strict=True):
            trained = moved(trained, recomputed(_step, *part, model))
        return read(wide(take(q, rows)), trained).to(v.dtype)
    factors = token_factors(own["token"])
    for *qkv, r in zip(*(x.split(length, 2) for x in (wide(q), key, value, rate)), strict=True):
        out, model = recomputed(_segment, qkv, r, factors, model)
        outputs.append(out)
    return take(torch.cat(outputs, 2), rows).to(v.dtype)


def cost(shape: Shape, params: TttParams) -> Cost:
    """Bidirectional 6 N D^2 FLOP a head for the linear inner model, 56 N D^2 for two layers; causal also 4 D and 20 D for each pair of a
    mini-batch, one token at or before the other; 2 N H D a head for step sizes."""
    s, heads, widths = shape, shape.batch * shape.heads, (1, 1) if params.inner == "linear" else (1, _HIDDEN, 1)
    products = sum(a * b for a, b in pairwise(widths)) * s.dim**2
    backward = sum(a * b for a, b in pairwise(widths[1:])) * s.dim**2
    full, rest = divmod(s.n, params.minibatch)
    pairs = (full * params.minibatch * (params.minibatch + 1) + rest * (rest + 1)) // 2 if params.causal else 0
    flops = {
        "project": 2 * heads * s.n * s.heads * s.dim,
        "state": 2 * heads * s.n * (2 * products + backward),
        "attend": 2 * heads * (s.n * products + pairs * sum(a + b for a, b in pairwise(widths)) * s.dim),
    }
    model = products + sum(widths[1:]) * s.dim
    states, keys = 0 if params.causal else heads * model, s.batch * s.kv_heads * s.n * 2 * s.dim
    traffic = {
        "project": heads * s.n * (s.dim + 1),
        "state": 0 if params.causal else keys + heads * s.n + states,
        "attend": heads * s.n * 2 * s.dim + (keys + heads * s.n if params.causal else states),
    }
    return Cost.of(s, flops, extra=s.heads * (model + 2 * s.dim + s.heads * s.dim + 1) + states, traffic=traffic)


def _fused(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:  # noqa: ARG001
    assert isinstance(params, TttParams)
    checks = (
        (not params.causal, "bidirectional there is no recurrence to fuse"),
        (params.inner != "linear", "the state of two layers does not fit a processor's registers"),
        (params.minibatch > 64, f"takes mini-batches of up to 64 tokens, not {params.minibatch}"),
    )
    return [reason for fails, reason in checks if fails]


METHOD = Method(
    name="ttt",
    title="TTT",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MODULE, Count.SHARED, Construction.TEST_TIME_TRAINING, Topology.ALL_TO_ONE),
    citation=Citation(
        "Sun et al.",
        2024,
        "Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
        "https://arxiv.org/abs/2407.04620",
        "ICML",
    ),
    params=TttParams,
    reference=reference,
    weights=initial_weights,
    cost=cost,
    no_experts="its weights come from gradient steps through a layer norm: they are no rows of keys and values",
    limits=Limits(value_dim=False),
    couples_heads=True,
    implementations=(
        Implementation(
            "triton",
            "attnbench.methods._ttt:fused",
            Limits(("cuda",), ("bfloat16", "float16", "float32"), max_dim=128, value_dim=False, extra=_fused),
            requires=("triton",),
            operators=("attnbench::ttt_forward",),
            note="causal, linear inner model: its weights stay in registers from the first mini-batch to the last",
            stages={"attend": ("ttt_forward_kernel",), "attend gradient": ("ttt_backward_kernel",)},
        ),
        Implementation(
            "chunked",
            "attnbench.methods._ttt:chunked",
            Limits(value_dim=False),
            note="bidirectional in chunks of tokens; causal one mini-batch after the other; both computed again in the backward pass",
        ),
    ),
)
