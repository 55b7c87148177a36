"""Softmax attention by `xformers.ops.memory_efficient_attention`, which picks one of several kernels.

`o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j`, as `softmax`. Lefaudeux et al. 2022, https://github.com/facebookresearch/xformers, after
Rabe and Staats 2021, https://arxiv.org/abs/2112.05682.
"""

from __future__ import annotations

from attnbench.method import Citation, Implementation, Limits, Method

from . import softmax
from .softmax import SoftmaxParams, cost, experts, reference

__all__ = ["METHOD", "cost", "experts", "reference"]

METHOD = Method(
    name="xformers",
    title="xFormers",
    coordinates=softmax.METHOD.coordinates,
    citation=Citation("Lefaudeux et al.", 2022, "xFormers", "https://github.com/facebookresearch/xformers", ""),
    params=SoftmaxParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True),
    implementations=(
        Implementation(
            "memory_efficient",
            "attnbench.methods._xformers:attention",
            Limits(("cuda",), ("float32", "bfloat16", "float16"), dim_multiple=8, cross=True),
            requires=("xformers",),
            witness="attnbench.methods._xformers:witness",
            layout="bnhd",
            note="the kernel that xformers picks",
        ),
    ),
    exact=True,
    library=True,
)
