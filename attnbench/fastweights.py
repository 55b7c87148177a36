"""The paper's view as code: attention as banks of fast-weight experts and routes to them.

An expert is a two-layer network: keys are its first layer `w1: [W, D]`, values its second `w2: [W, Dv]`, `W` hidden units wide
(arXiv 2602.01219). A `Bank` holds `E` experts for each batch and head; routes say which `S` of them a query uses, and are absent
where all queries share all experts of the bank. `apply` evaluates any such object: the generic oracle of every method that can be
written so. From the same object follow the coordinates that can be measured and the health of the routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from attnbench.eager import positions, take, wide

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Activation = Literal["softmax", "linear"]
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Bank:
    """E experts of W hidden units for each of B x H heads.

    Either `w1` and `w2` hold the weights (compressed rows, which are no token's), or `index` says which token each hidden unit
    is, and the weights are gathered from `keys` and `values` when needed. Raises `ValueError` where neither is whole.
    """

    keys: Tensor | None = None
    """`[B, H, M, D]`, the tokens that `index` points into"""
    values: Tensor | None = None
    """`[B, H, M, Dv]`"""
    index: Tensor | None = None
    """`[B, H, E, W]` token of each hidden unit, in any integer type; -1 pads a narrower expert"""
    w1: Tensor | None = None
    """`[B, H, E, W, D]` first-layer weights of compressed experts"""
    w2: Tensor | None = None
    """`[B, H, E, W, Dv]` second-layer weights of compressed experts"""
    routes: Tensor | None = None
    """`[B, H, N, S]` experts that each query uses; -1 uses none; None: every query uses all E"""
    scale: float = 1.0
    """factor of the first layer's output"""
    activation: Activation = "softmax"
    """`linear`: hidden units enter as they are; how they are normalised, `combine` says"""
    query_map: Callable[[Tensor, Tensor], Tensor] | None = None
    """`(q [B, H, R, D], rows [R]) -> [B, H, R, D']`: feature map of the queries before the first layer"""
    bias: Tensor | None = None
    """`[B or 1, H or 1, N, E W]` added to the first layer's output, for banks that all queries share"""
    factor: Callable[[Tensor, Tensor], Tensor] | None = None
    """`(q [B, H, R, D], first-layer weights [B, H, R or 1, U, D]) -> [B, H, R, U]`, times the normalised hidden units: a gated layer"""
    causal: bool = False
    """a query uses only hidden units whose token is at or before its own position (needs `index` or `last`)"""
    last: Tensor | None = None
    """`[B, H, E, W]` the latest token in each compressed unit, for `causal`"""
    sampled: bool = False
    """compressed rows are values read between neighbouring tokens: gathered, not folded"""

    def __post_init__(self) -> None:
        for x in (self.w1, self.w2) if self.index is None else (self.keys, self.values):
            _given(x)

    @property
    def experts(self) -> int:
        """E."""
        return self._first().shape[2]

    @property
    def width(self) -> int:
        """W, padding included."""
        return self._first().shape[3]

    @property
    def compressed(self) -> bool:
        """Whether hidden units are mixtures, not tokens."""
        return self.index is None

    @property
    def per_query(self) -> int:
        """S, the experts that one query uses."""
        return self.experts if self.routes is None else self.routes.shape[-1]

    def _first(self) -> Tensor:
        return _given(self.w1 if self.index is None else self.index)

    def used(self, rows: Tensor) -> Tensor:
        """Experts `[B, H, R or 1, S]` that the queries at `rows` use."""
        if self.routes is not None:
            return self.routes[:, :, rows]
        first = self._first()
        return torch.arange(first.shape[2], device=first.device).expand(*first.shape[:2], 1, -1)

    def tokens(self, rows: Tensor) -> Tensor:
        """Tokens `[B, H, R or 1, U]` of the hidden units those queries use: -1 an absent unit, -2 a compressed one."""
        used = self.used(rows)
        if self.index is None:
            tokens = torch.full((*used.shape, self.width), -2, device=used.device)
        else:
            tokens = _gather(self.index, used.clamp(min=0)).long()
        return tokens.masked_fill((used < 0).unsqueeze(-1), -1).flatten(3, 4)

    def latest(self, rows: Tensor) -> Tensor:
        """The latest token `[B, H, R or 1, U]` in each hidden unit those queries use."""
        if self.index is not None:
            return self.tokens(rows)
        return _gather(_given(self.last), self.used(rows).clamp(min=0)).flatten(3, 4)

    def units(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden units that the queries at `rows` use: weights `[B, H, R or 1, U, D]`, `[.., Dv]`, and their `tokens`."""
        tokens = self.tokens(rows)
        if self.index is None:
            w1, w2 = (_gather(_given(w), self.used(rows).clamp(min=0)).flatten(3, 4) for w in (self.w1, self.w2))
        else:
            w1, w2 = (_gather(_given(w), tokens.clamp(min=0)) for w in (self.keys, self.values))
        return w1, w2, tokens


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("a bank needs w1 and w2, or index, keys and values")
    return x


def _gather(source: Tensor, index: Tensor) -> Tensor:
    """`source: [B, H, E, ...]` at `index: [B, H, ...]` along the expert axis -> `[B, H, *index, *rest]`."""
    b = torch.arange(source.shape[0], device=source.device).view(-1, 1, *[1] * (index.ndim - 2))
    h = torch.arange(source.shape[1], device=source.device).view(1, -1, *[1] * (index.ndim - 2))
    return source[b, h, index]


@dataclass(frozen=True)
class FastWeights:
    """Banks and how the hidden units of all chosen experts meet."""

    banks: tuple[Bank, ...]
    combine: Literal["joint", "gated", "linear", "sum"] = "joint"
    """`joint`: one softmax over all hidden units. `linear`: hidden units divided by their sum plus `eps`. `sum`: hidden units as they
    are. `gated`: each bank normalised alone, by its own activation's rule, then summed with `gates`."""
    gates: tuple[Tensor, ...] = ()
    """one `[B, H, N]` factor a bank, for `gated`; none means 1"""
    eps: float = 0.0
    """added to the sum that linear hidden units are divided by"""
    least: float = 0.0
    """the sum that linear hidden units are divided by is at least this, where above 0"""
    beside: Callable[[Tensor], Tensor] | None = None
    """`rows [R] -> [B, H, R, Dv]`, added to the output: a convolution of the values, say, which is no expert"""


def apply(weights: FastWeights, q: Tensor, rows: Tensor | None = None) -> Tensor:
    """Evaluate fast weights on queries `q: [B, H, N, D]` -> `[B, H, N, Dv]`, or `[B, H, R, Dv]` at `rows`."""
    rows = positions(q, rows)
    widest = sum(bank.per_query * bank.width for bank in weights.banks) * q.shape[0] * q.shape[1] * q.shape[-1]
    step = max(1, _CHUNK_ELEMENTS // max(1, widest))
    return torch.cat([_apply_rows(weights, q, chunk) for chunk in rows.split(step)], 2)


def _apply_rows(weights: FastWeights, q: Tensor, rows: Tensor) -> Tensor:
    q = take(q, rows)
    units = [bank.units(rows) for bank in weights.banks]
    hidden = [_hidden(bank, q, rows, w1, tokens) for bank, (w1, _, tokens) in zip(weights.banks, units, strict=True)]
    if weights.combine == "gated":
        hidden = [
            _normalised(h) if bank.activation == "softmax" else _divided(h, weights) for bank, h in zip(weights.banks, hidden, strict=True)
        ]
        if weights.gates:
            hidden = [gate[:, :, rows, None] * h for gate, h in zip(weights.gates, hidden, strict=True)]
    else:
        together = torch.cat(hidden, -1)
        if weights.combine != "sum":
            together = _normalised(together) if weights.combine == "joint" else _divided(together, weights)
        hidden = list(together.split([h.shape[-1] for h in hidden], -1))
    hidden = [bank.factor(q, w1) * h if bank.factor else h for bank, h, (w1, _, _) in zip(weights.banks, hidden, units, strict=True)]
    out = torch.stack([_mix(h, w2) for h, (_, w2, _) in zip(hidden, units, strict=True)]).sum(0)
    return out if weights.beside is None else out + weights.beside(rows)


def _hidden(bank: Bank, q: Tensor, rows: Tensor, w1: Tensor, tokens: Tensor) -> Tensor:
    """First-layer output `[B, H, R, U]`."""
    x = bank.query_map(q, rows) if bank.query_map else q
    hidden = bank.scale * torch.einsum("bhrd,bhrud->bhru", wide(x), wide(w1.expand(*x.shape[:3], *w1.shape[3:])))
    if bank.bias is not None:
        hidden = hidden + bank.bias[:, :, rows]
    absent = tokens == -1
    if bank.causal:
        absent = absent | (bank.latest(rows) > rows[:, None])
    return hidden.masked_fill(absent, float("-inf") if bank.activation == "softmax" else 0.0)


def _divided(hidden: Tensor, weights: FastWeights) -> Tensor:
    total = hidden.sum(-1, keepdim=True) + weights.eps
    return hidden / (total.clamp(min=weights.least) if weights.least else total)


def _normalised(hidden: Tensor) -> Tensor:
    empty = (hidden == float("-inf")).all(-1, keepdim=True)
    return hidden.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _mix(hidden: Tensor, w2: Tensor) -> Tensor:
    return torch.einsum("bhru,bhrud->bhrd", hidden.to(w2.dtype), w2.expand(*hidden.shape[:3], *w2.shape[3:]))


def width_per_query(weights: FastWeights) -> float:
    """Mean number of hidden units that a query reads, padding left out."""
    total = 0.0
    for bank in weights.banks:
        rows = torch.arange(1 if bank.routes is None else bank.routes.shape[2], device=bank._first().device)
        counts = [(bank.tokens(chunk) != -1).sum(-1).double().mean() * len(chunk) for chunk in rows.split(256)]
        total += float(torch.stack(counts).sum()) / len(rows)
    return total


def load(bank: Bank) -> Tensor:
    """Queries per expert `[B, H, E]` of a routed bank."""
    assert bank.routes is not None, "only routed banks have a load"
    return occurrences(bank.routes, bank.experts)


def occurrences(ids: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 is among `ids: [B, H, X, Y]`, `[B, H, size]`; -1 is left out.

    Ids that a batch or its heads share by stride 0 are read once, and all of them some X at a time: N experts of W tokens, or a window
    for each query, are many times as large as what is counted.
    """
    own = ids[tuple(slice(1) if stride == 0 else slice(None) for stride in ids.stride()[:2])]
    counts = torch.zeros(*own.shape[:2], size + 1, device=ids.device, dtype=torch.long)
    one = torch.ones((), device=ids.device, dtype=torch.long)
    for part in own.split(max(1, _CHUNK_ELEMENTS // max(1, own[:, :, :1].numel())), 2):
        places = part.flatten(2).long()
        counts.scatter_add_(2, places.masked_fill(places < 0, size), one.expand_as(places))
    return counts[..., :-1].expand(*ids.shape[:2], -1)


def kept(weights: FastWeights, keys: int) -> Tensor:
    """`[B, H, M]`, True for tokens that at least one token-aligned expert holds; what is False is pruned."""
    mask: Tensor | None = None
    for bank in weights.banks:
        if bank.index is not None:
            held = occurrences(bank.index, keys) > 0
            mask = held if mask is None else mask | held
    assert mask is not None, "no bank of these fast weights is token-aligned"
    return mask


def recall(weights: FastWeights, q: Tensor, k: Tensor, rows: Tensor | None = None, *, causal: bool = False) -> tuple[Tensor, Tensor] | None:
    """How much of full softmax attention the tokens that each query reads would carry.

    Returns the softmax mass `[B, H, R]` on those tokens, and whether `[B, H, R]` the heaviest token of all is among them; None
    where no hidden unit is a token.
    """
    if all(bank.compressed for bank in weights.banks):
        return None
    rows = positions(q, rows)
    step = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [_recall_rows(weights, take(q, chunk), k, chunk, causal) for chunk in rows.split(step)]
    return torch.cat([mass for mass, _ in parts], 2), torch.cat([top for _, top in parts], 2)


def _recall_rows(weights: FastWeights, q: Tensor, k: Tensor, rows: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    logits = wide(q) @ wide(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(torch.arange(k.shape[2], device=q.device) > rows[:, None], float("-inf"))
    read = torch.zeros(*logits.shape[:3], k.shape[2] + 1, dtype=torch.bool, device=q.device)
    for bank in weights.banks:
        if not bank.compressed:
            tokens = bank.tokens(rows).expand(*logits.shape[:3], -1)
            read.scatter_(3, tokens.masked_fill(tokens < 0, k.shape[2]), True)
    read = read[..., :-1]
    return (logits.softmax(-1) * read).sum(-1), read.gather(3, logits.argmax(-1, keepdim=True)).squeeze(-1)
