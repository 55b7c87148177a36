"""Launches without Triton's per-call argument analysis, which at short lengths takes longer than the kernels.

Triton specialises a kernel for its arguments (types, values of 1, divisibility by 16) and looks that up anew at each launch. Here the
launches of one call of the operator are a list, found by one key: two calls with the same key differ in tensors alone, alike in shape,
stride, dtype and alignment, and so launch the same compiled kernels in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton import knobs
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

_PREPARED: dict[Hashable, list[tuple[Any, tuple[object, ...]]]] = {}
_MOST = 4096
"""keys kept; each holds references to kernels that Triton keeps anyway"""
_ALIGNMENT = 16
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def signature(*tensors: torch.Tensor) -> Hashable:
    """What Triton's specialisation may see of the caller's tensors; those allocated by the operator are always aligned."""
    return (tensors[0].get_device(), *((x.dtype, x.shape, x.stride(), x.data_ptr() % _ALIGNMENT) for x in tensors))


class Launcher:
    """The launches of one call of the operator, in order. `key` includes the `signature` of its tensors and all else that it depends on."""

    def __init__(self, key: Hashable) -> None:
        if len(_PREPARED) >= _MOST and key not in _PREPARED:
            _PREPARED.clear()
        self.prepared = _PREPARED.setdefault(key, [])
        self.place = 0
        # a profiler's hooks want what Triton's own launches tell them
        self.direct = not getattr(knobs.runtime.launch_enter_hook, "calls", None)
        self.stream = driver.active.get_current_stream(driver.active.get_current_device()) if self.prepared else 0

    def __call__(self, kernel: Any, programs: int, *args: object, **constants: object) -> None:
        """Launch `programs` programs of a Triton kernel; `constants` are its compile-time arguments and options."""
        if self.place < len(self.prepared):
            compiled, rest = self.prepared[self.place]
            self.place += 1
            if self.direct:
                compiled.run(
                    programs, 1, 1, self.stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *rest
                )  # fmt: skip
            else:
                compiled[(programs, 1, 1)](*args, *rest)
            return
        compiled = kernel[(programs,)](*args, **constants)
        if hasattr(compiled, "packed_metadata"):  # the interpreter compiles nothing
            rest = tuple(constants[name] for name in kernel.arg_names[len(args) :] if name not in _OPTIONS)
            self.prepared.append((compiled, rest))
            self.place += 1
