"""The fused kernels of `attnbench.kernels.blocks`, and of `compress`, as an implementation of methods that route queries to blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.method import Implementation, Limits, Params, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

STAGES = {
    "attend": ("pair_attend_kernel", "region_attend_kernel", "compressed_attend_kernel"),
    "route": ("block_route_kernel", "importance_kernel", "block_select_kernel"),
    "merge": ("merge_kernel",),
    "attend gradient": (
        "delta_kernel",
        "pair_query_gradient_kernel",
        "region_query_gradient_kernel",
        "sum_kernel",
        "key_gradient_kernel",
        "key_sum_kernel",
        "compressed_query_gradient_kernel",
        "compressed_key_gradient_kernel",
    ),
}
"""Stage -> names of its kernels."""
_MOST_PAIRS = 1 << 30  # the kernels count pairs in 32 bits


def implementation(
    target: str, pairs: Callable[[Shape, Params], int], note: str, refused: Callable[[Shape, Params], list[str]] = lambda _s, _p: []
) -> Implementation:
    """`triton`. `pairs` counts the queries times the blocks that each reads, `refused` says what else the kernels do not do."""

    def reasons(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
        count = pairs(shape, params)
        found = [f"{count} pairs of query and block exceed the {_MOST_PAIRS} of the kernels"] if count >= _MOST_PAIRS else []
        return found + refused(shape, params)

    return Implementation(
        "triton",
        target,
        Limits(("cuda",), ("bfloat16", "float16", "float32"), max_dim=128, extra=reasons),
        requires=("triton",),
        operators=("attnbench::blocks_forward",),
        note=note,
        stages=STAGES,
    )
