"""Random features of Performer in Triton: products with the directions, exponentials and their sums in one pass; gradients likewise.

`x: [X, N, D]` with unit inner stride, X being batches times heads, and directions `[P, W, D]`: parts of P roundings, the first of which is
the largest, so that half-precision products are exact. Scores `s_r = sum_p x . w_pr`, R of them. Features `[X, N, W]` of the dtype of x are
`e_r = exp(s_r - offset)`, or `relu(s_r)`, then two that make up for what eps adds to each, then zeros:

- of a key: 1 and `sum_r e_r`; the offset of exponentials is `scale |x|^2 / 2 + top`, `top [X]` the largest score of all keys;
- of a query: `eps (sum_r e_r + R b)` and b; its offset is `scale |x|^2 / 2 + max_r s_r + l`, `l = log(exp(-scale |x|^2 / 2) + eps)` and
  `b = eps exp(-l)`, or for relu b = eps.

Bytes: x once, features once; N D W products a part, once more for the maximum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import on_device, power
from ._tile import LOG2E

__all__ = ["MOST_DIM", "features", "features_backward", "largest"]

MOST_DIM = 128
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tokens(x, stride_x, stride_n, i_x, o_n, N, D: tl.constexpr, BD: tl.constexpr):
    """`[BN, BD]` in the dtype of x, 0 beyond its edges."""
    o_d = tl.arange(0, BD)
    p_x = x + i_x.to(tl.int64) * stride_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    return tl.load(p_x, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def scores(
    b_x, rows, start, R, W, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """`[BN, BW]` of directions from `start` on, -inf beyond R, and their numbers."""
    o_w, o_d = start + tl.arange(0, BW), tl.arange(0, BD)
    mask = (o_w < R)[None, :] & (o_d < D)[:, None]
    b_s = tl.zeros([BN, BW], tl.float32)
    for p in tl.static_range(P):  # the smallest part first
        b_w = tl.load(rows + ((P - 1 - p) * W + o_w)[None, :] * D + o_d[:, None], mask=mask, other=0.0)
        b_s += tl.dot(b_x, b_w, input_precision=PREC)
    return tl.where((o_w < R)[None, :], b_s, float("-inf")), o_w


@triton.jit
def largest_kernel(
    x, rows, out, stride_x, stride_n, N, R, W, TILES,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The largest score of a tile of tokens, `[X, TILES]`."""
    i_x, o_n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b_x = tokens(x, stride_x, stride_n, i_x, o_n, N, D, BD)
    b_top = tl.full([BN], float("-inf"), tl.float32)
    for start in range(0, R, BW):
        b_s, _ = scores(b_x, rows, start, R, W, D, BD, BN, BW, P, PREC)
        b_top = tl.maximum(b_top, tl.max(b_s, 1))
    tl.store(out + i_x * TILES + tl.program_id(1), tl.max(tl.where(o_n < N, b_top, float("-inf")), 0))


@triton.jit
def features_kernel(
    x, rows, top, out, stride_x, stride_n, N, R, W, scale, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, PREC: tl.constexpr,
    KEY: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Features of a tile of tokens."""
    i_x, o_n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b_x = tokens(x, stride_x, stride_n, i_x, o_n, N, D, BD)
    b_half = 0.5 * scale * tl.sum(b_x.to(tl.float32) * b_x.to(tl.float32), 1)
    b_rest = tl.zeros([BN], tl.float32) + eps
    b_offset = tl.zeros([BN], tl.float32)
    if KEY and not RELU:
        b_offset = b_half + tl.load(top + i_x)
    if not KEY and not RELU:
        b_top = tl.full([BN], float("-inf"), tl.float32)
        for start in range(0, R, BW):
            b_s, _ = scores(b_x, rows, start, R, W, D, BD, BN, BW, P, PREC)
            b_top = tl.maximum(b_top, tl.max(b_s, 1))
        # log(exp(-half) + eps), the larger term taken out
        b_low = tl.log2(b_rest) * LN2
        b_most = tl.maximum(-b_half, b_low)
        b_bound = b_most + tl.log2(tl.exp2((-b_half - b_most) * LOG2E) + tl.exp2((b_low - b_most) * LOG2E)) * LN2
        b_offset = b_half + b_top + b_bound
        b_rest = eps * tl.exp2(-b_bound * LOG2E)
    b_sum = tl.zeros([BN], tl.float32)
    for start in range(0, W, BW):
        b_s, o_w = scores(b_x, rows, start, R, W, D, BD, BN, BW, P, PREC)
        b_e = tl.maximum(b_s, 0.0) if RELU else tl.exp2((b_s - b_offset[:, None]) * LOG2E)
        b_e = b_e.to(out.dtype.element_ty)
        b_sum += tl.sum(b_e.to(tl.float32), 1)
        if KEY:
            b_first, b_second = tl.zeros([BN], tl.float32) + 1.0, b_sum
        else:
            b_first, b_second = eps * (b_sum + R * b_rest), b_rest
        b_e = tl.where((o_w == R)[None, :], b_first.to(b_e.dtype)[:, None], b_e)
        b_e = tl.where((o_w == R + 1)[None, :], b_second.to(b_e.dtype)[:, None], b_e)
        p_out = out + (i_x.to(tl.int64) * N + o_n)[:, None] * W + o_w[None, :]
        tl.store(p_out, b_e, mask=(o_n < N)[:, None] & (o_w < W)[None, :])


@triton.jit
def features_backward_kernel(
    x, rows, phi, grad, out, stride_x, stride_n, stride_ox, stride_on, N, R, W, scale, factor, share,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, PREC: tl.constexpr, KEY: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of tokens."""
    i_x, o_n, o_d = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BD)
    o_row = (i_x.to(tl.int64) * N + o_n) * W
    b_all = factor * tl.load(grad + o_row + (R + 1 if KEY else R), mask=o_n < N, other=0.0).to(tl.float32)
    b_dx = tl.zeros([BN, BD], tl.float32)
    b_total = tl.zeros([BN], tl.float32)
    for start in range(0, R, BW):
        o_w = start + tl.arange(0, BW)
        mask = (o_n < N)[:, None] & (o_w < R)[None, :]
        b_f = tl.load(phi + o_row[:, None] + o_w[None, :], mask=mask, other=0.0).to(tl.float32)
        b_g = tl.load(grad + o_row[:, None] + o_w[None, :], mask=mask, other=0.0).to(tl.float32)
        b_slope = tl.where(b_f > 0, 1.0, 0.0) if RELU else b_f
        b_du = tl.where(mask, (b_g + b_all[:, None]) * b_slope, 0.0)
        b_total += tl.sum(b_du, 1)
        b_w = tl.load(rows + o_w[:, None] * D + o_d[None, :], mask=(o_w < R)[:, None] & (o_d < D)[None, :], other=0.0)
        b_dx += tl.dot(b_du.to(b_w.dtype), b_w, input_precision=PREC)
    if not RELU:
        b_dx -= scale * b_total[:, None] * tokens(x, stride_x, stride_n, i_x, o_n, N, D, BD).to(tl.float32)
    p_out = out + i_x.to(tl.int64) * stride_ox + o_n.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    tl.store(p_out, (share * b_dx).to(out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_d < D)[None, :])


def _constants(x: Tensor) -> dict[str, Any]:
    """Tiles of 64 tokens and 64 directions."""
    d, fp32 = x.shape[2], x.dtype == torch.float32
    return {"D": d, "BD": max(16, power(d)), "BN": 64, "BW": 64, "PREC": "ieee" if fp32 else "tf32", "num_warps": 4}


def largest(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """The largest score of all tokens, `[X]` in float32; `rows: [P, W, D]`, of which `count` are counted."""
    constants = _constants(x)
    tiles = -(-x.shape[1] // constants["BN"])
    out = x.new_empty(x.shape[0], tiles, dtype=torch.float32)
    with on_device(x):
        largest_kernel[(x.shape[0], tiles)](
            x, rows, out, *x.stride()[:2], x.shape[1], count, rows.shape[1], tiles, **constants, P=rows.shape[0]
        )
    return out.amax(1)


def features(x: Tensor, rows: Tensor, count: int, *, scale: float, eps: float, top: Tensor | None, relu: bool, key: bool) -> Tensor:
    """`[X, N, W]`; `top` is what exponentials of keys want."""
    constants = _constants(x)
    out = x.new_empty(*x.shape[:2], rows.shape[1])
    with on_device(x):
        features_kernel[(x.shape[0], -(-x.shape[1] // constants["BN"]))](
            x, rows, x if top is None else top, out, *x.stride()[:2], x.shape[1], count, rows.shape[1], scale, eps, **constants,
            P=rows.shape[0], KEY=key, RELU=relu,
        )  # fmt: skip
    return out


def features_backward(
    grad: Tensor, phi: Tensor, x: Tensor, rows: Tensor, count: int, out: Tensor,
    *, scale: float, factor: float, share: float, relu: bool, key: bool,
) -> None:  # fmt: skip
    """Write `share` times the gradient of x to `out`; `factor` times that of the feature which holds the sum of all is added to each."""
    constants = _constants(x)
    with on_device(x):
        features_backward_kernel[(x.shape[0], -(-x.shape[1] // constants["BN"]))](
            x, rows, phi, grad, out, *x.stride()[:2], *out.stride()[:2], x.shape[1], count, rows.shape[1], scale, factor, share,
            **constants, KEY=key, RELU=relu,
        )  # fmt: skip
