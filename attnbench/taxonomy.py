"""The paper's five dimensions of efficient attention, as data.

Source: Mixture-of-Top-k Attention, arXiv 2602.01219, taxonomy figure. An attention layer is read as a set of
fast-weight experts (keys are first-layer weights, values second-layer weights) and a routing of queries to them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from attnbench.method import Method


class Scaling(StrEnum):
    """How the fast weights, as wide as the sequence, are made scalable."""

    NONE = "none"
    """Every query reads every key-value pair."""
    ROUTING = "routing"
    """A query reads a few of many experts; the key-value pairs themselves are kept as they are."""
    COMPRESSION = "compression"
    """All key-value pairs are folded into fewer hidden units, or into a linear layer, that every query reads."""
    BOTH = "compression & routing"
    """Compressed units and routed experts, side by side."""


class Expert(StrEnum):
    """What one expert is."""

    MLP = "MLP"
    """Two layers with a softmax between them: rows of keys and rows of values."""
    LINEAR = "linear layer"
    """One matrix, the sum of phi(k)^T v, read with phi(q)."""
    MODULE = "module"
    """A small network whose weights are learned from the keys and values."""


class Count(StrEnum):
    """How many routed experts there are; where nothing is routed, the one that all queries share."""

    SHARED = "one shared"
    """One expert for all queries."""
    LANDMARKS = "m"
    """A fixed number, independent of the sequence length."""
    BLOCKS = "N/n"
    """One for each block of n tokens."""
    TOKENS = "N"
    """One for each query."""


class Construction(StrEnum):
    """Where an expert's weights come from."""

    IDENTITY = "identity"
    """The keys and values as they are."""
    KERNELIZATION = "kernelization"
    """A feature map of the keys makes the first layer linear, so that it can be summed away."""
    LOCAL_KERNELIZATION = "local prior & kernelization"
    """The same, block by block."""
    LEARNABLE_PROJECTION = "learnable projection"
    """Learned matrices or convolutions mix the tokens down to fewer rows."""
    LANDMARK_PROBING = "landmark probing"
    """A few landmark queries probe all keys: by attention (compress), by top-k (gather), or both."""
    TEST_TIME_TRAINING = "test-time training"
    """Gradient steps on the keys and values."""
    OFFSET_PREDICTING = "offset predicting"
    """The query predicts where to sample."""
    LOCALITY_PRIOR = "locality prior"
    """Fixed blocks or windows of neighbouring tokens."""
    SKIM = "light-weight skim"
    """A cheap score of every key for every query, then the top k."""
    EXACT_SKIM = "exact skim"
    """The full attention scores of every key for every query, then the top k."""


class Topology(StrEnum):
    """Which queries reach which experts."""

    ALL_TO_ONE = "all-to-one"
    """All queries use the same expert."""
    N_TO_ONE = "N-to-one"
    """All queries use one expert that was gathered for them."""
    ONE_TO_ONE = "N times one-to-one"
    """Each query has an expert of its own."""
    N_TO_M = "N-to-m"
    """Each query picks among a fixed number of experts."""
    N_TO_BLOCKS = "N-to-N/n"
    """Each query picks among the blocks."""
    BLOCKS_TO_BLOCKS = "N/n-to-N/n"
    """The queries of a block pick blocks together."""
    BLOCK_TO_ONE = "m times N/m-to-one"
    """The queries of a segment use the segment's expert."""


class Family(StrEnum):
    """A coarse name for a point of the taxonomy; figures give each family one colour."""

    DENSE = "dense softmax"
    LINEAR = "kernelised"
    COMPRESSED = "compressed"
    TEST_TIME = "test-time trained"
    SAMPLED = "sampled"
    PER_QUERY = "per-query routing"
    MOE = "mixture of experts"
    COMPRESS_ROUTE = "compress & route"


@dataclass(frozen=True)
class Coordinates:
    """One method's place along the five dimensions."""

    scaling: Scaling
    expert: Expert
    count: Count
    construction: Construction
    topology: Topology

    @property
    def family(self) -> Family:
        """The coarse family that these coordinates fall in."""
        if self.scaling is Scaling.BOTH:
            return Family.COMPRESS_ROUTE
        if self.construction is Construction.TEST_TIME_TRAINING:
            return Family.TEST_TIME
        if self.construction is Construction.OFFSET_PREDICTING:
            return Family.SAMPLED
        if self.scaling is Scaling.ROUTING:
            return Family.PER_QUERY if self.count is Count.TOKENS else Family.MOE
        if self.expert is not Expert.MLP:
            return Family.LINEAR
        return Family.DENSE if self.scaling is Scaling.NONE else Family.COMPRESSED

    def as_dict(self) -> dict[str, str]:
        """Dimension -> printed value, in the paper's order."""
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}


DIMENSIONS: dict[str, type[StrEnum]] = {
    "scaling": Scaling,
    "expert": Expert,
    "count": Count,
    "construction": Construction,
    "topology": Topology,
}
"""Dimension name -> its values, in the paper's order."""

TITLES: dict[str, str] = {
    "scaling": "scaling strategy",
    "expert": "expert type",
    "count": "expert count",
    "construction": "expert construction",
    "topology": "routing topology",
}
"""Dimension name -> the heading that the paper gives it."""


def parse(dimension: str, text: str) -> StrEnum:
    """The member of `dimension` called `text` (its value or its name, any case).

    Raises `ValueError` naming the dimensions or the values there are.
    """
    if dimension not in DIMENSIONS:
        raise ValueError(f"unknown dimension {dimension!r}: choose from {', '.join(DIMENSIONS)}")
    wanted = text.strip().lower()
    for member in DIMENSIONS[dimension]:
        if wanted in (member.value.lower(), member.name.lower()):
            return member
    values = ", ".join(repr(m.value) for m in DIMENSIONS[dimension])
    raise ValueError(f"unknown {dimension} {text!r}: choose from {values}")


def select(methods: Iterable[Method], **wanted: StrEnum) -> list[Method]:
    """The methods whose coordinates have every wanted value."""
    return [m for m in methods if all(getattr(m.coordinates, key) == value for key, value in wanted.items())]


def rows(methods: Sequence[Method]) -> list[dict[str, str]]:
    """The paper's table as data: one dict a method, `method`, the five dimensions, `source`."""
    ordered = sorted(methods, key=lambda m: (list(Scaling).index(m.coordinates.scaling), m.name))
    return [{"method": m.title, "name": m.name, **m.coordinates.as_dict(), "source": m.citation.short} for m in ordered]
