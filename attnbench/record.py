"""What one attempt at one case left behind: the schema of the results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from attnbench.case import Case
from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCHEMA = 1
"""Number of the record format; a reader refuses others."""
DIGITS = 7
"""significant digits that a sweep keeps: those of a float32, in which a GPU's clock gives milliseconds"""


class Status(StrEnum):
    """How an attempt ended."""

    OK = "ok"
    """Passed the gate and was measured."""
    UNSUPPORTED = "unsupported"
    """Limits say no; `reasons` says why."""
    INCORRECT = "incorrect"
    """Failed the gate; `gate` keeps the numbers."""
    OOM = "oom"
    """Out of memory; `wanted_bytes` where the allocator said how much."""
    TIMEOUT = "timeout"
    """Outran its time and was killed."""
    ERROR = "error"
    """Raised, or its process died."""
    SKIPPED = "skipped"
    """Not tried, because the same series failed for size at a shorter length."""
    DIVERGED = "diverged"
    """Was trained, and its loss stopped being finite at every learning rate; `training` keeps the curves."""


@dataclass(frozen=True)
class Timing:
    """Timed calls of a cell, in seconds."""

    samples_s: tuple[float, ...]
    """every timed call, in order"""
    first_call_s: float
    """the first call of all, compilation and warm-up included"""
    clock: str
    """`cuda-event`, `cuda-graph` or `cpu`"""
    calls_per_sample: int = 1
    throttled: int = 0
    """samples during which the GPU reported a thermal or power brake or ran far under its usual clock"""
    sm_clock_mhz: tuple[int, ...] = ()
    """SM clock read after each round of samples"""


@dataclass(frozen=True)
class Memory:
    """Bytes on top of what the inputs take."""

    peak_bytes: int
    """peak of the whole call minus what was allocated once the inputs existed"""
    output_bytes: int
    saved_bytes: int
    """held for the backward pass beside inputs and output; 0 in forward mode"""
    workspace_bytes: int
    """peak minus output and saved"""
    input_bytes: int
    """q, k, v (and the output's gradient), not part of the peak"""
    source: str
    """which allocator was read"""


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a call goes, from calls under a profiler after the clocks were done; medians over these calls."""

    stages_s: Mapping[str, float]
    """stage -> seconds a call"""
    total_s: float
    """their sum; what the timed call takes beyond it is the host's: launches, and waiting for them"""
    launches: int
    """kernels, copies and fills of a call on a GPU; operators on a CPU, those that others call included"""
    kernels: int
    """how many different ones"""
    synchronisations: int | None
    """times that the host waits for the GPU in a call; None on a CPU"""
    calls: int
    """calls taken apart"""
    source: str
    """whose time it is"""
    flops: Mapping[str, int] = field(default_factory=dict)
    """stage -> work by the method's cost model, brought to the stages that were measured"""
    bytes: Mapping[str, int] = field(default_factory=dict)
    """stage -> traffic likewise, were the stage a pass of its own; 0 where the model does not tell stages apart"""


@dataclass(frozen=True)
class Energy:
    """What a call takes of the GPU's energy, from a window of many calls after the clocks were done."""

    joules_per_call: float
    """above idle"""
    idle_w: float
    """power of the GPU with nothing running, which is subtracted"""
    mean_w: float
    """power over the window, idle included"""
    calls: int
    """in the window"""
    window_s: float
    source: str
    """whose counter, and how the calls ran"""


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


@dataclass(frozen=True)
class Gate:
    """The check against the float64 definition, before any timing."""

    passed: bool
    errors: Mapping[str, float]
    """tensor and measure -> error of this implementation against the float64 definition"""
    bounds: Mapping[str, float]
    """the same keys -> the largest error allowed"""
    n: int
    """length at which it was checked: the case's own, or less where the definition cannot be sampled and would not fit"""
    rows: int
    """queries compared in each of `heads` heads"""
    heads: int
    deterministic: bool | None
    """whether a second call gave the same bits; None where it was not tried"""
    operator: str = ""
    """kernel or operator that was seen to run"""


@dataclass(frozen=True)
class Record:
    """One attempt. Timing and memory exist only for `ok`."""

    case: Case
    status: Status
    env_id: str
    """key of the environment in env.json"""
    implementation: str = ""
    """what ran, not what was asked for"""
    reasons: tuple[str, ...] = ()
    started: str = ""
    """UTC, ISO 8601"""
    commit: str = ""
    """of the checkout that ran, with `+` where it had uncommitted changes"""
    command: str = ""
    """runs this cell again"""
    budget: tuple[int, ...] = ()
    """hidden units a query that a suite or `--budget` asked for and that set the parameters; several where they gave the same ones"""
    input_hash: str = ""
    """of the bytes of q, k, v"""
    flops: int | None = None
    """work of the whole call by the method's cost model"""
    bytes: int | None = None
    """compulsory memory traffic by the method's cost model"""
    learned: int = 0
    """learned parameters of the operator, run as initialised"""
    timing: Timing | None = None
    memory: Memory | None = None
    breakdown: Breakdown | None = None
    """where it was asked for"""
    energy: Energy | None = None
    """where it was asked for and the GPU reports it"""
    gate: Gate | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """results of the task other than time and memory"""
    training: Training | None = None
    """where the task trains a model"""
    wanted_bytes: int | None = None
    """allocation that failed, for `oom`"""
    limit_s: float | None = None
    """time allowed, for `timeout`"""
    kept_steps: int | None = None
    """for `timeout` of a cell that trains: steps that its checkpoints hold, where this attempt added to them; resumed, it goes on there"""

    def __post_init__(self) -> None:
        if (self.timing or self.memory or self.metrics or self.breakdown or self.energy) and self.status is not Status.OK:
            raise ValueError(f"a record with status {self.status} may not hold measurements")

    def to_json(self) -> str:
        """One line."""
        return self._line(float)

    def rounded(self) -> Record:
        """With what was measured to `DIGITS` significant digits, as a sweep keeps it; the case as it is."""
        return Record.from_json(self._line(_shortened))

    def _line(self, number: Callable[[float], float]) -> str:
        data = {"schema": SCHEMA, "case_id": self.case.case_id, **_finite(asdict(self), number)}
        data = {k: v for k, v in data.items() if v is not None or k not in ("training", "energy", "kept_steps")}
        return json.dumps(data | {"case": _finite(self.case.as_dict(), float)}, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read one line. Raises `UserError` for another schema, `ValueError` for a torn line."""
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("not a record")  # noqa: TRY004 (a torn line is a bad value)
        if data.get("schema") != SCHEMA:
            raise UserError(
                f"record has schema {data.get('schema')}, this version reads {SCHEMA}: use the version that wrote it, or start a new folder"
            )
        parts = {"timing": Timing, "memory": Memory, "gate": Gate, "breakdown": Breakdown, "energy": Energy}
        values = {f.name: _restored(data[f.name]) for f in fields(cls) if f.name in data}
        for name, kind in parts.items():
            if values.get(name) is not None:
                values[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[name].items()})
        if values.get("training") is not None:
            values["training"] = Training.from_dict(values["training"])
        return cls(
            **{
                **values,
                "case": Case.from_dict(data["case"]),
                "status": Status(values["status"]),
                "reasons": tuple(values["reasons"]),
                "budget": tuple(values.get("budget", ())),
            }
        )


def _shortened(value: float) -> float:
    return value if value.is_integer() else float(f"{value:.{DIGITS}g}")


def _finite(value: Any, number: Callable[[float], float]) -> Any:
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _finite(v, number) for k, v in value.items()}
    return [_finite(v, number) for v in value] if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {k: _restored(v) for k, v in value.items()}
    return [_restored(v) for v in value] if isinstance(value, list) else value
