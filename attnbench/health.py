"""Routing health, read off fast weights: how evenly queries spread over experts, and which keys experts drop or hold twice.

The terms are those of mixtures of experts: an expert's load is the queries it serves; a token is pruned where no expert keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.fastweights import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from attnbench.fastweights import Bank, FastWeights


def health(weights: FastWeights, keys: int) -> dict[str, float]:
    """Measures of the routed banks on `keys` tokens, each where it exists: see the functions of this module."""
    measures: dict[str, Callable[[], float | None]] = {
        "load_entropy": lambda: load_entropy(weights),
        "max_load": lambda: max_load(weights),
        "pruned": lambda: pruned(weights, keys),
        "duplicates": lambda: duplicates(weights, keys),
    }
    return {name: value for name, measure in measures.items() if (value := measure()) is not None}


def _shares(weights: FastWeights) -> Iterator[Tensor]:
    """Each expert's share of the queries served `[B, H, E]`, for each bank that routes among several experts."""
    for bank in weights.banks:
        if bank.routes is not None and bank.experts > 1:
            counts = load(bank).double()
            yield counts / counts.sum(-1, keepdim=True).clamp(min=1)


def load_entropy(weights: FastWeights) -> float | None:
    """Entropy of the load over `log E`, averaged over heads and routed banks: 1 is even, 0 is one expert for all queries.

    None where nothing is routed among several experts.
    """
    found = [-(torch.xlogy(p, p)).sum(-1) / torch.tensor(float(p.shape[-1])).log() for p in _shares(weights)]
    return float(torch.cat([x.flatten() for x in found]).mean()) if found else None


def max_load(weights: FastWeights) -> float | None:
    """The busiest expert's share of its bank's load, of the head where it is largest: what the slowest program waits for."""
    found = [float(p.max()) for p in _shares(weights)]
    return max(found) if found else None


def pruned(weights: FastWeights, keys: int) -> float | None:
    """Share of tokens that no expert of any routed bank keeps, averaged over heads; None where no routed expert holds tokens."""
    held = [_holders(bank, keys) > 0 for bank in _aligned(weights)]
    return float(1 - torch.stack(held).any(0).double().mean()) if held else None


def duplicates(weights: FastWeights, keys: int) -> float | None:
    """Share of the places in routed experts whose token an expert of the same bank holds already: 0 where experts share no token."""
    counts = [_holders(bank, keys) for bank in _aligned(weights)]
    places = sum(int(c.sum()) for c in counts)
    return 1 - sum(int((c > 0).sum()) for c in counts) / places if places else None


def _aligned(weights: FastWeights) -> Iterator[Bank]:
    """Routed banks whose hidden units are tokens."""
    return (bank for bank in weights.banks if bank.routes is not None and bank.index is not None)


def _holders(bank: Bank, keys: int) -> Tensor:
    """How often experts hold each token, `[B, H, M]`."""
    assert bank.index is not None
    tokens = bank.index.flatten(2)
    counts = torch.zeros(*tokens.shape[:2], keys + 1, dtype=torch.long, device=tokens.device)
    counts.scatter_add_(2, tokens.masked_fill(tokens < 0, keys), torch.ones_like(tokens, dtype=torch.long))
    return counts[..., :-1]
