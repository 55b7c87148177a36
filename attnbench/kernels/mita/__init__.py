"""MiTA attention in Triton: forward and backward, linear in the sequence.

M landmarks r (adaptive averages of the queries, or given) probe the keys: `P = r k^T`. Expert m holds the K keys with the largest
`P_m`; the landmark's value is `softmax(c P_m) v`. A query reads every landmark, with logit `q . r` times the shared scale, and the
keys of the expert whose landmark has the largest `q . r`, with logit `c q . k`, in one softmax. Scores are compared in float32,
from landmarks rounded to the input's dtype; ties go to the first; a NaN score counts as the smallest. Selection carries no gradient.

Work of one head, N queries, S experts a query: forward `2 N D (3 M + S K) + 2 N Dv (2 M + S K)` FLOP (the query-landmark scores
are computed twice, for the gate and for the softmax, since storing them would cost more bytes). Bytes that cross memory in the
forward pass: q three times (pool, gate, attend), k and v once and the output once, `4 N M / C` twice for the chunk maxima,
`7 N S` for the expert, rank and order of each query; the gathers of experts stay in L2. Kept for the backward pass beyond q, k, v and
the output: `8 N` bytes a head (order, log-sum-exp) and terms in M alone. The backward pass reads q and dO twice, the output once, k and
v once, and writes each gradient once; the gradients of the experts' keys, `K (D + Dv)` elements a segment of an expert, cross memory
twice more before they meet. Six launches forward (seven with S > 1), at most twelve backward,
no synchronisation with the host. Every sum has a fixed order: the same input gives the same output bit for bit. Experts are built on
a second stream while queries are routed. A call like an earlier one in shapes, strides, dtypes, alignment and options repeats its
launches, which spares the host most of its time (`_eager.py`); then buffers share memory in turn, and lie in the output until it is
written (`_layout.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._eager import call_key, plain, prepare, prepared
from ._forward import Setting
from ._operator import mita_forward

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["mita_attention", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = (32, 64, 96, 128)


def supported(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, topk: int, experts_per_query: int = 1, *, shared: bool = True, routed: bool = True
) -> list[str]:
    """Why these tensors and sizes cannot be run; empty means they can. Reads shapes and dtypes only."""
    n, d, dv = q.shape[2], q.shape[3], v.shape[3]
    checks = (
        (not shared and not routed, "neither the shared expert nor routed experts are on"),
        (q.dtype not in DTYPES, f"takes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"),
        (not q.dtype == k.dtype == v.dtype, "q, k and v differ in dtype"),
        (d not in DIMS or dv not in DIMS, f"head dimensions must be among {DIMS}, not {d} and {dv}"),
        (k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or k.shape[3] != d, "q, k, v do not fit [B, H, N, D]"),
        (q.shape[1] % k.shape[1] != 0, f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads"),
        (not 1 <= landmarks <= 256, f"takes 1 to 256 landmarks, not {landmarks}"),
        (routed and not 1 <= topk <= 256, f"takes 1 to 256 keys an expert, not {topk}"),
        (routed and not 1 <= experts_per_query <= 4, f"takes 1 to 4 experts a query, not {experts_per_query}"),
        (min(n, k.shape[2]) < 1, "the sequence is empty"),
        (max(n * max(landmarks + 1, experts_per_query), k.shape[2]) >= 2**31, "N (M + 1) exceeds 32-bit indices"),
    )
    return [reason for fails, reason in checks if fails]


def mita_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor | int | tuple[int, int],
    topk: int,
    experts_per_query: int = 1,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    shared: bool = True,
    routed: bool = True,
    scale: float | None = None,
    shared_scale: float | None = None,
) -> Tensor:
    """MiTA attention: `q [B, H, N, D]`, `k [B, Hkv, Nk, D]`, `v [B, Hkv, Nk, Dv]` to `[B, H, N, Dv]`.

    `landmarks` is a tensor `[B, H, M, D]`, a number M of segments of the sequence, or (rows, columns) of bins over `grid` =
    (height, width), the tokens after the first `prefix`. `scale` defaults to `D ** -0.5`, `shared_scale` to `1 / D`. Strided
    inputs are read in place where the innermost stride is 1. Under autocast inputs are cast to its dtype. Raises ValueError where
    the call is not supported.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    key = None
    if not (torch.compiler.is_compiling() or isinstance(landmarks, torch.Tensor)) and plain(q, k, v):
        key = call_key(q, k, v, landmarks, topk, experts_per_query, grid, prefix, shared, routed, scale, shared_scale)
        call = prepared(key)
        if call is not None:
            return call(q, k, v)
    given, pool = _pooling(q, landmarks, grid, prefix)
    m = pool[3] * pool[4] if given is None else given.shape[2]
    reasons = supported(q, k, v, m, topk, experts_per_query, shared=shared, routed=routed)
    if reasons:
        raise ValueError("; ".join(reasons))
    scale, shared_scale = scale or q.shape[-1] ** -0.5, shared_scale or 1 / q.shape[-1]
    options = (topk, experts_per_query if routed else 1, shared, routed, scale, shared_scale)
    out = mita_forward(q, k, v, given, *options, pool)[0]
    if key is not None:
        prepare(key, q, k, v, Setting(*options, tuple(pool)))
    return out


def _pooling(
    q: Tensor, landmarks: Tensor | int | tuple[int, int], grid: tuple[int, int] | None, prefix: int
) -> tuple[Tensor | None, list[int]]:
    """(landmarks in q's dtype, []) where given, else (None, [prefix, grid height, grid width, pool height, pool width])."""
    if isinstance(landmarks, torch.Tensor):
        if landmarks.ndim != 4 or landmarks.shape[:2] != q.shape[:2] or landmarks.shape[3] != q.shape[3]:
            raise ValueError(f"landmarks {list(landmarks.shape)} do not fit queries {list(q.shape)}")
        return landmarks.to(q.dtype), []
    height, width = grid or (1, q.shape[2] - prefix)
    rows, columns = (1, landmarks) if isinstance(landmarks, int) else landmarks
    if min(prefix, height - 1, width - 1, rows - 1, columns - 1) < 0 or prefix + height * width > q.shape[2]:
        raise ValueError(f"a {height} x {width} grid after {prefix} tokens does not fit N = {q.shape[2]}")
    return None, [prefix, height, width, rows, columns]
