"""The Triton kernels behind `topk`, `dsa` and `spark` as implementations: what they take, and which stage each kernel is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.method import Implementation, Limits, Params, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

DTYPES = ("bfloat16", "float16", "float32")
STAGES = {
    "score": ("topk_score_kernel",),
    "select": ("topk_select_kernel",),
    "attend": ("gather_attend_kernel",),
    "attend gradient": ("gather_gradient_kernel",),
}


def thresholded() -> tuple[Implementation, Implementation]:
    """`lists` of `spark`, and `triton`, which needs half of its memory and, far beyond 4096 tokens, several times its time."""

    def refused(shape: Shape, _params: Params, dtype: torch.dtype, device: str) -> list[str]:
        from attnbench.kernels import spark

        return [] if device != "cuda" else spark.supported(shape.dim, shape.dim_v, dtype)

    limits = Limits(("cuda",), DTYPES, cross=True, extra=refused)
    dense = Implementation(
        "triton",
        "attnbench.methods._spark:fused",
        limits,
        requires=("triton",),
        operators=("attnbench::spark_forward",),
        note="one pass over all pairs; scores below the threshold weigh nothing",
        stages={
            "select": ("spark_statistics_kernel",),
            "attend": ("spark_attend_kernel",),
            "attend gradient": ("spark_query_gradient_kernel", "spark_key_gradient_kernel"),
        },
    )
    lists = Implementation(
        "lists",
        "attnbench.methods._spark:listed",
        limits,
        requires=("triton",),
        operators=("attnbench::spark_listed_forward",),
        note="keys above the threshold listed in one pass over pairs, then gathered; dk and dv are added up in no fixed order",
        stages={
            "select": ("spark_statistics_kernel", "spark_list_kernel"),
            "attend": ("spark_gather_kernel", "spark_attend_kernel"),
            "attend gradient": ("spark_spread_kernel", "spark_query_gradient_kernel", "spark_key_gradient_kernel"),
        },
    )
    return lists, dense


def selecting(name: str, takes: Callable[[Shape, Params, torch.dtype], list[str]]) -> Implementation:
    """`triton` of a method that selects keys and attends to them; `takes` says why the kernels refuse, once a GPU is at hand."""

    def refused(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
        from attnbench.kernels import gather

        return [] if device != "cuda" else [*takes(shape, params, dtype), *gather.supported(shape.dim, shape.dim_v, dtype)]

    return Implementation(
        "triton",
        f"attnbench.methods._{name}:fused",
        Limits(("cuda",), DTYPES, cross=True, extra=refused),
        requires=("triton",),
        operators=("attnbench::gather_forward",),
        note="scores, selection and attention in fused kernels; dk and dv are added up in no fixed order",
        stages=STAGES,
    )
