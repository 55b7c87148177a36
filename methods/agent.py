"""Agent attention: a few agent queries gather what all keys hold, and every query reads the agents.

With agents `a_m` (adaptive averages of the queries) and `c = D^-1/2`: `u_m = sum_j softmax_j(c a_m.k_j) v_j`,
`o_i = sum_m softmax_m(c q_i.a_m) u_m`.
Han et al. 2024, https://arxiv.org/abs/2312.08874.

Departures: agents average along the sequence by default and over a grid on request. The learned extras, position biases of both
stages and a depthwise convolution of v, are left out, and there is no module that adds them: what remains is the paper's attention
itself, as a function of q, k and v alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnbench.eager import attend, expand_heads, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Shape, param
from attnbench.sdpa import attention
from attnbench.stages import stage
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from . import _fused
from ._compressed import attend_few
from ._landmarks import LandmarkParams, landmark_budget, landmarks, pool_flops

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AgentParams(LandmarkParams):
    """Agents and which tokens they average."""

    landmarks: int = param(49, "agent queries; a square number on a grid", unit="tokens", low=1, at_most="n")


def _values(agents: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(agents, k, v, k.shape[-1] ** -0.5)


def reference(q: Tensor, k: Tensor, v: Tensor, params: AgentParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    k, v = expand_heads(q, k, v)
    agents = landmarks(q, params)
    return attend(take(q, rows), agents, _values(agents, k, v), q.shape[-1] ** -0.5)


def experts(q: Tensor, k: Tensor, v: Tensor, params: AgentParams) -> FastWeights:
    """One shared expert: agents and what they gathered."""
    k, v = expand_heads(q, k, v)
    agents = landmarks(q, params)
    return FastWeights((Bank(w1=agents.unsqueeze(2), w2=_values(agents, k, v).unsqueeze(2), scale=q.shape[-1] ** -0.5),))


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: AgentParams) -> Tensor:
    """Two calls of scaled_dot_product_attention.

    In the first one the queries are few and the keys many; the forward pass of torch's flash attention then splits the keys. In the second
    one the keys are few.
    """
    agents = landmarks(q, params)
    with stage("compress"):
        values = attention(agents, k, v)
    return attend_few(q, agents, values)


def cost(shape: Shape, params: AgentParams) -> Cost:
    """8 M N D FLOP a head where Dv = D."""
    s, heads, kv_heads, m = shape, shape.batch * shape.heads, shape.batch * shape.kv_heads, params.landmarks
    gather, read = 2 * heads * m * s.keys, 2 * heads * m * s.n
    flops = {
        "pool": pool_flops(s, params),
        "probe": gather * s.dim,
        "compress": gather * s.dim_v,
        "score": read * s.dim,
        "attend": read * s.dim_v,
    }
    traffic = {
        "pool": heads * (s.n + m) * s.dim,
        "probe": (heads * m + kv_heads * s.keys) * s.dim,
        "compress": (heads * m + kv_heads * s.keys) * s.dim_v,
        "attend": heads * (s.n + m) * (s.dim + s.dim_v),
    }
    return Cost.of(s, flops, extra=heads * m * (s.dim + s.dim_v), traffic=traffic)


def budget(_shape: Shape, params: AgentParams, units: int) -> dict[str, object]:
    """As many agents, or on a grid the nearest square number."""
    return {"landmarks": landmark_budget(params, units)}


METHOD = Method(
    name="agent",
    title="Agent",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MLP, Count.SHARED, Construction.LANDMARK_PROBING, Topology.ALL_TO_ONE),
    citation=Citation(
        "Han et al.",
        2024,
        "Agent Attention: On the Integration of Softmax and Linear Attention",
        "https://arxiv.org/abs/2312.08874",
        "ECCV",
    ),
    params=AgentParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(cross=True, no_causal="agents average later queries and gather later keys"),
    implementations=(
        _fused.implementation("agent"),
        Implementation("sdpa", "attnbench.methods.agent:sdpa", Limits(cross=True)),
    ),
)
