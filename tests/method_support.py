"""What tests of methods measure: closeness in float64, and what a backward pass keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def saved_bytes(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps of a call between its forward and its backward pass, which is run too; storages count once."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.requires_grad_() for x in tensors]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call(*leaves)
    total = sum(sizes.values())
    out.sum().backward()
    return total
