"""Feature maps of kernelised attention in Triton, each in one pass over its inputs, and their gradients likewise.

Tensors are `x: [X, N, D]` with unit inner stride, X being batches times heads; features `[X, N, R]` contiguous, in the dtype of x; their
gradients contiguous, in any float dtype. Everything between is float32.

- `elu`: `elu(x) + 1`.
- `cosine`: `[relu(x) sin(a_i), relu(x) cos(a_i)]` with `a_i = (i + 1) step`.
- `powers`: `[relu(y)^p, relu(-y)^p]` with `y = x inverse`; `inverse` and p `[X, D]`.
- `focus`: `|y| y^p / |y^p|` with `y = (relu(x) + least) inverse`, lengths over the heads of a token: `x: [B, H, N, D]`, `inverse: [H, D]`.

Gradients of `inverse` and p are returned as sums `sum dy y` and `sum e log |y|`, `e = g phi`, which a caller turns into what it learns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import on_device, power
from ._tile import LOG2E

__all__ = ["cosine", "cosine_backward", "elu", "elu_backward", "focus", "focus_backward", "powers", "powers_backward"]

_TILE = 4096
"""numbers of x in a tile"""
_TOKENS = 64
"""tokens, at least, whose gradients one program adds up"""
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile(x, stride_x, stride_n, i_x, o_n, N, D: tl.constexpr, BD: tl.constexpr):
    """`[BN, BD]` of one row of X in float32, 0 beyond its edges; offsets of its tokens and channels, and what is within."""
    o_d = tl.arange(0, BD)
    mask = (o_n < N)[:, None] & (o_d < D)[None, :]
    p_x = x + i_x.to(tl.int64) * stride_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32), o_d, mask


@triton.jit
def elu_kernel(
    x, grad, out, stride_x, stride_n, stride_ox, stride_on, share, N,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Features, or with BACK the gradient of x."""
    i_x, o_n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b_x, o_d, mask = tile(x, stride_x, stride_n, i_x, o_n, N, D, BD)
    b_e = tl.exp2(tl.minimum(b_x, 0.0) * LOG2E)
    if BACK:
        b_g, _, _ = tile(grad, N * D, D, i_x, o_n, N, D, BD)
        b_out = share * b_g * b_e
    else:
        b_out = tl.where(b_x > 0, 1.0 + b_x, b_e)
    p_out = out + i_x.to(tl.int64) * stride_ox + o_n.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit
def cosine_kernel(
    x, grad, out, stride_x, stride_n, stride_ox, stride_on, share, start, step, N,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Features, or with BACK the gradient of x."""
    i_x, o_n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b_x, o_d, mask = tile(x, stride_x, stride_n, i_x, o_n, N, D, BD)
    b_a = ((start + o_n + 1).to(tl.float32) * step)[:, None]
    b_sin, b_cos = tl.sin(b_a), tl.cos(b_a)
    p_out = out + i_x.to(tl.int64) * stride_ox + o_n.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    if BACK:
        b_g, _, _ = tile(grad, 2 * N * D, 2 * D, i_x, o_n, N, D, BD)
        b_h, _, _ = tile(grad + D, 2 * N * D, 2 * D, i_x, o_n, N, D, BD)
        # features as rounded: their products with the gradients may cancel
        b_s = (b_x * b_sin).to(x.dtype.element_ty).to(tl.float32)
        b_c = (b_x * b_cos).to(x.dtype.element_ty).to(tl.float32)
        b_out = tl.where(b_x > 0, share * (b_g * b_s + b_h * b_c) / tl.where(b_x > 0, b_x, 1.0), 0.0)
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask)
    else:
        b_x = tl.maximum(b_x, 0.0)
        tl.store(p_out, (b_x * b_sin).to(out.dtype.element_ty), mask=mask)
        tl.store(p_out + D, (b_x * b_cos).to(out.dtype.element_ty), mask=mask)


@triton.jit
def powers_kernel(x, inverse, power, out, stride_x, stride_n, N, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Features."""
    i_x, o_n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b_x, o_d, mask = tile(x, stride_x, stride_n, i_x, o_n, N, D, BD)
    b_s = tl.load(inverse + i_x * D + o_d, mask=o_d < D, other=1.0)[None, :]
    b_p = tl.load(power + i_x * D + o_d, mask=o_d < D, other=1.0)[None, :]
    b_t = tl.exp2(b_p * tl.log2(tl.where(b_x == 0, 1.0, tl.abs(b_x) * b_s)))
    p_out = out + (i_x.to(tl.int64) * N + o_n)[:, None] * (2 * D) + o_d[None, :]
    tl.store(p_out, tl.where(b_x > 0, b_t, 0.0).to(out.dtype.element_ty), mask=mask)
    tl.store(p_out + D, tl.where(b_x < 0, b_t, 0.0).to(out.dtype.element_ty), mask=mask)


@triton.jit
def powers_backward_kernel(
    x, inverse, power, grad, out, dscale, dpower, stride_x, stride_n, stride_ox, stride_on, share, N, PROGRAMS,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and the two sums over the tokens of a program, `[X, PROGRAMS, D]`."""
    i_x = tl.program_id(0)
    o_d = tl.arange(0, BD)
    b_s = tl.load(inverse + i_x * D + o_d, mask=o_d < D, other=1.0)[None, :]
    b_p = tl.load(power + i_x * D + o_d, mask=o_d < D, other=1.0)[None, :]
    b_scale, b_power = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for i in range(TILES):
        o_n = (tl.program_id(1) * TILES + i) * BN + tl.arange(0, BN)
        b_x, _, mask = tile(x, stride_x, stride_n, i_x, o_n, N, D, BD)
        b_g, _, _ = tile(grad, 2 * N * D, 2 * D, i_x, o_n, N, D, BD)
        b_h, _, _ = tile(grad + D, 2 * N * D, 2 * D, i_x, o_n, N, D, BD)
        b_l = tl.log2(tl.where(b_x == 0, 1.0, tl.abs(b_x) * b_s))
        b_e = share * tl.where(b_x > 0, b_g, b_h) * tl.where(b_x == 0, 0.0, tl.exp2(b_p * b_l))
        b_scale += tl.sum(b_p * b_e, 0)
        b_power += tl.sum(b_e * b_l * LN2, 0)
        p_out = out + i_x.to(tl.int64) * stride_ox + o_n.to(tl.int64)[:, None] * stride_on + o_d[None, :]
        tl.store(p_out, (b_p * b_e / tl.where(b_x == 0, 1.0, b_x)).to(out.dtype.element_ty), mask=mask)
    o_sum = (i_x.to(tl.int64) * PROGRAMS + tl.program_id(1)) * D + o_d
    tl.store(dscale + o_sum, b_scale, mask=o_d < D)
    tl.store(dpower + o_sum, b_power, mask=o_d < D)


@triton.jit
def focused(x, inverse, stride_b, stride_h, stride_n, i_b, o_n, N, least, power, H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr):
    """Tiles `[BN, BC]` of tokens and the channels of all heads: x, y, features, the squared length of y `[BN, 1]`, and what is within."""
    o_c = tl.arange(0, BC)
    mask = (o_n < N)[:, None] & (o_c < H * D)[None, :]
    o_x = i_b.to(tl.int64) * stride_b + (o_c // D).to(tl.int64)[None, :] * stride_h + o_n.to(tl.int64)[:, None] * stride_n
    b_x = tl.load(x + o_x + (o_c % D)[None, :], mask=mask, other=0.0).to(tl.float32)
    b_s = tl.load(inverse + o_c, mask=o_c < H * D, other=1.0)[None, :]
    b_y = tl.where(mask, (tl.maximum(b_x, 0.0) + least) * b_s, 0.0)
    b_square = tl.sum(b_y * b_y, 1)[:, None]
    b_length = tl.sqrt(tl.where((o_n < N)[:, None], b_square, 1.0))
    b_u = tl.where(mask, tl.exp2(power * tl.log2(tl.where(mask, b_y, 1.0) / b_length)), 0.0)
    b_whole = tl.sqrt(tl.where((o_n < N)[:, None], tl.sum(b_u * b_u, 1)[:, None], 1.0))
    return b_x, b_y, b_u * (b_length / b_whole), b_length * b_length, b_s, mask


@triton.jit
def focus_kernel(
    x, inverse, out, stride_b, stride_h, stride_n, N, least, power, H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Features `[B, H, N, D]`."""
    i_b, o_n, o_c = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BC)
    _, _, b_f, _, _, mask = focused(x, inverse, stride_b, stride_h, stride_n, i_b, o_n, N, least, power, H, D, BC)
    o_out = ((i_b.to(tl.int64) * H + o_c // D)[None, :] * N + o_n[:, None]) * D + (o_c % D)[None, :]
    tl.store(out + o_out, b_f.to(out.dtype.element_ty), mask=mask)


@triton.jit
def focus_backward_kernel(
    x, inverse, grad, out, dscale, stride_b, stride_h, stride_n, stride_ob, stride_oh, stride_on, share, N, PROGRAMS, least, power,
    H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and the sum over the tokens of a program, `[B, PROGRAMS, H D]`."""
    i_b, o_c = tl.program_id(0), tl.arange(0, BC)
    b_scale = tl.zeros([BC], tl.float32)
    for i in range(TILES):
        o_n = (tl.program_id(1) * TILES + i) * BN + tl.arange(0, BN)
        b_x, b_y, b_f, b_square, b_s, mask = focused(x, inverse, stride_b, stride_h, stride_n, i_b, o_n, N, least, power, H, D, BC)
        o_g = ((i_b.to(tl.int64) * H + o_c // D)[None, :] * N + o_n[:, None]) * D + (o_c % D)[None, :]
        b_e = b_f * tl.load(grad + o_g, mask=mask, other=0.0).to(tl.float32)
        b_t = tl.sum(b_e, 1)[:, None] / b_square
        b_c = share * (power * (b_e - b_t * b_f * b_f) + b_t * b_y * b_y)
        b_scale += tl.sum(b_c, 0)
        o_x = i_b.to(tl.int64) * stride_ob + (o_c // D).to(tl.int64)[None, :] * stride_oh + o_n.to(tl.int64)[:, None] * stride_on
        b_dx = tl.where(b_x > 0, b_c * b_s / tl.where(mask, b_y, 1.0), 0.0)
        tl.store(out + o_x + (o_c % D)[None, :], b_dx.to(out.dtype.element_ty), mask=mask)
    tl.store(dscale + (i_b.to(tl.int64) * PROGRAMS + tl.program_id(1)) * (H * D) + o_c, b_scale, mask=o_c < H * D)


def _sizes(x: Tensor) -> dict[str, int]:
    """Constants of a kernel over tiles of tokens of `x: [X, N, D]`."""
    wide = max(16, power(x.shape[-1]))
    return {"D": x.shape[-1], "BD": wide, "BN": max(1, _TILE // wide)}


def _map(kernel, x: Tensor, grad: Tensor | None, out: Tensor, *values: float) -> Tensor:
    sizes = _sizes(x)
    with on_device(x):
        kernel[(x.shape[0], -(-x.shape[1] // sizes["BN"]))](
            x, x if grad is None else grad, out, *x.stride()[:2], *out.stride()[:2], *values, x.shape[1], **sizes, BACK=grad is not None
        )
    return out


def elu(x: Tensor) -> Tensor:
    """`[X, N, D]` -> `[X, N, D]`."""
    return _map(elu_kernel, x, None, x.new_empty(x.shape), 1.0)


def elu_backward(grad: Tensor, x: Tensor, out: Tensor, share: float) -> None:
    """Write `share` times the gradient of x to `out`."""
    _map(elu_kernel, x, grad, out, share)


def cosine(x: Tensor, start: int, step: float) -> Tensor:
    """`[X, N, D]` -> `[X, N, 2 D]`; the first token is number `start`."""
    return _map(cosine_kernel, x, None, x.new_empty(*x.shape[:2], 2 * x.shape[2]), 1.0, start, step)


def cosine_backward(grad: Tensor, x: Tensor, out: Tensor, share: float, start: int, step: float) -> None:
    """Write `share` times the gradient of x to `out`."""
    _map(cosine_kernel, x, grad, out, share, start, step)


def powers(x: Tensor, inverse: Tensor, power: Tensor) -> Tensor:
    """`[X, N, D]` -> `[X, N, 2 D]`; `inverse` and `power` float32 `[X, D]`, contiguous."""
    out, sizes = x.new_empty(*x.shape[:2], 2 * x.shape[2]), _sizes(x)
    with on_device(x):
        powers_kernel[(x.shape[0], -(-x.shape[1] // sizes["BN"]))](x, inverse, power, out, *x.stride()[:2], x.shape[1], **sizes)
    return out


def powers_backward(grad: Tensor, x: Tensor, inverse: Tensor, power: Tensor, out: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Write `share` times the gradient of x to `out`; `share` times `sum dy y` and `sum e log |y|`, `[X, D]`."""
    sizes = _sizes(x)
    tiles = max(1, _TOKENS // sizes["BN"])
    programs = -(-x.shape[1] // (sizes["BN"] * tiles))
    sums = [x.new_empty(x.shape[0], programs, x.shape[2], dtype=torch.float32) for _ in range(2)]
    with on_device(x):
        powers_backward_kernel[(x.shape[0], programs)](
            x, inverse, power, grad, out, *sums, *x.stride()[:2], *out.stride()[:2], share, x.shape[1], programs, **sizes, TILES=tiles
        )
    return sums[0].sum(1), sums[1].sum(1)


def _all_heads(x: Tensor) -> dict[str, int]:
    """Constants of a kernel over tiles of tokens of all heads of `x: [B, H, N, D]`."""
    wide = max(16, power(x.shape[1] * x.shape[3]))
    return {"H": x.shape[1], "D": x.shape[3], "BC": wide, "BN": max(1, _TILE // wide), "num_warps": 8 if wide <= _TILE else 16}


def focus(x: Tensor, inverse: Tensor, least: float, power: float) -> Tensor:
    """`[B, H, N, D]` -> `[B, H, N, D]`; `inverse` float32 `[H, D]`, contiguous."""
    out, sizes = x.new_empty(x.shape), _all_heads(x)
    with on_device(x):
        focus_kernel[(x.shape[0], -(-x.shape[2] // sizes["BN"]))](x, inverse, out, *x.stride()[:3], x.shape[2], least, power, **sizes)
    return out


def focus_backward(grad: Tensor, x: Tensor, inverse: Tensor, out: Tensor, share: float, *, least: float, power: float) -> Tensor:
    """Write `share` times the gradient of x to `out`; `share` times `sum dy y`, `[H, D]`."""
    sizes = _all_heads(x)
    tiles = max(1, _TOKENS // sizes["BN"])
    programs = -(-x.shape[2] // (sizes["BN"] * tiles))
    sums = x.new_empty(x.shape[0], programs, *inverse.shape, dtype=torch.float32)
    with on_device(x):
        focus_backward_kernel[(x.shape[0], programs)](
            x, inverse, grad, out, sums, *x.stride()[:3], *out.stride()[:3], share, x.shape[2], programs, least, power, **sizes,
            TILES=tiles,
        )  # fmt: skip
    return sums.sum((0, 1))
