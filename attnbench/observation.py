"""The fast weights of a method at small sizes, and what can be seen in one bank of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from attnbench.errors import UserError
from attnbench.inputs import draw
from attnbench.method import Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from attnbench.fastweights import Bank, FastWeights
    from attnbench.inputs import Inputs
    from attnbench.method import Method, Params

LENGTHS = (144, 576)
"""Both squares, and multiples of `SIZE`."""
SIZE = 9
"""Landmarks, tokens of a block, keys selected, width of a window: small against both lengths."""
SEEDS = (0, 1)


@dataclass(frozen=True)
class Observation:
    """The fast weights of one method on one input."""

    method: Method
    params: Params
    inputs: Inputs
    weights: FastWeights

    @classmethod
    def of(cls, method: Method, params: Params, inputs: Inputs) -> Observation:
        """Ask the method for its fast weights."""
        assert method.experts is not None
        return cls(method, params, inputs, method.experts(*inputs, params))

    @property
    def n(self) -> int:
        """Queries, and keys."""
        return self.inputs[0].shape[2]

    @property
    def routed(self) -> list[int]:
        """Banks of which at least one query leaves an expert out."""
        return [i for i, bank in enumerate(self.weights.banks) if selects(bank)]

    def changed(self, position: int) -> FastWeights:
        """The fast weights after q, k or v (0, 1, 2) alone was drawn anew."""
        fresh = draw("randn", Shape.of(*self.inputs), SEEDS[-1] + 1, self.inputs[0].dtype, "cpu")
        q, k, v = (new if i == position else old for i, (new, old) in enumerate(zip(fresh, self.inputs, strict=True)))
        return Observation.of(self.method, self.params, (q, k, v)).weights


def observe(method: Method) -> list[Observation]:
    """The method's fast weights at every length and seed. Raises `UserError` where its parameters fit no small size."""
    shapes = [Shape(1, 2, n, 8) for n in LENGTHS]
    params = _small(method, shapes)
    return [Observation.of(method, params, draw("randn", shape, seed, torch.float64, "cpu")) for shape in shapes for seed in SEEDS]


def _small(method: Method, shapes: Sequence[Shape]) -> Params:
    """Defaults with sizes reduced to `SIZE`, else defaults as they are: the same at both lengths, or counts could not be told apart."""
    usual = method.params()
    large: dict[str, Any] = {f.name: SIZE for f in fields(usual) if type(f.default) is int and f.default > SIZE}
    for params in (replace(usual, **large), usual):
        if not any(params.problems(shape) for shape in shapes):
            return params
    raise UserError(f"parameters fit neither N = {' nor N = '.join(map(str, LENGTHS))}: {'; '.join(usual.problems(shapes[0]))}")


def selects(bank: Bank) -> bool:
    """Whether some query leaves an expert out."""
    if bank.routes is None:
        return False
    used = torch.zeros(*bank.routes.shape[:3], bank.experts + 1, dtype=torch.bool)
    used.scatter_(-1, bank.routes.masked_fill(bank.routes < 0, bank.experts), True)
    return not bool(used[..., :-1].all())


def gathers(bank: Bank, n: int) -> bool:
    """Whether a shared bank reads tokens, or between them, and leaves tokens out."""
    if bank.sampled:
        return not selects(bank)
    return bank.index is not None and not selects(bank) and bool((_distinct(bank) < n).any())


def _distinct(bank: Bank) -> Tensor:
    """How many different tokens the experts of a bank hold together, by batch and head."""
    assert bank.index is not None
    flat = bank.index.flatten(2)
    return torch.tensor([[len(set(head.tolist()) - {-1}) for head in item] for item in flat])


def together(bank: Bank, n: int) -> bool:
    """Whether queries whose tokens share an expert, or else the queries of a run of N / E, choose the same experts."""
    assert bank.routes is not None
    chosen, owner = bank.routes.sort(-1).values, _owners(bank, n)
    return all(bool((chosen[:, :, owner == e] == chosen[:, :, owner == e][:, :, :1]).all()) for e in owner.unique())


def _owners(bank: Bank, n: int) -> Tensor:
    """The expert `[N]` of each token, the same for all heads, where experts cut the tokens up; else runs of N / E.

    Compressed experts hold no tokens: they cut them up where all heads send N / E queries to each, such as the tiles of an image.
    """
    assert bank.routes is not None
    place, routes = torch.arange(n), bank.routes
    if bank.index is None and routes.shape[-1] == 1 and bool((routes == routes[:1, :1]).all()):
        owner = routes[0, 0, :, 0]
        if bool((owner >= 0).all()) and bool((owner.bincount(minlength=bank.experts) * bank.experts == n).all()):
            return owner
    if bank.index is not None and bool((bank.index == bank.index[:1, :1]).all()):
        experts, units = torch.where(bank.index[0, 0] >= 0)
        tokens = bank.index[0, 0][experts, units]
        if torch.equal(tokens.sort().values, place):
            return experts[tokens.argsort()]
    return place // -(-n // bank.experts)


def segmented(bank: Bank, n: int) -> bool:
    """Whether each run of N / E queries has one expert: the sequence is cut up, and nothing is chosen."""
    return bank.per_query == 1 and bank.experts != n and together(bank, n)


def folded(bank: Bank) -> bool:
    """Whether hidden units are mixtures of tokens, or enter linearly, which is a sum over tokens."""
    return (bank.compressed and not bank.sampled) or bank.activation == "linear"
