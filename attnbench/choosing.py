"""Which implementation runs a call: found once for all that it depends on, and a constant to `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from attnbench.errors import UserError
from attnbench.params import Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attnbench.method import Method

Asked = tuple[tuple[tuple[int, ...], ...], torch.dtype, str, bool]
"""Sizes of q, k and v, their dtype and type of device, and whether a backward pass follows: all that a choice depends on"""
Chooser = Callable[[Asked], str]
"""Asked -> the name of an implementation."""
Function = TypeVar("Function", bound=Callable[..., str])


def asked_by(qkv: tuple[Tensor, Tensor, Tensor], weights: Mapping[str, Tensor] | None) -> Asked:
    """What a call with these tensors asks for."""
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (*qkv, *(weights or {}).values()))
    return tuple(tuple(index(n) for n in x.shape) for x in qkv), qkv[0].dtype, qkv[0].device.type, backward


def constant(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, which would import the compiler, and triton with it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def choice(method: Method, values: dict[str, Any], asked: Asked) -> str:
    """Name of the implementation that runs what is asked. Raises `UserError`."""
    sizes, dtype, device, backward = asked
    params, shape = method.params(**values), Shape.of(*(torch.empty(size, device="meta") for size in sizes))
    if problems := params.problems(shape):
        raise UserError(f"{method.name}: {'; '.join(problems)}")
    chosen, why = method.choose(shape, dtype, device, params, backward=backward)
    if chosen is None:
        raise UserError("; ".join(why))
    return chosen.name
