"""A stand-in on the CPU for what flash-attn 2.6.3 offers and the authors of MiTA call: variable-length attention and its backward pass.

Segments are `cu_seqlens`; the log-sum-exp is float32 `[H, total]`; the forward pass returns eight items, of which the callers read the
padded output and the log-sum-exp. Written from the signatures alone.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


def _segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    pairs = (itertools.pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    return (tuple(slice(*edge) for edge in edges) for edges in zip(*pairs, strict=True))


def _wide(*tensors: Tensor) -> list[Tensor]:
    """`[T, H, D]` as `[H, T, D]` in at least float32."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1) for x in tensors]


@torch.autocast("cpu", enabled=False)  # a kernel of its own, which autocast does not look into
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, softmax_scale: float, **options: Any
) -> tuple[Tensor | None, ...]:
    """out, q, k, v, out_padded, softmax_lse, S_dmask, rng_state."""
    assert not options.get("causal")
    assert not options.get("dropout_p")
    outs, sums = [], []
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        a, b, c = _wide(q[queries], k[keys], v[keys])
        scores = softmax_scale * (a @ b.transpose(1, 2))
        outs.append((scores.softmax(-1) @ c).transpose(0, 1).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    out = torch.cat(outs)
    return out, q, k, v, out, torch.cat(sums, 1), None, None


def varlen_backward(  # noqa: PLR0917 - theirs
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    softmax_scale: float, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and the row sums of dout * out, with probabilities taken from the given output and log-sum-exp."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sums = (dout.float() * out.float()).sum(-1).t()
    for queries, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        a, b, c, g = _wide(q[queries], k[keys], v[keys], dout[queries])
        p = (softmax_scale * (a @ b.transpose(1, 2)) - softmax_lse[:, queries, None]).exp()
        ds = p * (g @ c.transpose(1, 2) - sums[:, queries, None]) * softmax_scale
        dq[queries] = (ds @ b).transpose(0, 1).to(q.dtype)
        dk[keys] = (ds.transpose(1, 2) @ a).transpose(0, 1).to(k.dtype)
        dv[keys] = (p.transpose(1, 2) @ g).transpose(0, 1).to(v.dtype)
    return dq, dk, dv, sums


def varlen(*args: Any, **options: Any) -> Tensor:
    """The public function; autograd differentiates it here."""
    out = varlen_forward(*args, **options)[0]
    assert out is not None
    return out


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `flash_attn` and `flash_attn.flash_attn_interface` importable."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    interface._flash_attn_varlen_forward = varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = varlen_backward  # type: ignore[attr-defined]
    for module in (package, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
