"""Compiles the kernels of routed blocks and of compressed keys for an H100, which needs no GPU: the interpreter accepts more than that.

Run as a script, with TRITON_INTERPRET unset; prints a line a kernel: name, bytes of shared memory.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnbench.kernels._define import power
from attnbench.kernels.blocks import _keys, _pairs, _regions, _route, _sort
from attnbench.kernels.blocks._plan import plan, region_tile
from attnbench.kernels.compress import _attend, _choose, _gradient

POINTERS = {
    **dict.fromkeys(("q", "k", "v", "grad", "out", "low", "dq", "dx"), "bf16"),
    **dict.fromkeys(("means", "part", "part_lse", "lse", "delta", "part_k", "part_v", "score"), "fp32"),
    **dict.fromkeys(("order", "items", "members", "chosen", "routes", "start", "edges", "table"), "i32"),
    **dict.fromkeys(("ids", "ordered"), "i16"),
}


def compiled(kernel: Any, constants: dict[str, Any], warps: int) -> Any:
    """A kernel with these constants; pointers and strides divide by 16."""
    names = [p.name for p in kernel.params]
    place = {name: i for i, name in enumerate(names)}
    types = {name: "*" + POINTERS[name] if name in POINTERS else "fp32" if name == "scale" else "i32" for name in names}
    own = {name: value for name, value in constants.items() if name in names}
    aligned = {(place[name],): [["tt.divisibility", 16]] for name in names if name in POINTERS or name.startswith("stride")}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(own, "constexpr"),
        constexprs={(place[name],): value for name, value in own.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})


def main() -> None:
    """MoBA's blocks of 512 keys at D = 64, regions of 49 tokens at D = 128, NSA's compressed keys in groups of 4 heads."""
    for width, slots, dim, regions, causal in ((512, 3, 64, False, True), (49, 4, 128, True, False)):
        p = plan(65536 * slots, 65536 // width, width, dim, dim, False)
        common = {"G": 1, "S": slots, "W": width, "D": dim, "DV": dim, "BK": p.block, "BD": p.dim, "BDV": p.dim_v, "PREC": p.prec,
                  "CAUSAL": causal, "LOW": True, "REGIONS": regions, "C": 1, "R": 1, "BT": p.rows}  # fmt: skip
        tile = region_tile(width, False) if regions else p.tile
        forward = [_regions.region_attend_kernel] if regions else [_pairs.pair_attend_kernel, _pairs.merge_kernel, _pairs.sum_kernel]
        query = _regions.region_query_gradient_kernel if regions else _pairs.pair_query_gradient_kernel
        common |= {"SP": power(slots), "BE": 64, "BLOCK": width}
        jobs = [] if regions else [(_route.block_route_kernel, 64, 4)]
        jobs += [(x, tile, p.warps) for x in forward] + [(query, tile, p.query_warps)]
        jobs += [(_keys.key_gradient_kernel, p.grad_tile, p.grad_warps), (_keys.key_sum_kernel, 0, 4), (_keys.delta_kernel, 0, 4)]
        for kernel, rows, warps in jobs:
            print(kernel.__name__, compiled(kernel, {**common, "T": rows}, warps).metadata.shared)
    for kernel, size in ((_sort.number_kernel, "BP"), (_sort.start_kernel, "BE"), (_sort.item_kernel, "BE")):
        print(kernel.__name__, compiled(kernel, {size: 1024}, 4).metadata.shared)
    sizes = {"G": 4, "D": 64, "DV": 64, "BK": 64, "BD": 64, "BDV": 64, "PREC": "tf32", "STRIDE": 16, "LENGTH": 32, "BLOCK": 64,
             "CAUSAL": True, "LOW": True, "K": 16, "KP": 16}  # fmt: skip
    for kernel, rows, blocks, warps in (
        (_attend.compressed_attend_kernel, 128, 0, 8), (_choose.importance_kernel, 64, 64, 4), (_choose.block_select_kernel, 0, 4096, 4),
        (_gradient.compressed_query_gradient_kernel, 64, 0, 4), (_gradient.compressed_key_gradient_kernel, 64, 0, 4),
    ):  # fmt: skip
        print(kernel.__name__, compiled(kernel, {**sizes, "T": rows, "BE": blocks}, warps).metadata.shared)


if __name__ == "__main__":
    main()
