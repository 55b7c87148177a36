"""Compiles the kernels that select, gather and skim for an H100, which needs no GPU: the interpreter accepts more than the compiler does.

Run as a script, with TRITON_INTERPRET unset; prints a line a kernel: name, bytes of shared memory.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnbench.kernels import gather, topk
from attnbench.kernels.spark import _forward, _gradient, _lists

WIDE = ("gate", "chunk_top", "block_top", "score", "lse", "limit", "used", "delta", "mean", "squares")
LISTS = ("index", "count", "flags", "some")
INPUTS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")


def compiled(kernel: Any, constants: dict[str, Any], warps: int, dtype: str, stages: int = 2) -> Any:
    """A kernel with these constants; pointers and strides divide by 16. Sizes that are 1 are constants, as at a launch."""
    names = [p.name for p in kernel.params]
    atomics = ("dk", "dv") if kernel.__name__.startswith(("gather", "spark_spread")) or constants.get("SOME") else ()
    types = {name: "fp32" if name.startswith("scale") else "i32" for name in names}
    types |= {name: "*i32" if name in LISTS else "*fp32" if name in WIDE + atomics else f"*{dtype}" for name in names
              if name in (*WIDE, *INPUTS, *LISTS)}  # fmt: skip
    own = {name: value for name, value in constants.items() if name in names}
    place = {name: i for i, name in enumerate(names)}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(own, "constexpr"),
        constexprs={(place[name],): value for name, value in own.items()},
        attrs={(place[n],): [["tt.divisibility", 16]] for n in names if n not in own and (types[n][0] == "*" or n.startswith("stride"))},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def main() -> None:
    """Half precision at D = 64 and an indexer in float32, causal; one query and one key; single precision at D = 128."""
    ones = dict.fromkeys(("H", "N", "M", "TILES", "SPLITS", "BLOCKS"), 1)
    jobs: list[tuple[Any, dict[str, Any], int, str]] = []
    select = {"G": 1, "J": 0, "D": 64, "BD": 64, "C": 8, "BQ": 64, "BN": 128, "K": 64, "KP": 64, "BB": 512, "BC": 32, "PREC": "tf32"}
    select |= {"KC": 64, "LB": 64, "LISTED": 2}
    index = {**select, "LISTED": 1, "J": 4, "D": 32, "BD": 32, "BN": 64, "PREC": "tf32x3", "CAUSAL": True}
    tiny = {**select, **ones, "CAUSAL": False, "K": 1, "KP": 1, "BB": 1, "BC": 8, "KC": 1, "LB": 1, "LISTED": 0}
    for kernel in (topk.topk_score_kernel, topk.topk_select_kernel):
        jobs += [(kernel, {**select, "CAUSAL": True}, 4, "bf16"), (kernel, index, 4, "fp32"), (kernel, tiny, 2, "bf16")]
    gathers = {"G": 1, "LISTS": 16, "D": 64, "DV": 64, "BD": 64, "BDV": 64, "BK": 64}
    for kernel in (gather.gather_attend_kernel, gather.gather_gradient_kernel):
        jobs += [(kernel, gathers, 2, "bf16"), (kernel, {**gathers, "H": 1, "N": 1, "M": 1, "K": 1, "BK": 1}, 1, "bf16")]
    pairs = {"G": 1, "R": 32, "S": 32, "DV": 64, "BR": 32, "BS": 32, "BDV": 64, "BQ": 64, "BN": 64, "PREC": "tf32", "CAUSAL": True}
    wide = {**pairs, "R": 64, "S": 64, "DV": 128, "BR": 64, "BS": 64, "BDV": 128, "BQ": 32, "BN": 32, "PREC": "tf32x3", "CAUSAL": False}
    for kernel in (
        _forward.spark_statistics_kernel,
        _forward.spark_attend_kernel,
        _gradient.spark_query_gradient_kernel,
        _gradient.spark_key_gradient_kernel,
    ):
        jobs += [(kernel, {**pairs, **own}, 4, "bf16") for own in ({"SOME": True}, {"SOME": False, **ones})]
        jobs += [(kernel, {**wide, "SOME": False}, 8, "fp32")]
    lists = {**pairs, "L": 256, "TQ": 64, "BK": 64}
    for kernel in (_lists.spark_list_kernel, _lists.spark_gather_kernel, _lists.spark_spread_kernel):
        jobs += [(kernel, lists, 4, "bf16"), (kernel, {**wide, **ones, "L": 36, "TQ": 64, "BK": 8}, 4, "fp32")]
    for kernel, constants, warps, dtype in jobs:
        print(kernel.__name__, compiled(kernel, constants, warps, dtype).metadata.shared)


if __name__ == "__main__":
    main()
