"""NSA, native sparse attention: compressed blocks of all keys, a few selected blocks of keys, and a window, summed with gates.

`o_t = sum_c g_t^c softmax(q_t K_c^T / sqrt(D)) V_c` over three branches, each with a softmax of its own. Yuan et al. 2025, equations 5
to 12, https://arxiv.org/abs/2502.11089:

- compressed: keys and values are blocks of l tokens, one every s tokens, each folded to one row by phi;
- selected: all tokens of the K blocks of l' tokens with the largest importance `P`. A stride of s tokens has the compressed
  probabilities of all blocks that cover it, a selection block adds up its strides (equation 9, counted from 1), and the query heads
  that share a key head add up theirs (equation 10) and read the same blocks. The first block, the query's own and the one before it
  are always among the K (`first`, `local`);
- window: the last w tokens.

Causal, the paper's form: a compressed block is seen once its last token is not in the future; selection blocks are seen up to the
query's own, in which later keys are hidden. Bidirectional, our addition: nothing is hidden, the window reaches to both sides, and the
last compressed block, which the end of the sequence may cut short, is averaged over its true length.

phi is the mean of fla-org's implementation by default, or a learned MLP of the block's l rows with learned positions (`phi = mlp`):
layers l D -> l D -> D with ReLU between and zero rows beyond the end, as in lucidrains' implementation. Departures: the paper's gates
are an MLP of the layer's input, here `g_t = sigmoid(W q_t)` of the queries of all heads; the branches share one k and v, which the
paper projects three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attnbench.eager import expand_heads, masked_softmax, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._chunks import chosen_by_rows
from ._nsa_compress import compressed, draw_phi, ends, members, phi_flops
from ._nsa_select import block_tokens, choose, read, window_tokens
from ._routed import implementation
from ._varlen import segment_reasons, varlen_reasons
from .sliding_window import SlidingWindowParams

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_BLOCKS = 16384  # that a kernel chooses from at once
_COPIES = 6
"""tensors of the size of a chunk's scores that are alive at once: logits, probabilities, padded and summed importances"""


@dataclass(frozen=True, kw_only=True)
class NsaParams(Params):
    """Hyper-parameters of NSA; the defaults are the paper's."""

    compress: int = param(32, "tokens that are folded to one compressed key, l", unit="tokens", low=1)
    stride: int = param(16, "tokens from one compressed block to the next, s; divides l and l'", unit="tokens", low=1)
    block: int = param(64, "tokens in a selection block, l'", unit="tokens", low=1)
    topk: int = param(16, "selection blocks that each query reads, forced ones included; all where there are fewer", unit="blocks", low=1)
    window: int = param(512, "keys of the window, the query's own included", unit="keys", low=1)
    first: int = param(1, "first blocks of the sequence that are always selected", unit="blocks", low=0)
    local: int = param(2, "blocks that are always selected: the query's own and those before it", unit="blocks", low=0)
    phi: Literal["mean", "mlp"] = param("mean", "how a block is folded: `mlp` is learned")

    def problems(self, shape: Shape) -> list[str]:
        """Adds strides that do not fit blocks, and more forced blocks than are selected."""
        found = super().problems(shape)
        for name, size in (("compress", self.compress), ("block", self.block)):
            if self.stride >= 1 and size % self.stride:
                found.append(f"stride = {self.stride} does not divide {name} = {size}")
        if self.compress > self.block:
            found.append(f"compress = {self.compress} exceeds block = {self.block}: a selection block holds compressed blocks")
        if self.first + self.local > self.topk:
            found.append(f"first + local = {self.first + self.local} blocks are forced, more than topk = {self.topk}")
        return [*found, "causal needs local >= 1: every query reads its own block"] if self.causal and self.local < 1 else found

    @property
    def windowed(self) -> SlidingWindowParams:
        """The window branch as a method of its own."""
        return SlidingWindowParams(window=self.window, causal=self.causal)


def initial_weights(shape: Shape, params: NsaParams, generator: torch.Generator) -> Weights:
    """`gate [H, 3, H D]`, uniform within `(H D)^-1/2`, torch's default as in fla-org's; and phi's, see `draw_phi`."""
    channels = shape.heads * shape.dim
    gate = (2 * torch.rand(shape.heads, 3, channels, generator=generator, dtype=torch.float64) - 1) * channels**-0.5
    return {"gate": gate} | (draw_phi(shape, params, generator) if params.phi == "mlp" else {})


def gates(q: Tensor, weight: Tensor) -> Tensor:
    """`g [3, B, H, R]` of compressed, selected and window branch, from the queries `q: [B, H, R, D]` of all heads."""
    tokens = wide(q).transpose(1, 2).flatten(2)
    factors: Tensor = (tokens @ wide(weight).flatten(0, 1).T).sigmoid().unflatten(2, weight.shape[:2])
    return factors.permute(3, 0, 2, 1)


def _probabilities(q: Tensor, compressed_k: Tensor, rows: Tensor, keys: int, params: NsaParams) -> Tensor:
    """The compressed branch's softmax `[B, H, R, C]`, of the queries `q: [B, H, R, D]` at positions `rows`."""
    visible = ends(keys, params, q.device) <= rows[:, None] if params.causal else None
    return masked_softmax(q.shape[-1] ** -0.5 * (wide(q) @ wide(compressed_k).transpose(-1, -2)), visible)


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: NsaParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition; it gathers the keys of every query."""
    own = given(weights, initial_weights, (q, k, v), params)
    rows, q, keys = positions(q, rows), take(q, rows), k.shape[2]
    compressed_k, compressed_v = expand_heads(q, *compressed(k, v, params, own))
    p = _probabilities(q, compressed_k, rows, keys, params)
    selected = block_tokens(choose(p, rows, k.shape[1], keys, params), keys, params)
    window = window_tokens(rows, keys, params)[None, None]
    seen = (selected >= 0) & (selected <= rows[:, None]) if params.causal else selected >= 0
    branches = p.to(v.dtype) @ compressed_v, read(q, k, v, selected, seen), read(q, k, v, window, window >= 0)
    return (gates(q, own["gate"]).unsqueeze(-1) * wide(torch.stack(branches))).sum(0).to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: NsaParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """A shared compressed expert, one expert a selection block, and one a window; gates weigh the three banks."""
    own = given(weights, initial_weights, (q, k, v), params)
    rows, keys, scale, kv_heads = positions(q, None), k.shape[2], q.shape[-1] ** -0.5, k.shape[1]
    w1, w2 = expand_heads(q, *compressed(k, v, params, own))
    last = ends(keys, params, q.device)

    def chosen(x: Tensor, at: Tensor) -> Tensor:
        return choose(_probabilities(x, w1, at, keys, params), at, kv_heads, keys, params)

    routes = chosen_by_rows(chosen, q, _COPIES * w1.shape[2]).repeat_interleave(q.shape[1] // kv_heads, 1)
    k, v = expand_heads(q, k, v)

    def everywhere(x: Tensor) -> Tensor:
        return x.expand(*q.shape[:2], *x.shape)

    blocks = block_tokens(torch.arange(-(-keys // params.block), device=q.device).unsqueeze(-1), keys, params)
    banks = (
        Bank(w1=w1.unsqueeze(2), w2=w2.unsqueeze(2), scale=scale, causal=params.causal, last=everywhere(last[None])),
        Bank(k, v, everywhere(blocks), routes=routes, scale=scale, causal=params.causal),
        Bank(k, v, everywhere(window_tokens(rows, keys, params)), routes=everywhere(rows[:, None]), scale=scale),
    )
    return FastWeights(banks, combine="gated", gates=tuple(gates(q, own["gate"])))


def pairs(shape: Shape, params: NsaParams) -> tuple[int, int, int]:
    """Pairs of a head that the compressed, the selected and the window branch score.

    Bidirectional, every query counts as reading K whole blocks (at most M keys): an upper bound where the last block is short.
    """
    n, block, count = shape.n, params.block, len(members(shape.keys, params))
    before, after = (min(reach, n - 1) for reach in params.windowed.reach)
    window = n * (before + after + 1) - (before * (before + 1) + after * (after + 1)) // 2
    if not params.causal:
        return n * count, n * min(params.topk * block, shape.keys), window
    seen = sum(max(0, n - (b * params.stride + params.compress - 1)) for b in range(count))
    lengths = [min(block, n - start) for start in range(0, n, block)]
    selected = sum(min(params.topk - 1, b) * block * length + length * (length + 1) // 2 for b, length in enumerate(lengths))
    return seen, selected, window


def cost(shape: Shape, params: NsaParams) -> Cost:
    """2 (D + Dv) FLOP for each pair of each branch; phi and gates as they come; additions of importances."""
    s, heads, kv_heads = shape, shape.batch * shape.heads, shape.batch * shape.kv_heads
    seen, selected, window = pairs(s, params)
    count, blocks = len(members(s.keys, params)), -(-s.keys // params.block)
    channels, steps = s.heads * s.dim, blocks * (params.block // params.stride)
    flops = {
        "project": 2 * s.batch * s.n * channels * 3 * s.heads + (kv_heads * phi_flops(s, params) if params.phi == "mlp" else 0),
        "pool": kv_heads * sum(members(s.keys, params)) * (s.dim + s.dim_v) if params.phi == "mean" else 0,
        "route": heads * seen + kv_heads * s.n * steps * (params.compress // params.stride),
        "score": 2 * heads * seen * s.dim,
        "attend": 2 * heads * (seen * s.dim_v + (selected + window) * (s.dim + s.dim_v)),
    }
    index = 4 * kv_heads * s.n * min(params.topk, blocks)
    learned = sum(x.numel() for x in initial_weights(s, params, torch.Generator()).values())
    rows, io = kv_heads * count * (s.dim + s.dim_v), heads * s.n * (s.dim + s.dim_v) + kv_heads * s.keys * (s.dim + s.dim_v)
    traffic = {"project": heads * s.n * s.dim + learned, "pool": kv_heads * s.keys * (s.dim + s.dim_v) + rows, "attend": 3 * io + rows}
    moved = {"route": index, "permute": 2 * index, "attend": index}
    return Cost.of(
        s, flops, extra=2 * rows + learned, index_bytes=index, selection=("route", "permute"), traffic=traffic, index_traffic=moved
    )


def _varlen_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    assert isinstance(params, NsaParams)
    segments = shape.batch * shape.heads * -(-shape.keys // params.block)
    return varlen_reasons(shape, params, dtype, device) + segment_reasons(segments, device)


def _pairs(shape: Shape, params: Params) -> int:
    assert isinstance(params, NsaParams)
    return shape.batch * shape.kv_heads * shape.n * min(params.topk, -(-shape.keys // params.block))


def _refused(shape: Shape, params: Params) -> list[str]:
    assert isinstance(params, NsaParams)
    blocks = -(-shape.keys // params.block)
    return [f"{blocks} selection blocks exceed the {_MOST_BLOCKS} of the kernels"] if blocks > _MOST_BLOCKS else []


METHOD = Method(
    name="nsa",
    title="NSA",
    coordinates=Coordinates(Scaling.BOTH, Expert.MLP, Count.BLOCKS, Construction.LOCALITY_PRIOR, Topology.N_TO_BLOCKS),
    citation=Citation(
        "Yuan et al.",
        2025,
        "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        "https://arxiv.org/abs/2502.11089",
        "ACL",
    ),
    params=NsaParams,
    reference=reference,
    experts=experts,
    cost=cost,
    weights=initial_weights,
    no_budget="it reads N / stride compressed keys and topk blocks of at least a stride, so never fewer than 2 sqrt(N), and a window",
    implementations=(
        implementation(
            "attnbench.methods._nsa:fused",
            _pairs,
            "compressed and selected branch and the choice in fused kernels, windows by flash attention",
            _refused,
        ),
        Implementation(
            "varlen",
            "attnbench.methods._nsa:varlen",
            Limits(extra=_varlen_reasons, no_graph="the queries of each block are counted on the device and the counts read back"),
            note="compressed scores in chunks of queries, selected blocks by variable-length flash attention, windows by flash attention",
        ),
    ),
    selective=True,
    couples_heads=True,
)
