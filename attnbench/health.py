"""Routing health, read off fast weights: how evenly queries spread over experts, and which keys experts drop or hold twice.

The terms are those of mixtures of experts: an expert's load is the queries it serves; a token is pruned where no expert keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.fastweights import load, occurrences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from attnbench.fastweights import Bank, FastWeights


def health(weights: FastWeights, keys: int) -> dict[str, float]:
    """Measures of the routed banks on `keys` tokens, each where it exists: see the functions of this module."""
    routed = [bank for bank in weights.banks if bank.routes is not None]
    shares = [_shares(bank) for bank in routed if bank.experts > 1]
    held = [occurrences(bank.index, keys) for bank in routed if bank.index is not None]
    measures = {"load_entropy": load_entropy(shares), "max_load": max_load(shares), "pruned": pruned(held), "duplicates": duplicates(held)}
    return {name: value for name, value in measures.items() if value is not None}


def _shares(bank: Bank) -> Tensor:
    counts = load(bank).double()
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def load_entropy(shares: Sequence[Tensor]) -> float | None:
    """Entropy of the load over `log E`, averaged over heads and routed banks: 1 is even, 0 is one expert for all queries.

    `shares` are each expert's share of the queries served `[B, H, E]`, for each bank that routes among several. None without any.
    """
    found = [-(torch.xlogy(p, p)).sum(-1) / torch.tensor(float(p.shape[-1])).log() for p in shares]
    return float(torch.cat([x.flatten() for x in found]).mean()) if found else None


def max_load(shares: Sequence[Tensor]) -> float | None:
    """The busiest expert's share of its bank's load, of the head where it is largest: what the slowest program waits for."""
    return max((float(p.max()) for p in shares), default=None)


def pruned(held: Sequence[Tensor]) -> float | None:
    """Share of tokens that no expert of any routed bank keeps, averaged over heads.

    `held` says how often the experts of each routed bank hold each token, `[B, H, M]`. None where no routed expert holds tokens.
    """
    return float(1 - (torch.stack(tuple(held)) > 0).any(0).double().mean()) if held else None


def duplicates(held: Sequence[Tensor]) -> float | None:
    """Share of the places in routed experts whose token an expert of the same bank holds already: 0 where experts share no token."""
    places = sum(int(count.sum()) for count in held)
    return 1 - sum(int((count > 0).sum()) for count in held) / places if places else None
