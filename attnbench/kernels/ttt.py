"""Causal TTT-Linear in Triton: the inner model of a head stays in one program's registers from the first mini-batch to the last.

A mini-batch of b tokens with keys k, values v, queries q, step sizes r and factors a: with `z = k W + c`, `x = (z - mean) f`, `f` the
inverse deviation, `u = (gamma x + beta - v + k) gamma`, the gradient is `g = f (u - mean(u) - x mean(u x))`; with
`P_ts = a_t r_s (q_t . k_s + 1)` for s <= t, the output is `q + LN(q W + c - P g)`; then `W -= a_b (r k)^T g`, `c -= a_b sum r g`.

Programs: one a head of a sequence, N / b steps each, one after the other: the method has no other parallelism. Work of a step:
`6 b D^2 + 4 b^2 D` FLOP forward; backward three times that and the forward twice. The forward pass keeps `W, c` before every EVERY-th
mini-batch, `4 N D (D + 1) / (b EVERY)` bytes a head; the backward pass goes through the segments from the last to the first, runs each
forward again with its states in a scratch of `4 EVERY D (D + 1)` bytes a head, then backward. Sums are in float32. Where inputs are
bfloat16, products take TF32 operands, four times as fine; else three TF32 products make one. Every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power

__all__ = ["ttt_linear"]

EPS = 1e-6
"""added to the variance in the layer norm"""
EVERY = 32
"""mini-batches between states that are kept"""


@triton.jit
def _rows(base, o_t, m_t, o_d, D: tl.constexpr):
    """Rows `[BT, BD]` of `[N, D]` in float32, zero outside."""
    return tl.load(base + o_t[:, None] * D + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(base, o_t, m_t, o_d, value, D: tl.constexpr):
    tl.store(base + o_t[:, None] * D + o_d[None, :], value.to(base.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def _load_state(base, o_d, D: tl.constexpr):
    """`W [BD, BD]` and `c [BD]` of a state `[D + 1, D]`."""
    return _rows(base, o_d, o_d < D, o_d, D), tl.load(base + D * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def _store_state(base, o_d, b_w, b_c, D: tl.constexpr):
    _store(base, o_d, o_d < D, o_d, b_w, D)
    tl.store(base + D * D + o_d, b_c, mask=o_d < D)


@triton.jit
def _standardise(b_z, m_d, D: tl.constexpr, EPS: tl.constexpr):
    """`x [BT, BD]` with mean 0 and variance 1 over D, zero beyond, and the factor `f [BT, 1]` that makes it so."""
    b_z = tl.where(m_d, b_z, 0.0)
    b_x = tl.where(m_d, b_z - tl.sum(b_z, 1)[:, None] / D, 0.0)
    b_f = 1 / tl.sqrt(tl.sum(b_x * b_x, 1)[:, None] / D + EPS)
    return b_x * b_f, b_f


@triton.jit
def _project(b_u, b_x, m_d, D: tl.constexpr):
    """`u - mean(u) - x mean(u x)`: u without what standardising takes away."""
    return tl.where(m_d, b_u - tl.sum(b_u, 1)[:, None] / D - b_x * (tl.sum(b_u * b_x, 1)[:, None] / D), 0.0)


@triton.jit
def _inner_gradient(b_k, b_v, b_w, b_c, b_gamma, b_beta, m_d, D: tl.constexpr, EPS: tl.constexpr, PREC: tl.constexpr):
    """`g`, and what the backward pass needs of its making: `x`, `f`, `y = gamma x + beta - v + k`."""
    b_x, b_f = _standardise(tl.dot(b_k, b_w, input_precision=PREC) + b_c[None, :], m_d, D, EPS)
    b_y = b_gamma[None, :] * b_x + b_beta[None, :] - b_v + b_k
    return b_f * _project(b_gamma[None, :] * b_y, b_x, m_d, D), b_x, b_f, b_y


@triton.jit
def ttt_forward_kernel(
    q, k, v, rate, factor, w, c, gamma, beta, out, states,
    H, G, N, STEPS, SEGMENTS,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BT: tl.constexpr, EVERY: tl.constexpr, SAVE: tl.constexpr,
    EPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs of one head, and its states before every EVERY-th mini-batch."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_h, i_kv = i_bh % H, i_bh // G
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_w, b_c = _rows(w + i_h * D * D, o_d, o_d < D, o_d, D), tl.load(c + i_h * D + o_d, mask=o_d < D, other=0.0)
    b_gamma, b_beta = tl.load(gamma + i_h * D + o_d, mask=o_d < D, other=0.0), tl.load(beta + i_h * D + o_d, mask=o_d < D, other=0.0)
    b_a, a_last = tl.load(factor + o_t, mask=o_t < B, other=0.0), tl.load(factor + B - 1)
    for i in range(STEPS):
        if SAVE and i % EVERY == 0:
            _store_state(states + (i_bh * SEGMENTS + i // EVERY) * (D + 1) * D, o_d, b_w, b_c, D)
        m_t = (o_t < B) & (i * B + o_t < N)
        p_q, p_k = (i_bh * N + i * B) * D, (i_kv * N + i * B) * D
        # [BT, BD]
        b_q, b_k, b_v = _rows(q + p_q, o_t, m_t, o_d, D), _rows(k + p_k, o_t, m_t, o_d, D), _rows(v + p_k, o_t, m_t, o_d, D)
        b_r = tl.load(rate + i_bh * N + i * B + o_t, mask=m_t, other=0.0)
        b_g, _, _, _ = _inner_gradient(b_k, b_v, b_w, b_c, b_gamma, b_beta, m_d, D, EPS, PREC)
        # [BT, BT]
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) + 1.0
        b_p = tl.where(o_t[:, None] >= o_t[None, :], b_p * b_a[:, None] * b_r[None, :], 0.0)
        b_z = tl.dot(b_q, b_w, input_precision=PREC) + b_c[None, :] - tl.dot(b_p, b_g, input_precision=PREC)
        b_o = b_q + b_gamma[None, :] * _standardise(b_z, m_d, D, EPS)[0] + b_beta[None, :]
        _store(out + p_q, o_t, m_t, o_d, b_o, D)
        b_step = (a_last * b_r)[:, None] * b_g
        b_w -= tl.dot(tl.trans(b_k), b_step, input_precision=PREC)
        b_c -= tl.sum(b_step, 0)


@triton.jit
def ttt_backward_kernel(
    q, k, v, rate, factor, gamma, beta, states, grad, scratch, dq, dk, dv, drate, dfactor, dw, dc, dgamma, dbeta,
    H, G, N, STEPS, SEGMENTS,
    D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BT: tl.constexpr, EVERY: tl.constexpr, EPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of one head, the mini-batches from the last to the first; `dk` and `dv` are of query heads."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_h, i_kv = i_bh % H, i_bh // G
    o_t, o_d = tl.arange(0, BT), tl.arange(0, BD)
    m_d, m_last = (o_d < D)[None, :], o_t == B - 1
    b_gamma, b_beta = tl.load(gamma + i_h * D + o_d, mask=o_d < D, other=0.0), tl.load(beta + i_h * D + o_d, mask=o_d < D, other=0.0)
    b_a, a_last = tl.load(factor + o_t, mask=o_t < B, other=0.0), tl.load(factor + B - 1)
    b_dw, b_dc = tl.zeros([BD, BD], tl.float32), tl.zeros([BD], tl.float32)
    b_dgamma, b_dbeta, b_da = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BT], tl.float32)
    for i_back in range(SEGMENTS):
        i_s = SEGMENTS - 1 - i_back
        count = tl.minimum(EVERY, STEPS - i_s * EVERY)
        b_w, b_c = _load_state(states + (i_bh * SEGMENTS + i_s) * (D + 1) * D, o_d, D)
        tl.debug_barrier()
        for j in range(count):
            i = i_s * EVERY + j
            _store_state(scratch + (i_bh * EVERY + j) * (D + 1) * D, o_d, b_w, b_c, D)
            m_t, p_k = (o_t < B) & (i * B + o_t < N), (i_kv * N + i * B) * D
            b_k, b_v = _rows(k + p_k, o_t, m_t, o_d, D), _rows(v + p_k, o_t, m_t, o_d, D)
            b_r = tl.load(rate + i_bh * N + i * B + o_t, mask=m_t, other=0.0)
            b_g, _, _, _ = _inner_gradient(b_k, b_v, b_w, b_c, b_gamma, b_beta, m_d, D, EPS, PREC)
            b_step = (a_last * b_r)[:, None] * b_g
            b_w -= tl.dot(tl.trans(b_k), b_step, input_precision=PREC)
            b_c -= tl.sum(b_step, 0)
        tl.debug_barrier()
        for j_back in range(count):
            j = count - 1 - j_back
            i = i_s * EVERY + j
            m_t, p_q, p_k = (o_t < B) & (i * B + o_t < N), (i_bh * N + i * B) * D, (i_kv * N + i * B) * D
            b_w, b_c = _load_state(scratch + (i_bh * EVERY + j) * (D + 1) * D, o_d, D)
            # [BT, BD]
            b_q, b_k, b_v = _rows(q + p_q, o_t, m_t, o_d, D), _rows(k + p_k, o_t, m_t, o_d, D), _rows(v + p_k, o_t, m_t, o_d, D)
            b_do = _rows(grad + p_q, o_t, m_t, o_d, D)
            b_r = tl.load(rate + i_bh * N + i * B + o_t, mask=m_t, other=0.0)
            b_g, b_x, b_f, b_y = _inner_gradient(b_k, b_v, b_w, b_c, b_gamma, b_beta, m_d, D, EPS, PREC)
            # [BT, BT]
            b_s = tl.where(o_t[:, None] >= o_t[None, :], tl.dot(b_q, tl.trans(b_k), input_precision=PREC) + 1.0, 0.0)
            b_p = b_s * b_a[:, None] * b_r[None, :]
            b_z = tl.dot(b_q, b_w, input_precision=PREC) + b_c[None, :] - tl.dot(b_p, b_g, input_precision=PREC)
            b_xq, b_fq = _standardise(b_z, m_d, D, EPS)
            b_dgamma += tl.sum(b_do * b_xq, 0)
            b_dbeta += tl.sum(b_do, 0)
            b_dz = b_fq * _project(b_gamma[None, :] * b_do, b_xq, m_d, D)
            # the state after the mini-batch: W - a_b (r k)^T g
            b_t = tl.dot(b_k, b_dw, input_precision=PREC) + b_dc[None, :]
            b_size = a_last * b_r
            b_dsize = -tl.sum(b_t * b_g, 1)
            b_dg = -b_size[:, None] * b_t - tl.dot(tl.trans(b_p), b_dz, input_precision=PREC)
            b_dk = -b_size[:, None] * tl.dot(b_g, tl.trans(b_dw), input_precision=PREC)
            # P_ts = a_t r_s s_ts
            b_dp = -tl.dot(b_dz, tl.trans(b_g), input_precision=PREC)
            b_dr = a_last * b_dsize + tl.sum(b_dp * b_s * b_a[:, None], 0)
            b_da += tl.sum(b_dp * b_s * b_r[None, :], 1) + tl.where(m_last, tl.sum(b_dsize * b_r, 0), 0.0)
            b_ds = tl.where(o_t[:, None] >= o_t[None, :], b_dp * b_a[:, None] * b_r[None, :], 0.0)
            b_dq = b_do + tl.dot(b_dz, tl.trans(b_w), input_precision=PREC) + tl.dot(b_ds, b_k, input_precision=PREC)
            b_dk += tl.dot(tl.trans(b_ds), b_q, input_precision=PREC)
            _store(dq + p_q, o_t, m_t, o_d, b_dq, D)
            # g = f (u - mean(u) - x mean(u x)), u = gamma y
            b_e, b_u = b_f * b_dg, b_gamma[None, :] * b_y
            b_df = tl.sum(b_dg * b_g, 1)[:, None] / b_f
            b_du = _project(b_e, b_x, m_d, D)
            b_dy = b_gamma[None, :] * b_du
            b_dx = b_gamma[None, :] * b_dy - b_e * (tl.sum(b_u * b_x, 1)[:, None] / D) - b_u * (tl.sum(b_e * b_x, 1)[:, None] / D)
            b_dgamma += tl.sum(b_du * b_y + b_dy * b_x, 0)
            b_dbeta += tl.sum(b_dy, 0)
            # x = (z - mean(z)) f, f = (variance + eps)^(-1/2)
            b_dzk = b_f * _project(b_dx, b_x, m_d, D) - b_df * b_f * b_f * b_x / D
            b_dk += b_dy + tl.dot(b_dzk, tl.trans(b_w), input_precision=PREC)
            _store(dk + p_q, o_t, m_t, o_d, b_dk, D)
            _store(dv + p_q, o_t, m_t, o_d, -b_dy, D)
            tl.store(drate + i_bh * N + i * B + o_t, b_dr, mask=m_t)
            b_dw += tl.dot(tl.trans(b_q), b_dz, input_precision=PREC) + tl.dot(tl.trans(b_k), b_dzk, input_precision=PREC)
            b_dc += tl.sum(b_dz + b_dzk, 0)
    _store(dw + i_bh * D * D, o_d, o_d < D, o_d, b_dw, D)
    tl.store(dc + i_bh * D + o_d, b_dc, mask=o_d < D)
    tl.store(dgamma + i_bh * D + o_d, b_dgamma, mask=o_d < D)
    tl.store(dbeta + i_bh * D + o_d, b_dbeta, mask=o_d < D)
    tl.store(dfactor + i_bh * B + o_t, b_da, mask=o_t < B)


def ttt_linear(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, factor: Tensor, w: Tensor, c: Tensor, gamma: Tensor, beta: Tensor
) -> Tensor:  # fmt: skip
    """Causal TTT-Linear of `q [B, H, N, D]`, `k, v [B, Hkv, N, D]` -> `[B, H, N, D]`.

    `rate [B, H, N]` are step sizes, `factor [b]` the factors of the tokens of a mini-batch of b <= 64, `w [H, D, D]`, `c [H, 1, D]`
    the inner model at first, `gamma, beta [H, 1, D]` the layer norm; these in float32. D is at most 128.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    rest = (x.float().contiguous() for x in (rate, factor, w, c, gamma, beta))
    out, _ = ttt_forward(q, k, v, *rest, torch.is_grad_enabled())
    return out


def _sizes(q: Tensor, k: Tensor, factor: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """H, G, N, STEPS, SEGMENTS, and the constants of both kernels."""
    _, h, n, d = q.shape
    b = len(factor)
    steps = -(-n // b)
    fixed = {"D": d, "BD": max(16, power(d)), "B": b, "BT": max(16, power(b)), "EVERY": EVERY, "EPS": EPS}
    return (h, h // k.shape[1], n, steps, -(-steps // EVERY)), fixed | {"PREC": "tf32" if q.dtype == torch.bfloat16 else "tf32x3"}


@define("ttt_forward")
def ttt_forward(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, factor: Tensor, w: Tensor, c: Tensor, gamma: Tensor, beta: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the states that the backward pass starts its segments from (none without `save`)."""
    sizes, constants = _sizes(q, k, factor)
    out, d = torch.empty_like(q), q.shape[3]
    states = rate.new_empty(q.shape[0] * q.shape[1] if save else 0, sizes[-1], d + 1, d)
    with on_device(q):
        ttt_forward_kernel[(q.shape[0] * q.shape[1],)](
            q, k, v, rate, factor, w, c, gamma, beta, out, states, *sizes, SAVE=save, **constants, num_warps=4 if d <= 64 else 8
        )
    return out, states


@torch.library.register_fake(ttt_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, factor: Tensor, w: Tensor, c: Tensor, gamma: Tensor, beta: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    sizes, d = _sizes(q, k, factor)[0], q.shape[3]
    return torch.empty_like(q), rate.new_empty(q.shape[0] * q.shape[1] if save else 0, sizes[-1], d + 1, d)


@define("ttt_backward", final=True)
def ttt_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, factor: Tensor, gamma: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, then of k and v for each query head, of rate, and for each sequence and head of factor, w, c, gamma and beta."""
    sizes, constants = _sizes(q, k, factor)
    found = _gradients(q, k, rate, factor)
    scratch = rate.new_empty(states.shape[0], EVERY, *states.shape[2:])
    with on_device(q):
        ttt_backward_kernel[(states.shape[0],)](
            q, k, v, rate, factor, gamma, beta, states, grad.contiguous(), scratch, *found, *sizes, **constants,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return found


@torch.library.register_fake(ttt_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, factor: Tensor, gamma: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, ...]:
    return _gradients(q, k, rate, factor)


def _gradients(q: Tensor, k: Tensor, rate: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """Room for the gradients; those of keys and values are added up over query heads in float32."""
    b, h, _, d = q.shape
    keys = q if k.shape[1] == h else rate
    return (
        torch.empty_like(q), keys.new_empty(q.shape), keys.new_empty(q.shape), torch.empty_like(rate),
        *(rate.new_empty(b, h, *size) for size in ((len(factor),), (d, d), (1, d), (1, d), (1, d))),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rate, factor, _, _, gamma, beta, _ = inputs
    ctx.save_for_backward(q, k, v, rate, factor, gamma, beta, output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    q, k, v, *rest = ctx.saved_tensors
    dq, dk, dv, drate, dfactor, dw, dc, dgamma, dbeta = ttt_backward(grad, q, k, v, *rest)
    dk, dv = (x if x.shape == k.shape else x.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv, drate, dfactor.sum((0, 1)), dw.sum(0), dc.sum(0), dgamma.sum(0), dbeta.sum(0), None


torch.library.register_autograd(ttt_forward, _grad, setup_context=_save)
