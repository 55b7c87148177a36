"""Softmax attention by the flash-attn packages.

`o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j`, as `softmax`. Kernels: FlashAttention-4 (flash-attn-4, `flash_attn.cute`),
FlashAttention-3 (`flash_attn_interface`, Shah et al. 2024, https://arxiv.org/abs/2407.08608), FlashAttention-2 (flash-attn 2.x, Dao
2023, https://arxiv.org/abs/2307.08691). With more keys than queries, or fewer, these libraries align the causal mask to the last query
and key, not to the first: such calls are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from attnbench.method import Citation, Implementation, Limits

from . import softmax

if TYPE_CHECKING:
    import torch

    from attnbench.method import Params, Shape


def _causal_cross(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
    unequal = params.causal and shape.keys != shape.n
    return ["aligns the causal mask to the end where keys and queries differ in number"] if unequal else []


def _library(name: str, package: str, note: str, *, value_dim: bool) -> Implementation:
    limits = Limits(("cuda",), ("bfloat16", "float16"), max_dim=256, dim_multiple=8, value_dim=value_dim, cross=True, extra=_causal_cross)
    module = f"attnbench.methods._flash_{name}"
    return Implementation(name, f"{module}:attention", limits, (package,), witness=f"{module}:witness", layout="bnhd", note=note)


METHOD = replace(
    softmax.METHOD,
    name="flash_attn",
    title="FlashAttention",
    citation=Citation("Dao", 2023, "FlashAttention-2", "https://arxiv.org/abs/2307.08691", "ICLR 2024"),
    implementations=(
        _library("fa4", "flash_attn", "package flash-attn-4", value_dim=True),
        _library("fa3", "flash_attn_interface", "FlashAttention-3, for Hopper", value_dim=False),
        _library("fa2", "flash_attn", "package flash-attn 2.x", value_dim=False),
    ),
    library=True,
)
