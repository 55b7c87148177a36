"""What one attempt at one case left behind: the schema of the results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from attnbench.case import Case
from attnbench.errors import UserError
from attnbench.trials import Training

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
