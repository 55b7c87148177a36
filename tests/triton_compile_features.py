"""Compiles the kernels of feature maps for an H100, which needs no GPU: the interpreter accepts more than the compiler does.

Run as a script, with TRITON_INTERPRET unset; prints a line a kernel: name, bytes of shared memory.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnbench.kernels import favor, features

INPUTS, WIDE = ("x", "out", "phi", "rows"), ("inverse", "power", "dscale", "dpower", "top", "grad")
FLOATS = ("share", "step", "least", "eps", "scale", "factor")


def compiled(kernel: Any, constants: dict[str, Any], warps: int, dtype: str) -> Any:
    """A kernel with these constants; pointers and strides divide by 16. Sizes that are 1 are constants, as at a launch."""
    names = [p.name for p in kernel.params]
    types = {name: "fp32" if name in FLOATS else "i32" for name in names}
    types |= {name: f"*{dtype}" for name in names if name in INPUTS} | {name: "*fp32" for name in names if name in WIDE}
    if kernel.__name__.startswith("focus"):
        types["power"] = "fp32"
    if kernel is favor.largest_kernel:
        types["out"] = "*fp32"
    own = {name: value for name, value in constants.items() if name in names}
    place = {name: i for i, name in enumerate(names)}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(own, "constexpr"),
        constexprs={(place[name],): value for name, value in own.items()},
        attrs={(place[n],): [["tt.divisibility", 16]] for n in names if n not in own and (types[n][0] == "*" or n.startswith("stride"))},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})


def main() -> None:
    """Half precision at D = 64; one token of one head; single precision at D = 128, and 8192 channels of all heads."""
    jobs: list[tuple[Any, dict[str, Any], int, str]] = []
    ones = dict.fromkeys(("N", "PROGRAMS", "TILES", "start"), 1)
    for back in (False, True):
        for kernel in (features.elu_kernel, features.cosine_kernel):
            jobs.append((kernel, {"D": 64, "BD": 64, "BN": 64, "BACK": back}, 4, "bf16"))
            jobs.append((kernel, {"D": 20, "BD": 32, "BN": 128, "BACK": back, **ones}, 4, "fp32"))
    for kernel in (features.powers_kernel, features.powers_backward_kernel):
        jobs.append((kernel, {"D": 64, "BD": 64, "BN": 64, "TILES": 1}, 4, "bf16"))
        jobs.append((kernel, {"D": 256, "BD": 256, "BN": 16, **ones, "TILES": 4}, 4, "fp32"))
    for kernel in (features.focus_kernel, features.focus_backward_kernel):
        jobs.append((kernel, {"H": 16, "D": 64, "BC": 1024, "BN": 4, "TILES": 16}, 8, "bf16"))
        jobs.append((kernel, {"H": 6, "D": 64, "BC": 512, "BN": 8, "TILES": 8}, 8, "bf16"))
        jobs.append((kernel, {"H": 64, "D": 128, "BC": 8192, "BN": 1, **ones, "TILES": 64}, 16, "fp32"))
    half = {"D": 64, "BD": 64, "BN": 64, "BW": 64, "PREC": "tf32"}
    single = {"D": 128, "BD": 128, "BN": 64, "BW": 64, "PREC": "ieee", "P": 1}
    jobs += [(favor.largest_kernel, {**half, "P": 2}, 4, "bf16"), (favor.largest_kernel, {**single, "N": 1, "TILES": 1}, 4, "fp32")]
    for key in (False, True):
        for relu in (False, True):
            choice = {"KEY": key, "RELU": relu}
            for kernel in (favor.features_kernel, favor.features_backward_kernel):
                jobs += [(kernel, {**half, "P": 3 if relu else 2, **choice}, 4, "bf16"), (kernel, {**single, **choice, "R": 1}, 4, "fp32")]
    for kernel, constants, warps, dtype in jobs:
        made = compiled(kernel, constants, warps, dtype)
        print(kernel.__name__, made.metadata.shared)


if __name__ == "__main__":
    main()
