"""Linear attention: a positive feature map in place of the softmax, so that keys and values fold into one matrix.

`o_i = phi(q_i) S / (phi(q_i) . z + eps)` with `phi(x) = elu(x) + 1`, `S = sum_j phi(k_j)^T v_j`, `z = sum_j phi(k_j)`, eps = 1e-6; causal:
the sums run over j <= i. Katharopoulos et al. 2020, "Transformers are RNNs", equations 5, 7, 9 and 10, https://arxiv.org/abs/2006.16236.
No 1/sqrt(D) scale. As in the authors' code, eps is added to the denominator. Sums are in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import elu

from attnbench.eager import expand_heads, positions, take, wide
from attnbench.fastweights import FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from . import _kernelised
from ._kernelised import Normaliser, causal_cross, implementations

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NORM = Normaliser(add=1e-6)


@dataclass(frozen=True, kw_only=True)
class LinearParams(Params):
    """Linear attention has no hyper-parameters of its own."""


def feature(x: Tensor) -> Tensor:
    """`phi(x) = elu(x) + 1` in at least float32."""
    return elu(wide(x)) + 1


def reference(q: Tensor, k: Tensor, v: Tensor, params: LinearParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    at = positions(q, rows) if params.causal else None
    return _kernelised.attend(feature(take(q, rows)), feature(k), wide(v), NORM, at).to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: LinearParams) -> FastWeights:
    """One shared expert with linear hidden units: D of them, or causal one a token."""
    key, value = expand_heads(q, feature(k), wide(v))
    bank = _kernelised.bank(lambda q, _rows: feature(q), key, value, causal=params.causal)
    return FastWeights((bank,), combine="linear", eps=NORM.add)


def cost(shape: Shape, params: LinearParams) -> Cost:  # noqa: ARG001
    """2 M D Dv FLOP a key head for S, M D for z; 2 N D Dv a query head to read S, 2 N D for the denominator. Causal the same."""
    return _kernelised.cost(shape, shape.dim)


def _bidirectional(_shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
    return [] if params.causal else ["flash-linear-attention is causal"]


METHOD = Method(
    name="linear",
    title="Linear",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation("Katharopoulos et al.", 2020, "Transformers are RNNs", "https://arxiv.org/abs/2006.16236", "ICML"),
    params=LinearParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True),
    implementations=(
        *implementations("linear", Limits(cross=True, extra=causal_cross), Limits(cross=True, max_dim=256)),
        Implementation(
            "fla",
            "attnbench.methods._linear_fla:attention",
            Limits(devices=("cuda",), dtypes=("bfloat16",), max_dim=248, extra=_bidirectional),
            requires=("fla",),
            witness="attnbench.methods._linear_fla:witness",
            layout="bnhd",
            note="flash-linear-attention's chunked kernels",
        ),
    ),
)
