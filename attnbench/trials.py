"""What a record says of a model that was trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Trial:
    """One learning rate of a case that trains."""

    rate: float
    steps: int
    """updates taken: fewer than the case allows where the target was reached or the loss was no longer finite"""
    losses: tuple[tuple[int, float], ...]
    """(step, mean training loss since the point before)"""
    validation: tuple[tuple[int, float], ...]
    """(step, accuracy on the validation split)"""
    diverged: bool
    tokens_per_s: float | None
    """of training steps, data included, evaluation and the first step not; None where a run was too short to say"""


@dataclass(frozen=True)
class Training:
    """How a model was trained. The rate chosen is the one with the highest validation accuracy."""

    trials: tuple[Trial, ...]
    """smallest rate first; all end where the first of them reaches the target"""
    rate: float
    """the one chosen; NaN where all diverged"""
    parameters: int
    """learned numbers of the model"""
    mixing_parameters: int
    """those that belong to the method alone"""
    width: int
    """channels of the model"""
    groups: Mapping[str, float] = field(default_factory=dict)
    """slice of the test split, such as a number of pairs -> accuracy"""
    group: str = ""
    """what a slice counts"""
    chance: float = 0.0
    """accuracy of a guess"""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """settings of the loop that are the same for every case"""
    data_hash: str = ""
    """of the first training batch"""
    pruned: tuple[float, ...] = ()
    """layer -> share of tokens that no expert keeps, on test examples; empty for a method whose experts hold no tokens"""
    busiest: tuple[float, ...] = ()
    """layer -> queries of the busiest routed expert over those of a mean one; empty where nothing is routed"""
    loads: tuple[tuple[float, ...], ...] = ()
    """layer -> the same for experts at even places from the busiest to the idlest"""
    kept: tuple[str, ...] = ()
    """layer -> on images, in how many heads some expert keeps each token of the first test examples, as `tasks.routing` packs it"""
    graph: bool = False
    """whether the steps of all trials were replayed from a CUDA graph"""
    together: int = 1
    """trials that ran side by side, each at `tokens_per_s`"""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Training:
        """Read the JSON form."""
        curves = ("losses", "validation")
        trials = tuple(Trial(**{**t, **{c: tuple((int(a), float(b)) for a, b in t[c]) for c in curves}}) for t in data["trials"])
        lists = {key: tuple(data.get(key, ())) for key in ("notes", "pruned", "busiest", "kept")}
        loads = tuple(tuple(layer) for layer in data.get("loads", ()))
        return cls(**{**data, "trials": trials, **lists, "loads": loads})
