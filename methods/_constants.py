"""Small tensors that depend on shapes and parameters alone: made once where they may be kept, since short calls are bound by the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")
_MOST = 16
_KNOWN: dict[Hashable, Any] = {}
# where another torch lacks it, nothing is kept
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def constant(make: Callable[[], T], device: torch.device, *key: Hashable) -> T:
    """`make()`, tensors of O(N) numbers on `device` that depend on nothing but `key`, or what it gave before. Nobody may change them.

    They are of one stream, whose order keeps them safe, and of no CUDA graph, whose memory is not theirs to keep; what traces or watches
    sees them made.
    """
    if torch.compiler.is_compiling() or _modes() != 0 or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return make()
    place = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, *key)
    if place not in _KNOWN:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        with torch.inference_mode(mode=False), torch.no_grad():
            _KNOWN[place] = make()
    found: T = _KNOWN[place]
    return found
