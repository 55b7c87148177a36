"""Backends of torch's scaled_dot_product_attention, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnbench.stages import stage

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.method import Params


def _run(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    with sdpa_kernel(backend), stage("attend"):
        return scaled_dot_product_attention(q, k, v, is_causal=params.causal, enable_gqa=q.shape[1] != k.shape[1])


def flash(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """FlashAttention."""
    return _run(SDPBackend.FLASH_ATTENTION, q, k, v, params)


def cudnn(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """cuDNN's fused attention."""
    return _run(SDPBackend.CUDNN_ATTENTION, q, k, v, params)


def efficient(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """The memory-efficient kernel that torch took from xformers."""
    return _run(SDPBackend.EFFICIENT_ATTENTION, q, k, v, params)


def math(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """Plain matrix products; writes the N x N scores."""
    return _run(SDPBackend.MATH, q, k, v, params)
