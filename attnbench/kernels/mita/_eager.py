"""The shortest way from a call to its launches, in eager mode: no dispatcher, one look-up for all arguments.

The operators of `_operator.py` are what tracing, compiling and transforms see; they also run what was never run before, which leaves a
program behind. A call like an earlier one repeats the programs. The numbers are the same: both launch the same kernels on the same sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._define import on_device
from . import _launch
from ._backward import backward_key
from ._forward import Saved, Setting, forward_key
from ._operator import mita_backward

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ._program import Program

_PLAIN = (Tensor, torch.nn.Parameter)
# where another torch lacks one of these, the operators serve
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
_Named = getattr(torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function)
_CALLS: dict[Hashable, Prepared] = {}


def plain(*tensors: Tensor) -> bool:
    """Whether nothing but autograd watches: no tracing, no mode, no transform, no tensor of another type."""
    return (
        _modes() == 0
        and _transforms() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
        and all(type(x) in _PLAIN for x in tensors)
    )


@dataclass
class Prepared:
    """A call that was run before."""

    program: Program
    setting: Setting
    gradients: dict[Hashable, Program] = field(default_factory=dict)
    """signature of the backward pass's inputs -> its program"""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output, with a graph where one is wanted."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out: Tensor = _Attention.apply(q, k, v, self)
            return out
        with _Named("attnbench::mita_forward"), on_device(q):
            return self.program.own_results((q.data_ptr(), k.data_ptr(), v.data_ptr()))[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and a buffer of what the backward pass needs."""
        with _Named("attnbench::mita_forward"), on_device(q):
            (out,), pack = self.program.packed_results((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return out, pack

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pack: Tensor) -> list[Tensor]:
        """[dq, dk, dv]. A graph of the gradients, and tensors under some mode, are for the operator."""
        if torch.is_grad_enabled() or not plain(grad, q, k, v, out, pack):
            return self._operator(grad, q, k, v, out, self.program.unpack(pack))
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        key = _launch.signature(grad, q, k, v, out, pack)
        program = self.gradients.get(key)
        if program is None:
            saved = self.program.unpack(pack)
            grads = self._operator(grad, q, k, v, out, saved)
            program = _launch.find(backward_key(grad, q, k, v, out, Saved(*saved), self.setting))
            if program is not None and pack.is_contiguous():
                self.gradients[key] = program
            return grads
        base = pack.data_ptr()
        inputs = [x.data_ptr() for x in (grad, q, k, v, out)]
        with _Named("attnbench::mita_backward"), on_device(q):
            return program.own_results([*inputs, *[base + x for x in self.program.packed]])

    def _operator(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: list[Tensor]) -> list[Tensor]:
        *setting, grid = self.setting
        return list(mita_backward(grad, q, k, v, out, saved, *setting, list(grid))[:3])


class _Attention(torch.autograd.Function):
    """Links the two passes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Prepared) -> Tensor:
        out, pack = call.forward(q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, pack)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.call.backward(grad, *ctx.saved_tensors), None


def call_key(q: Tensor, k: Tensor, v: Tensor, *options: Hashable) -> Hashable:
    """What a call depends on."""
    return _launch.signature(q, k, v), options


def prepared(key: Hashable) -> Prepared | None:
    """The call known under `key`."""
    return _CALLS.get(key)


def prepare(key: Hashable, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> None:
    """Know a call of `key` from now on, where its run left a program behind."""
    program = _launch.find(forward_key(q, k, v, None, setting))
    if program is None:
        return
    if len(_CALLS) >= _launch.MOST:
        _CALLS.clear()
    _CALLS[key] = Prepared(program, setting)


def forget() -> None:
    """Drop all calls and programs."""
    _CALLS.clear()
    _launch.forget()
