"""Softmax attention by `xformers.ops.memory_efficient_attention`, which picks one of several kernels.

`o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j`, as `softmax`. Lefaudeux et al. 2022, https://github.com/facebookresearch/xformers, after
Rabe and Staats 2021, https://arxiv.org/abs/2112.05682.
"""

from __future__ import annotations

from dataclasses import replace

from attnbench.method import Citation, Implementation, Limits

from . import softmax

METHOD = replace(
    softmax.METHOD,
    name="xformers",
    title="xFormers",
    citation=Citation("Lefaudeux et al.", 2022, "xFormers", "https://github.com/facebookresearch/xformers", ""),
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
    library=True,
)
