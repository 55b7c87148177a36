"""How all kernels become operators that torch can trace, compile and differentiate, and on which device they are launched.

Operators are defined through torch.library's schema functions, not its `custom_op`, which compares the storages of all arguments and
results at every call: on a slow host that takes longer than the kernels of a short sequence. Tests compare them by
`torch.library.opcheck`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

_HERE: AbstractContextManager[Any] = nullcontext()


def define(name: str, *, final: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator `attnbench::name`, which is returned.

    The function changes no argument and returns neither an argument nor a view of one, nor two views of one storage. Tracing needs
    `torch.library.register_fake`, a gradient `torch.library.register_autograd`. `final` is for results in a float type that have no
    derivative: asking for one then raises RuntimeError, where torch would warn and take it for zero.
    """

    def operator(function: Callable[..., Any]) -> Any:
        full = f"attnbench::{name}"
        torch.library.define(full, torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(full, "CompositeExplicitAutograd")(function)

        def refuse(_ctx: Any, *_grads: Any) -> Any:
            raise RuntimeError(f"{full} has no derivative")

        if final:
            torch.library.register_autograd(full, refuse)
        return getattr(torch.ops.attnbench, name).default

    return operator


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches within go to the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


def unit_rows(x: Tensor) -> Tensor:
    """`x` itself where its innermost stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def misfits(q: Tensor, k: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...], most: int) -> list[tuple[bool, str]]:
    """(whether it is at fault, reason) of what every kernel over queries, keys and values asks of dtypes, shapes and heads."""
    d, dv = q.shape[3], v.shape[3]
    return [
        (q.dtype not in dtypes, f"takes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"),
        (not q.dtype == k.dtype == v.dtype, "q, k and v differ in dtype"),
        (max(d, dv) > most, f"takes head dimensions up to {most}, not {max(d, dv)}"),
        (k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or k.shape[3] != d, "q, k, v do not fit [B, H, N, D]"),
        (q.shape[1] % k.shape[1] != 0, f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads"),
    ]


def power(x: float) -> int:
    """The least power of two not below x and 1; Triton's own takes microseconds."""
    return 1 << max(0, int(-(-x // 1)) - 1).bit_length()
