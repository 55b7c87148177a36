"""What tests of Triton kernels share: the device they run on, and Triton's interpreter made to run them where there is no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On the CPU kernels run in the interpreter; conftest.py asks for it before anything imports Triton."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter multiplies bfloat16 bit patterns, and turns no 1-element array into an index under NumPy 2.4."""
    if DEVICE == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as module

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return module.TensorHandle(module._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    dot, patch = module.InterpreterBuilder.create_dot, module._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(module, "_patch_lang_tensor", patched)
    monkeypatch.setattr(module.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))


def replayed(step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a step on the GPU gives when called, and when replayed from a CUDA graph; fails where it synchronises with the host."""
    want = tuple(x.detach() for x in step())  # a graph kept alive would tie a captured backward pass to the stream of this one
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    return want, got
