"""Declared coordinates against measured ones: what the fast weights of a method show at small sizes.

`method.experts` is called at two lengths and for two inputs each. What follows from the banks:

- scaling: routing where queries leave experts or tokens out, compression where units are no tokens or enter linearly (a compressed
  expert for each segment of the sequence is compression alone: nothing is chosen);
- expert: a linear layer where hidden units enter linearly;
- count: the number E of routed experts, at both lengths; one shared where nothing is routed;
- construction: what the experts' tokens and weights depend on (position, q, k, v), as far as that tells;
- topology: which queries share which experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from attnbench.errors import UserError
from attnbench.inputs import draw
from attnbench.method import Shape
from attnbench.taxonomy import DIMENSIONS, Construction, Count, Expert, Scaling, Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from enum import StrEnum

    from torch import Tensor

    from attnbench.fastweights import Bank, FastWeights
    from attnbench.inputs import Inputs
    from attnbench.method import Method, Params

LENGTHS = (144, 576)
"""Both squares, and multiples of `SIZE`."""
SIZE = 9
"""Landmarks, tokens of a block, keys selected, width of a window: small against both lengths."""
SEEDS = (0, 1)

Found = tuple["StrEnum", ...]
"""The values that an observation allows."""


@dataclass(frozen=True)
class Row:
    """One dimension of one method."""

    method: str
    dimension: str
    declared: str
    measured: tuple[str, ...]
    """every value that fits what was seen; empty where the dimension cannot be measured"""
    why: str
    """why it cannot, or what was seen"""
    conflict: bool

    def as_dict(self) -> dict[str, str]:
        """Printed form."""
        verdict = "conflict" if self.conflict else "agrees" if self.measured else "not measurable"
        own = {"method": self.method, "dimension": self.dimension, "declared": self.declared}
        return {**own, "measured": " or ".join(self.measured), "verdict": verdict, "why": self.why}


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
        return [i for i, bank in enumerate(self.weights.banks) if _selects(bank)]

    def changed(self, position: int) -> FastWeights:
        """The fast weights after q, k or v (0, 1, 2) alone was drawn anew."""
        fresh = draw("randn", Shape.of(*self.inputs), SEEDS[-1] + 1, self.inputs[0].dtype, "cpu")
        q, k, v = (new if i == position else old for i, (new, old) in enumerate(zip(fresh, self.inputs, strict=True)))
        return Observation.of(self.method, self.params, (q, k, v)).weights


def verify(method: Method) -> list[Row]:
    """One row a dimension. A conflict is a declared value that some observation rules out."""
    if method.experts is None:
        return [_row(method, name, [], f"no fast weights: {method.no_experts}") for name in DIMENSIONS]
    try:
        seen = observe(method)
    except UserError as error:
        return [_row(method, name, [], str(error)) for name in DIMENSIONS]
    return [_row(method, name, *measure(seen)) for name, measure in MEASURES.items()]


def _row(method: Method, dimension: str, found: Sequence[Found], why: str) -> Row:
    declared = getattr(method.coordinates, dimension)
    values = tuple(dict.fromkeys(str(value) for one in found for value in one))
    return Row(method.name, dimension, str(declared), values, why, any(one and declared not in one for one in found))


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


def _selects(bank: Bank) -> bool:
    if bank.routes is None:
        return False
    used = torch.zeros(*bank.routes.shape[:3], bank.experts + 1, dtype=torch.bool)
    used.scatter_(-1, bank.routes.masked_fill(bank.routes < 0, bank.experts), True)
    return not bool(used[..., :-1].all())


def _gathers(bank: Bank, n: int) -> bool:
    """Whether a shared bank reads tokens, or between them, and leaves tokens out."""
    if bank.sampled:
        return not _selects(bank)
    return bank.index is not None and not _selects(bank) and bool((_distinct(bank) < n).any())


def _distinct(bank: Bank) -> Tensor:
    """How many different tokens the experts of a bank hold together, by batch and head."""
    assert bank.index is not None
    flat = bank.index.flatten(2)
    return torch.tensor([[len(set(head.tolist()) - {-1}) for head in item] for item in flat])


Measured = tuple[list[Found], str]


def scaling(seen: Sequence[Observation]) -> Measured:
    """Routing, compression, both or none."""
    found: list[Found] = []
    for one in seen:
        banks = one.weights.banks
        routes = any(not (_folded(bank) and _segmented(bank, one.n)) for bank in map(banks.__getitem__, one.routed))
        routes = routes or any(_gathers(bank, one.n) for bank in banks)
        folds = any(_folded(bank) for bank in banks)
        if routes:
            found.append((Scaling.BOTH if folds else Scaling.ROUTING,))
        else:
            found.append((Scaling.COMPRESSION if folds else Scaling.NONE,))
    return found, f"{len(seen[0].routed)} of {len(seen[0].weights.banks)} banks routed"


def expert(seen: Sequence[Observation]) -> Measured:
    """Linear layer or MLP."""
    linear = [any(bank.activation == "linear" for bank in one.weights.banks) for one in seen]
    return [(Expert.LINEAR if each else Expert.MLP,) for each in linear], "activation of the hidden units"


def count(seen: Sequence[Observation]) -> Measured:
    """How the number of routed experts grows with N; a method with several routed banks may be counted by any of them."""
    if not any(one.routed for one in seen):
        return [(Count.SHARED,)], "nothing is routed"
    first, last = seen[0], seen[-1]
    pairs = [(first.weights.banks[i].experts, last.weights.banks[i].experts) for i in first.routed if i in last.routed]
    found = tuple(dict.fromkeys(value for pair in pairs if (value := _growth(*pair))))
    why = "; ".join(f"E = {a} at N = {first.n}, {b} at N = {last.n}" for a, b in pairs)
    return ([found] if found else []), why or "banks are routed at one length and shared at the other"


def _growth(first: int, last: int) -> Count | None:
    if (first, last) == LENGTHS:
        return Count.TOKENS
    if first == last:
        return Count.SHARED if first == 1 else Count.LANDMARKS
    return Count.BLOCKS if first * LENGTHS[1] == last * LENGTHS[0] else None


def topology(seen: Sequence[Observation]) -> Measured:
    """Which queries share which experts."""
    if not any(one.routed for one in seen):
        gathered = [any(_gathers(bank, one.n) for bank in one.weights.banks) for one in seen]
        return [(Topology.N_TO_ONE if each else Topology.ALL_TO_ONE,) for each in gathered], "nothing is routed"
    kinds, why = count(seen)
    counted = {value for one in kinds for value in one}
    found: list[Found] = []
    for one in seen:
        banks = [one.weights.banks[i] for i in one.routed]
        found.append(tuple(dict.fromkeys(_topology(bank, one.n, counted) for bank in banks)))
    return found, why


def _topology(bank: Bank, n: int, counted: set[StrEnum]) -> Topology:
    assert bank.routes is not None
    chosen = bank.routes.sort(-1).values
    if bank.experts == n and chosen.shape[-1] == 1:
        own = bool((chosen[..., 0].sort(-1).values == torch.arange(n)).all())
        return Topology.ONE_TO_ONE if own else Topology.N_TO_M
    together = _together(bank, n)
    if Count.LANDMARKS in counted and bank.experts != n:
        return Topology.BLOCK_TO_ONE if _segmented(bank, n) else Topology.N_TO_M
    return Topology.BLOCKS_TO_BLOCKS if together else Topology.N_TO_BLOCKS


def _together(bank: Bank, n: int) -> bool:
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


def _segmented(bank: Bank, n: int) -> bool:
    """Whether each run of N / E queries has one expert: the sequence is cut up, and nothing is chosen."""
    return bank.per_query == 1 and bank.experts != n and _together(bank, n)


def _folded(bank: Bank) -> bool:
    return (bank.compressed and not bank.sampled) or bank.activation == "linear"


def construction(seen: Sequence[Observation]) -> Measured:
    """Where the weights come from: routed banks speak first, then the shared ones."""
    found: list[Found] = []
    for one in seen:
        picked = one.routed or range(len(one.weights.banks))
        moved = [one.changed(position).banks for position in range(3)]
        values = dict.fromkeys(value for i in picked for value in _construction(one, i, [banks[i] for banks in moved]))
        found.append(tuple(values))
    return found, "what tokens and weights depend on"


def _construction(one: Observation, i: int, moved: Sequence[Bank]) -> Found:
    """The constructions that bank `i` allows; `moved` is the bank after q, k, v was changed."""
    bank = one.weights.banks[i]
    if bank.activation == "linear":
        return (Construction.LOCAL_KERNELIZATION if _selects(bank) else Construction.KERNELIZATION,)
    if bank.sampled:
        return (Construction.OFFSET_PREDICTING,)
    if bank.compressed:
        return (_mixing(bank, moved),)
    assert bank.index is not None
    if all(other.index is not None and torch.equal(bank.index, other.index) for other in moved):
        return (Construction.LOCALITY_PRIOR,) if _selects(bank) or _gathers(bank, one.n) else (Construction.IDENTITY,)
    if bank.experts != one.n:
        return (Construction.LANDMARK_PROBING, Construction.OFFSET_PREDICTING)
    return (Construction.EXACT_SKIM,) if _holds_best(one, bank) else (Construction.SKIM, Construction.OFFSET_PREDICTING)


def _mixing(bank: Bank, moved: Sequence[Bank]) -> Construction:
    """Learned projections mix values by position alone; landmarks mix them by what queries and keys say."""
    assert bank.w2 is not None
    q, k, _ = (other.w2 for other in moved)
    fixed = q is not None and k is not None and torch.equal(bank.w2, q) and torch.equal(bank.w2, k)
    return Construction.LEARNABLE_PROJECTION if fixed else Construction.LANDMARK_PROBING


def _holds_best(one: Observation, bank: Bank) -> bool:
    """Whether expert i holds the keys with the largest scores of query i."""
    q, k, _ = one.inputs
    assert bank.index is not None
    best = (q @ k.transpose(-1, -2)).topk(bank.width, -1).indices
    return torch.equal(bank.index.sort(-1).values, best.sort(-1).values)


MEASURES: dict[str, Callable[[Sequence[Observation]], Measured]] = {
    "scaling": scaling,
    "expert": expert,
    "count": count,
    "construction": construction,
    "topology": topology,
}
"""Dimension -> how it is measured."""
