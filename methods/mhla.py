"""MHLA, token-level multi-head linear attention: every block of tokens reads a learned mixture of the states of all blocks.

With m blocks of neighbouring tokens, `phi(x) = relu(x) + eps`, sums `S_a = sum_{j in a} phi(k_j)^T v_j` and `z_a = sum_{j in a} phi(k_j)`,
and a learned `A: [m, m]` shared by all heads: `o_i = phi(q_i) S'_b / (phi(q_i) . z'_b + eps)` for i in block b, `S'_b = sum_a A_ba S_a`,
`z'_b = sum_a A_ba z_a`, eps = 1e-6. No 1/sqrt(D) scale. Zhang et al. 2026, https://arxiv.org/abs/2601.07832.

`A` starts from the distances between block centres (`transform`), its columns summing to 1 in all but `gaussian`. The number of blocks is
fixed, so that the work stays linear; blocks differ by a token in height or width where m does not divide the grid, for which the authors
pad. `normalizer = repo` is the authors' code, whose denominator mixes products of the other blocks' queries at the same place,
`sum_a A_ba phi(q_a) . z_a`, and so does not normalise (their issue 13); `none` divides by nothing. Their depthwise convolution of v is
`conv`, off by default: it is a local module beside the attention. Left out: their second LayerNorm, which doubles the block's (issue 10),
and the causal form of their language models. Sums are in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch.nn.functional import relu

from attnbench.eager import expand_heads, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._depthwise import depthwise
from ._grid import GridParams
from ._tiles import Tiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attnbench.method import Weights

EPS = 1e-6
"""added to every feature, and to the denominator"""


@dataclass(frozen=True, kw_only=True)
class MhlaParams(GridParams):
    """How tokens are cut into blocks, and how the blocks' states are mixed and normalised."""

    grid: str = param("auto", "tiles of a row-major grid: `HxW`, or `auto`, the most nearly square one; `none` cuts runs of the sequence")
    blocks: int = param(16, "blocks of tokens, m", unit="blocks", low=1, at_most="n")
    transform: Literal["cos", "linear", "exp", "local", "gaussian"] = param("cos", "distance of blocks -> first mixing weights")
    normalizer: Literal["paper", "repo", "none"] = param("paper", "denominator: the mixed sum, the authors' code, or none")
    conv: int = param(0, "side of the depthwise convolution of v over the grid; 0 adds none, the authors' models have 5 or 3", low=0)

    def problems(self, shape: Shape) -> list[str]:
        """Adds blocks that do not tile the grid, uneven ones where the denominator mixes places, and a convolution without a centre."""
        found = Params.problems(self, shape) if self.grid == "none" else super().problems(shape)
        if found:
            return found
        height, width = self.sides(shape.n)
        tiles = Tiles.of((height, width), self.blocks)
        if tiles is None:
            found.append(f"blocks = {self.blocks} do not tile a {height} x {width} grid in rows and columns: change blocks or grid")
        elif self.normalizer == "repo" and not tiles.even:
            where = f"{tiles.rows} x {tiles.columns} blocks on a {height} x {width} grid are not"
            found.append(f"normalizer = repo needs blocks of one size: {where}: change blocks or N")
        if self.conv and self.conv % 2 == 0:
            found.append(f"conv = {self.conv} is even: give an odd side, or 0")
        return found

    def fitted(self, shape: Shape) -> Self:
        """Lowers blocks to a number that tiles the grid, evenly where the denominator wants it."""
        fit = super().fitted(shape)
        options = {m: Tiles.of(fit.sides(shape.n), m) for m in range(fit.blocks, 0, -1)}
        return replace(fit, blocks=next(m for m, t in options.items() if t and (t.even or fit.normalizer != "repo")))

    def sides(self, n: int) -> tuple[int, int]:
        """Height and width; a sequence is one token high."""
        return (1, n) if self.grid == "none" else super().sides(n)

    def tiles(self, n: int) -> Tiles:
        """The blocks."""
        tiles = Tiles.of(self.sides(n), self.blocks)
        assert tiles is not None, "problems() says which blocks fit"
        return tiles


def feature(x: Tensor) -> Tensor:
    """`phi(x) = relu(x) + eps` in at least float32."""
    return relu(wide(x)) + EPS


def draw(shape: Shape, params: MhlaParams, generator: torch.Generator) -> Weights:
    """`mix [m, m]`, A, from the distances between block centres, in blocks. With `conv` also `conv [Hkv, Dv, S, S]` and
    `conv_bias [Hkv, Dv]`, drawn as torch draws Conv2d, uniform within 1 / S."""
    centres = params.tiles(shape.n).centres()
    distance = (centres[:, None] - centres).norm(dim=-1)
    furthest = distance.max().clamp(min=1.0)
    match params.transform:
        case "cos":
            mix = torch.cos(torch.pi / 4 * distance / furthest)
        case "linear":
            mix = 1 - distance / furthest
        case "exp":
            mix = torch.exp(-distance / 3)
        case "local":
            mix = (distance <= 1.5).double()
        case "gaussian":
            mix = torch.exp(-((3 * distance / furthest) ** 2) / 2)
    found = {"mix": mix if params.transform == "gaussian" else mix / mix.sum(0)}
    for name, size in (("conv", (params.conv, params.conv)), ("conv_bias", ())) if params.conv else ():
        uniform = torch.rand(shape.kv_heads, shape.dim_v, *size, generator=generator, dtype=torch.float64)
        found[name] = uniform.mul_(2).sub_(1).div_(params.conv)
    return found


def local(q: Tensor, v: Tensor, params: MhlaParams, w: Mapping[str, Tensor]) -> Tensor:
    """The convolution of v, `[B, H, N, Dv]`."""
    out = depthwise(v, w["conv"], params.sides(v.shape[2])) + w["conv_bias"].unsqueeze(1)
    return expand_heads(q, out, out)[1]


def _states(q: Tensor, k: Tensor, v: Tensor, params: MhlaParams) -> tuple[Tensor, Tensor]:
    """`S [B, H, m, D, Dv]` and `z [B, H, m, D]` of the blocks."""
    key, value, owner = feature(k), wide(v), params.tiles(k.shape[2]).owner(k.device)
    blocks = [(key[:, :, owner == a], value[:, :, owner == a]) for a in range(params.blocks)]
    states, sums = torch.stack([a.transpose(-1, -2) @ b for a, b in blocks], 2), torch.stack([a.sum(2) for a, _ in blocks], 2)
    return expand_heads(q, states, sums)


def _mixed(x: Tensor, mix: Tensor) -> Tensor:
    """`sum_a A_ba x_a` along the third axis of `x: [B, H, m, ...]`."""
    return torch.einsum("ba,xya...->xyb...", wide(mix), x)


def _denominator(q: Tensor, rows: Tensor, sums: Tensor, mix: Tensor, params: MhlaParams) -> Tensor:
    """What the outputs `[B, H, R]` at `rows` are divided by."""
    tiles = params.tiles(q.shape[2])
    owner = tiles.owner(q.device)
    match params.normalizer:
        case "none":
            return torch.ones_like(wide(q[:, :, rows, 0]))
        case "paper":
            return (feature(q[:, :, rows]) * _mixed(sums, mix)[:, :, owner[rows]]).sum(-1) + EPS
        case "repo":
            own = (feature(q) * sums[:, :, owner]).sum(-1)
            return _mixed(own[:, :, tiles.places(q.device)], mix).flatten(2)[:, :, tiles.slots(q.device)[rows]] + EPS


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: MhlaParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    w, rows = given(weights, draw, (q, k, v), params), positions(q, rows)
    states, sums = _states(q, k, v, params)
    query, mixed, owner = feature(q[:, :, rows]), _mixed(states, w["mix"]), params.tiles(q.shape[2]).owner(q.device)[rows]
    blocks = torch.cat([query[:, :, owner == b] @ mixed[:, :, b] for b in range(params.blocks)], 2)
    out = blocks[:, :, owner.argsort(stable=True).argsort()] / _denominator(q, rows, sums, w["mix"], params).unsqueeze(-1)
    return (out + take(local(q, v, params, w), rows) if params.conv else out).to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: MhlaParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """m experts, the mixed states, each used by the queries of its block; unit d of one has weights `z'_d e_d` and `S'_d / z'_d`, as in
    linear attention. Without the paper's denominator they are `e_d` and `S'_d`, and queries are divided before they read.
    """
    w = given(weights, draw, (q, k, v), params)
    states, sums = _states(q, k, v, params)
    mixed, routes = _mixed(states, w["mix"]), params.tiles(q.shape[2]).owner(q.device).expand(*q.shape[:2], -1).unsqueeze(-1)
    units, query_map, paper = torch.ones_like(sums), _queries, params.normalizer == "paper"
    if paper:
        units = _mixed(sums, w["mix"])
        units = torch.where(units == 0, torch.finfo(units.dtype).tiny, units)
    else:
        query_map = partial(_divided, total=_denominator(q, positions(q, None), sums, w["mix"], params))
    bank = Bank(w1=torch.diag_embed(units), w2=mixed / units.unsqueeze(-1), routes=routes, activation="linear", query_map=query_map)
    beside = partial(take, wide(local(q, v, params, w))) if params.conv else None
    return FastWeights((bank,), combine="linear" if paper else "sum", eps=EPS, beside=beside)


def _queries(q: Tensor, _rows: Tensor) -> Tensor:
    return feature(q)


def _divided(q: Tensor, rows: Tensor, total: Tensor) -> Tensor:
    return feature(q) / total[:, :, rows, None]


def cost(shape: Shape, params: MhlaParams) -> Cost:
    """2 N D Dv FLOP a key head for the states and 2 m^2 D Dv to mix them, 2 N D Dv a query head to read; z is a further column."""
    s, heads, kv_heads, m = shape, shape.batch * shape.heads, shape.batch * shape.kv_heads, params.blocks
    divides, mixed = params.normalizer != "none", s.dim_v + (params.normalizer == "paper")
    flops = {
        "pool": kv_heads * s.keys * s.dim * divides,
        "state": 2 * kv_heads * (s.keys * s.dim * s.dim_v + m * m * s.dim * mixed),
        "read": 2 * heads * s.n * s.dim * s.dim_v,
        "normalise": 2 * heads * s.n * (s.dim + m * (params.normalizer == "repo")) * divides,
    }
    state, io = kv_heads * m * s.dim * (s.dim_v + divides), s.dim + s.dim_v
    traffic = {"state": kv_heads * s.keys * io + state, "read": heads * s.n * io + state}
    owned = m * m + s.kv_heads * s.dim_v * (params.conv**2 + 1) * bool(params.conv)
    if params.conv:
        flops["project"] = 2 * kv_heads * s.keys * s.dim_v * params.conv**2
        traffic["project"] = 2 * kv_heads * s.keys * s.dim_v
    return Cost.of(s, flops, extra=state + owned, recomputes=False, traffic=traffic)


METHOD = Method(
    name="mhla",
    title="MHLA",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.LANDMARKS, Construction.LOCAL_KERNELIZATION, Topology.BLOCK_TO_ONE),
    citation=Citation(
        "Zhang et al.",
        2026,
        "MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head",
        "https://arxiv.org/abs/2601.07832",
        "ICLR",
    ),
    params=MhlaParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(no_causal="tiles of an image hold earlier and later tokens, and every tile is mixed into every other"),
    implementations=(
        Implementation("blocked", "attnbench.methods._mhla:blocked", note="features and states by block, an analytic backward pass"),
    ),
    weights=draw,
)
