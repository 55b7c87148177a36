"""Learned parameters of a method: drawn as its paper draws them, handed in, or owned by a module.

A method that has any exports `weights(shape, params, generator) -> {name: tensor}`, in float64 on the CPU, whose names its reference,
fast weights and implementations then read. Benchmarks run them as initialised, from a fixed seed; a module trains them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbench.params import Params, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attnbench.method import Method

Weights = dict[str, Tensor]
"""Learned parameters by name."""

SEED = 0
"""Seed of the weights that benchmarks and references use when none are given."""


def initial(
    draw: Callable[[Shape, Any, torch.Generator], Weights], shape: Shape, params: Params, like: Tensor, seed: int = SEED
) -> Weights:
    """Freshly drawn weights in the dtype and on the device of `like`; the same values for the same seed everywhere."""
    drawn = draw(shape, params, torch.Generator().manual_seed(seed))
    return {name: x.to(like) for name, x in drawn.items()}


def given(
    weights: Mapping[str, Tensor] | None,
    draw: Callable[[Shape, Any, torch.Generator], Weights],
    qkv: tuple[Tensor, Tensor, Tensor],
    params: Params,
) -> Mapping[str, Tensor]:
    """`weights` where given, else the initial ones: the first line of a reference that has learned parameters."""
    return initial(draw, Shape.of(*qkv), params, qkv[0]) if weights is None else weights


class AttentionModule(nn.Module):
    """A method with its parameters, as a module."""

    def __init__(self, method: Method, params: Params) -> None:
        super().__init__()
        self.method, self.params = method, params
        self._choose = method.chooser(params)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q, k, v: [B, H, N, D]` -> `[B, H, N, Dv]`."""
        return self.method.chosen(self._choose, (q, k, v), self.params)

    def __getstate__(self) -> dict[str, Any]:
        """All but the function that chooses, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_choose"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was left out is made anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._choose = self.method.chooser(self.params)


class LearnedAttention(AttentionModule):
    """A method that owns its learned parameters, drawn from torch's global generator; `weights` holds them by name."""

    def __init__(self, method: Method, shape: Shape, params: Params) -> None:
        super().__init__(method, params)
        assert method.weights is not None
        seed = int(torch.randint(2**31, ()).item())
        drawn = initial(method.weights, shape, params, torch.empty(0), seed)
        self.weights = nn.ParameterDict({name: nn.Parameter(x) for name, x in drawn.items()})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q, k, v: [B, H, N, D]` -> `[B, H, N, Dv]`; weights are cast to the dtype of q."""
        weights = {name: x.to(q.dtype) for name, x in self.weights.items()}
        return self.method.chosen(self._choose, (q, k, v), self.params, weights)
