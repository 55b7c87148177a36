"""Sliding-window attention: each query attends to the keys around its own position.

`o_i = sum_{j in W_i} softmax_{j in W_i}(q_i . k_j / sqrt(D)) v_j`, Beltagy et al. 2020, "Longformer", https://arxiv.org/abs/2004.05150.
`window` is the total width w. Bidirectional: `W_i = {j : i - floor(w/2) <= j <= i + floor((w-1)/2)}`, which for odd w = 2r + 1 is
`|i - j| <= r`; an even w has one key more before the query than after it, so that w keys are read whatever w is. Causal:
`W_i = {j : i - w + 1 <= j <= i}`. Windows are cut off at the ends of the sequence and the softmax runs over what is left. Departures:
no global tokens and no dilation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.eager import attend, expand_heads, positions, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology


@dataclass(frozen=True, kw_only=True)
class SlidingWindowParams(Params):
    """Hyper-parameters of sliding-window attention."""

    window: int = param(512, "keys that each query reads, its own included", unit="keys", low=1)

    @property
    def reach(self) -> tuple[int, int]:
        """How many keys before and after its own position a query reads."""
        return (self.window - 1, 0) if self.causal else (self.window // 2, (self.window - 1) // 2)


def band(rows: Tensor, keys: Tensor, params: SlidingWindowParams) -> Tensor:
    """`[R, M]`, True where the key at a position of `keys: [M]` is in the window of the query at a position of `rows: [R]`."""
    before, after = params.reach
    ahead = keys - rows[:, None]
    return (ahead >= -before) & (ahead <= after)


def reference(q: Tensor, k: Tensor, v: Tensor, params: SlidingWindowParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    k, v = expand_heads(q, k, v)
    mask = band(positions(q, rows), positions(k, None), params)
    return attend(take(q, rows), k, v, q.shape[-1] ** -0.5, mask)


def experts(q: Tensor, k: Tensor, v: Tensor, params: SlidingWindowParams) -> FastWeights:
    """N overlapping experts of w neighbouring tokens, expert i for query i."""
    k, v = expand_heads(q, k, v)
    rows, n = positions(q, None), q.shape[2]
    before, after = (min(reach, n - 1) for reach in params.reach)
    index = rows[:, None] + torch.arange(-before, after + 1, device=q.device)
    index = index.masked_fill((index < 0) | (index >= n), -1).expand(*q.shape[:2], -1, -1)
    routes = rows[:, None].expand(*q.shape[:2], -1, 1)
    return FastWeights((Bank(k, v, index, routes=routes, scale=q.shape[-1] ** -0.5),))


def cost(shape: Shape, params: SlidingWindowParams) -> Cost:
    """2 P (D + Dv) FLOP a head, P the pairs inside the windows: N w less what the ends cut off."""
    before, after = (min(reach, shape.n - 1) for reach in params.reach)
    pairs = shape.n * (before + after + 1) - (before * (before + 1) + after * (after + 1)) // 2
    heads = shape.batch * shape.heads
    flops = {"score": 2 * heads * pairs * shape.dim, "attend": 2 * heads * pairs * shape.dim_v}
    return Cost.of(shape, flops, traffic={"attend": Cost.once(shape)})


def budget(_shape: Shape, _params: SlidingWindowParams, units: int) -> dict[str, object]:
    """A window of as many keys; the ends of the sequence cut some off."""
    return {"window": units}


METHOD = Method(
    name="sliding_window",
    title="Sliding window",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.TOKENS, Construction.LOCALITY_PRIOR, Topology.ONE_TO_ONE),
    citation=Citation("Beltagy et al.", 2020, "Longformer: The Long-Document Transformer", "https://arxiv.org/abs/2004.05150", "arXiv"),
    params=SlidingWindowParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    implementations=(
        Implementation(
            "flash",
            "attnbench.methods._window_flash:flash",
            Limits(("cuda",), ("bfloat16", "float16"), max_dim=256, dim_multiple=8, value_dim=False),
            operators=("aten::_flash_attention_forward",),
            layout="bnhd",
            note="torch's FlashAttention with a window",
        ),
        Implementation("chunked", "attnbench.methods._window_chunked:chunked", note="blocks of queries against their neighbouring keys"),
    ),
)
