"""The contract of one method: what a file in `methods/` or a plugin exports as `METHOD`.

Tensors are `q: [B, H, N, D]`, `k: [B, Hkv, M, D]`, `v: [B, Hkv, M, Dv]`, as in torch's scaled_dot_product_attention; `Hkv`
divides `H`. A method is a definition (`reference`, eager, readable, any float dtype), a fast-weight reading (`experts`), a cost
model, limits, and any number of implementations that are imported only when they are run. Where a method has learned parameters
(`weights`), all of these take them as the keyword `weights`, a mapping from name to tensor.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbench.choosing import Asked, Chooser, asked_by, choice, constant
from attnbench.cost import Cost
from attnbench.errors import UserError, unknown
from attnbench.implementation import EAGER, Implementation, Limits, resolve
from attnbench.learned import AttentionModule, LearnedAttention, Weights, given, initial
from attnbench.params import Params, Shape, param

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from torch import nn

    from attnbench.fastweights import FastWeights
    from attnbench.taxonomy import Coordinates, Family

__all__ = [
    "EAGER",
    "AttentionModule",
    "Citation",
    "Cost",
    "Implementation",
    "Limits",
    "Method",
    "Params",
    "Shape",
    "Weights",
    "given",
    "param",
    "resolve",
]


@dataclass(frozen=True)
class Citation:
    """Where a method comes from."""

    authors: str
    """`Surname` or `Surname et al.`"""
    year: int
    title: str
    url: str
    venue: str = ""

    @property
    def short(self) -> str:
        """`Surname et al. 2021`"""
        return f"{self.authors} {self.year}"


@dataclass(frozen=True)
class Method:
    """One attention method. `method(q, k, v, **params)` runs it."""

    name: str
    """the file's name"""
    title: str
    """as a figure prints it"""
    coordinates: Coordinates
    citation: Citation
    params: type[Params]
    reference: Callable[..., Tensor]
    """`(q, k, v, params, rows=None) -> [B, H, N, Dv]`: the definition. `rows` (1-D positions) asks for those queries alone;
    a reference without that argument can be gated only at lengths where the whole of it fits, which excludes a method whose weights or
    grid depend on N. With learned parameters it takes `weights=None` too, and `given` fills them in."""
    cost: Callable[[Shape, Any], Cost]
    experts: Callable[[Tensor, Tensor, Tensor, Any], FastWeights] | None = None
    """`(q, k, v, params) -> FastWeights`, where the method can be written so"""
    no_experts: str = ""
    """why it cannot"""
    limits: Limits = field(default_factory=Limits)
    """limits of the definition itself"""
    implementations: tuple[Implementation, ...] = ()
    """best first"""
    weights: Callable[[Shape, Any, torch.Generator], Weights] | None = None
    """`(shape, params, generator) -> {name: tensor}`: learned parameters as the paper initialises them, float64 on the CPU,
    independent of the batch size; None where there are none"""
    budget: Callable[[Shape, Any, int], dict[str, object]] | None = None
    """`(shape, params, units) -> {parameter: value}`: what to change for a query to read that many hidden units, or the nearest number
    there is; other parameters stand as `params` has them. None where the width is fixed by the shape, or `no_budget` says why."""
    no_budget: str = ""
    """why no budget sets how many units a query reads, although parameters change it"""
    builder: Callable[..., nn.Module] | None = None
    """`(shape, params) -> nn.Module` with forward `(q, k, v)`, where that module is more than the operator and its `weights`. Layers call
    it outside autocast, so that it casts weights of its own to the dtype of its input."""
    exact: bool = False
    """whether it computes softmax attention itself"""
    selective: bool = False
    """whether it selects keys or experts by comparing scores, so that rounding may flip a near tie"""
    couples_heads: bool = False
    """whether one head's output depends on other heads"""
    surrogate: str = ""
    """why gradients of the definition are not the slopes of its values, as where a maximum is taken for a constant; empty where they are"""
    library: bool = False
    """whether the method is a library's kernel: then its reference only defines it, and runs only when pinned"""
    pinned: str = ""
    """the implementation that `get("name@impl")` asked for"""

    @property
    def family(self) -> Family:
        """Coarse place in the taxonomy."""
        return self.coordinates.family

    @property
    def label(self) -> str:
        """`name`, or `name@impl` when an implementation is pinned."""
        return f"{self.name}@{self.pinned}" if self.pinned else self.name

    @cached_property
    def takes_rows(self) -> bool:
        """Whether the reference can return some queries alone."""
        return "rows" in inspect.signature(self.reference).parameters

    @cached_property
    def eager(self) -> Implementation:
        """The reference as an implementation."""
        return Implementation(EAGER, f"{self.reference.__module__}:{self.reference.__name__}", self.limits)

    def implementation(self, name: str) -> Implementation:
        """The implementation called `name`. Raises `UserError` naming those there are."""
        if name == EAGER:
            return self.eager
        for item in self.implementations:
            if item.name == name:
                return item
        raise unknown("implementation", name, [EAGER, *(i.name for i in self.implementations)], self.name)

    def function(self, implementation: Implementation) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        """The function of an implementation, in its own layout. Raises `ImportError`."""
        return self.reference if implementation.name == EAGER else implementation.load()

    def all_implementations(self) -> list[Implementation]:
        """Every implementation, best first, the eager reference last."""
        return [*self.implementations, self.implementation(EAGER)]

    def reasons(
        self,
        implementation: Implementation,
        shape: Shape,
        dtype: torch.dtype,
        device: str,
        params: Params,
        *,
        backward: bool = False,
        graph: bool = False,
    ) -> list[str]:
        """Why this implementation cannot run such a call here, importability included; empty when it can."""
        found = self.limits.reasons(shape, dtype, device, params, backward=backward, graph=graph)
        if implementation.name == EAGER:
            return found
        missing = implementation.missing()
        own = implementation.limits.reasons(shape, dtype, device, params, backward=backward, graph=graph)
        return list(dict.fromkeys([*found, *own, *([missing] if missing else [])]))

    def choose(
        self, shape: Shape, dtype: torch.dtype, device: str, params: Params, *, backward: bool = False, graph: bool = False
    ) -> tuple[Implementation | None, list[str]]:
        """The pinned implementation, else the best supported, and why not where there is none.

        Raises `UserError` where a better one would run this call but is broken: nothing else runs in its place without a word.
        """
        candidates = self.implementations if self.library else self.all_implementations()
        options = [self.implementation(self.pinned)] if self.pinned else candidates
        why: list[str] = []
        for option in options:
            found = self.reasons(option, shape, dtype, device, params, backward=backward, graph=graph)
            if backward and option.backward_reasons and not self.pinned:
                found = found + option.backward_reasons(shape)
            if not found:
                return option, []
            if option.name != EAGER and found == [option.broken()]:
                advice = "mend it, or name the package that it lacks in its `requires`"
                raise UserError(f"{self.name}@{option.name} cannot be imported: {found[0]}: {advice}")
            why += [f"{self.name}@{option.name}: {reason}" for reason in found]
        return None, why

    def initial(self, shape: Shape, params: Params, like: Tensor, seed: int = 0) -> Weights:
        """Learned parameters as initialised, in the dtype and on the device of `like`; empty where there are none."""
        return initial(self.weights, shape, params, like, seed) if self.weights else {}

    def run(
        self,
        implementation: Implementation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        params: Params,
        *,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Call an implementation with `[B, H, N, D]` tensors, converting layouts on the way; without `weights`, with initial ones."""
        function: Callable[..., Tensor] = self.function(implementation)
        if self.weights:
            function = partial(function, weights=given(weights, self.weights, (q, k, v), params))
        if implementation.layout == "bhnd":
            return function(q, k, v, params)
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), params).transpose(1, 2)

    def parse(self, values: Mapping[str, object]) -> Params:
        """Parameters of this method from named values. Raises `UserError`."""
        return self.params.parse(values, self.name)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, weights: Mapping[str, Tensor] | None = None, **params: object) -> Tensor:
        """Run the method on `[B, H, N, D]` tensors; learned parameters not given are as initialised.

        Raises `UserError` for parameters or shapes that make no sense or that nothing here supports.
        """
        return self.dispatch(q, k, v, self.parse(params), weights)

    def dispatch(self, q: Tensor, k: Tensor, v: Tensor, params: Params, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the method with parsed parameters, by the implementation that is best for such tensors."""
        asked = asked_by((q, k, v), weights)
        if torch.compiler.is_compiling():  # chosen while it is traced
            name = choice(self, params.as_dict(), asked)
        else:
            name = self._choices.get((params, asked)) or choice(self, params.as_dict(), asked)
            self._choices[params, asked] = name
        return self.run(self.implementation(name), q, k, v, params, weights=weights)

    @cached_property
    def _choices(self) -> dict[Hashable, str]:
        """Implementations that earlier calls ran, by all that the choice depends on."""
        return {}

    def chooser(self, params: Params) -> Chooser:
        """What names the implementation for a call, with parameters that stay: it remembers, and every torch can compile it."""
        known: dict[Asked, str] = {}
        assert self.eager  # made now, since not every torch can trace how

        def choose(asked: Asked) -> str:
            return known.setdefault(asked, known.get(asked) or choice(self, params.as_dict(), asked))

        return constant(choose)

    def chosen(self, choose: Chooser, qkv: tuple[Tensor, Tensor, Tensor], params: Params, weights: Weights | None = None) -> Tensor:
        """Run the implementation that `choose`, the `chooser` of these parameters, names."""
        return self.run(self.implementation(choose(asked_by(qkv, weights))), *qkv, params, weights=weights)

    def build(self, shape: Shape, **params: object) -> nn.Module:
        """A module with forward `(q, k, v) -> [B, H, N, Dv]` that owns the method's learned parameters, if it has any."""
        p = self.parse(params)
        if self.builder:
            return self.builder(shape, p)
        return LearnedAttention(self, shape, p) if self.weights else AttentionModule(self, p)
