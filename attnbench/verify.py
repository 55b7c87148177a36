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

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnbench.errors import UserError, raised
from attnbench.observation import LENGTHS, Observation, folded, gathers, observe, segmented, selects, together
from attnbench.taxonomy import DIMENSIONS, Construction, Count, Expert, Scaling, Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from enum import StrEnum

    from attnbench.fastweights import Bank
    from attnbench.method import Method

UNDECLARED = "neither experts nor no_experts: give experts(q, k, v, params), or say in no_experts why there are none"
"""What a method lacks that can be measured by nothing and says no reason."""

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
    broken: bool = False
    """whether it cannot be measured through a fault of the method: nothing is given that could be, or it raises"""

    def as_dict(self) -> dict[str, str]:
        """Printed form."""
        verdict = "conflict" if self.conflict else "failed" if self.broken else "agrees" if self.measured else "not measurable"
        own = {"method": self.method, "dimension": self.dimension, "declared": self.declared}
        return {**own, "measured": " or ".join(self.measured), "verdict": verdict, "why": self.why}


def verify(method: Method) -> list[Row]:
    """One row a dimension. A conflict is a declared value that some observation rules out."""
    if method.experts is None:
        why = f"no fast weights: {method.no_experts}" if method.no_experts else UNDECLARED
        return [_row(method, name, [], why, broken=not method.no_experts) for name in DIMENSIONS]
    try:
        seen = observe(method)
        return [_row(method, name, *measure(seen)) for name, measure in MEASURES.items()]
    except UserError as error:
        return [_row(method, name, [], str(error)) for name in DIMENSIONS]
    except Exception as error:  # a plugin's experts may raise anything, or hold no weights
        return [_row(method, name, [], raised(error), broken=True) for name in DIMENSIONS]


def _row(method: Method, dimension: str, found: Sequence[Found], why: str, *, broken: bool = False) -> Row:
    declared = getattr(method.coordinates, dimension)
    values = tuple(dict.fromkeys(str(value) for one in found for value in one))
    return Row(method.name, dimension, str(declared), values, why, any(one and declared not in one for one in found), broken)


Measured = tuple[list[Found], str]


def scaling(seen: Sequence[Observation]) -> Measured:
    """Routing, compression, both or none."""
    found: list[Found] = []
    for one in seen:
        banks = one.weights.banks
        routes = any(not (folded(bank) and segmented(bank, one.n)) for bank in map(banks.__getitem__, one.routed))
        routes = routes or any(gathers(bank, one.n) for bank in banks)
        folds = any(folded(bank) for bank in banks)
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
    if not found:
        why = f"{why}, neither constant nor in proportion to N" if why else "banks are routed at one length and shared at the other"
    return ([found] if found else []), why


def _growth(first: int, last: int) -> Count | None:
    if (first, last) == LENGTHS:
        return Count.TOKENS
    if first == last:
        return Count.SHARED if first == 1 else Count.LANDMARKS
    return Count.BLOCKS if first * LENGTHS[1] == last * LENGTHS[0] else None


def topology(seen: Sequence[Observation]) -> Measured:
    """Which queries share which experts."""
    if not any(one.routed for one in seen):
        gathered = [any(gathers(bank, one.n) for bank in one.weights.banks) for one in seen]
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
    joint = together(bank, n)
    if Count.LANDMARKS in counted and bank.experts != n:
        return Topology.BLOCK_TO_ONE if segmented(bank, n) else Topology.N_TO_M
    return Topology.BLOCKS_TO_BLOCKS if joint else Topology.N_TO_BLOCKS


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
        return (Construction.LOCAL_KERNELIZATION if selects(bank) else Construction.KERNELIZATION,)
    if bank.sampled:
        return (Construction.OFFSET_PREDICTING,)
    if bank.compressed:
        return (_mixing(bank, moved),)
    assert bank.index is not None
    if all(other.index is not None and torch.equal(bank.index, other.index) for other in moved):
        return (Construction.LOCALITY_PRIOR,) if selects(bank) or gathers(bank, one.n) else (Construction.IDENTITY,)
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
