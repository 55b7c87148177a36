"""One case in this process: supported? correct? then warm, time, measure. Runs inside a worker."""

from __future__ import annotations

import gc
import os
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbench import check, energy, environment, inputs, memory, timing
from attnbench.case import TRAINED
from attnbench.errors import UserError, raised
from attnbench.isolate import Reply, limit_host_memory
from attnbench.record import Record, Status
from attnbench.registry import add_plugins
from attnbench.stats import median
from attnbench.tasks import TASKS
from attnbench.tasks.accuracy import run as run_trained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from attnbench.case import Case
    from attnbench.method import Implementation, Method, Params, Weights
    from attnbench.protocol import Protocol

_SLOW_S = 2.0
"""calls slower than this are not repeated to see whether they are deterministic"""
ENVIRONMENT = "environment"
"""Message that asks a worker what it runs on."""


@dataclass
class Bound:
    """A method, an implementation, parameters and inputs, ready to be called again and again."""

    function: Callable[..., Tensor]
    params: Params
    leaves: tuple[Tensor, ...]
    """q, k, v in the implementation's own layout"""
    weights: Weights
    """learned parameters, which are differentiated too"""
    gradient: Tensor | None
    """gradient of the output, where a backward pass is wanted"""

    @classmethod
    def of(
        cls, method: Method, implementation: Implementation, params: Params, tensors: inputs.Inputs, weights: Weights, *, backward: bool
    ) -> Bound:
        """Convert layouts and draw the output's gradient, before any clock starts."""
        swap = implementation.layout == "bnhd"
        q, v = tensors[0], tensors[2]
        leaves = tuple((x.transpose(1, 2) if swap else x).detach().clone(memory_format=torch.contiguous_format) for x in tensors)
        gradient = None
        if backward:
            gradient = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
            gradient = gradient.transpose(1, 2).contiguous() if swap else gradient
        own = {name: x.detach().clone().requires_grad_(backward) for name, x in weights.items()}
        function: Callable[..., Tensor] = method.function(implementation)
        if method.weights and not own:  # implementations take weights also where these parameters have none
            function = partial(function, weights=own)
        return cls(function, params, tuple(x.requires_grad_(backward) for x in leaves), own, gradient)

    def forward(self) -> Tensor:
        """The output; with a graph only where a backward pass is wanted."""
        with torch.set_grad_enabled(self.gradient is not None):
            return self.function(*self.leaves, self.params, **({"weights": self.weights} if self.weights else {}))

    def backward(self, output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and of learned parameters, into fresh buffers: nothing is accumulated."""
        return torch.autograd.grad(output, (*self.leaves, *self.weights.values()), self.gradient, allow_unused=True)

    def __call__(self) -> object:
        """The whole call, as the mode wants it."""
        output = self.forward()
        return output if self.gradient is None else (output, self.backward(output))

    def copy(self) -> Bound:
        """The same call on inputs of its own; learned parameters are shared."""
        return replace(self, leaves=tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in self.leaves))

    @property
    def input_bytes(self) -> int:
        """q, k, v, learned parameters, and the output's gradient."""
        return sum(x.nbytes for x in (*self.leaves, *self.weights.values(), *([] if self.gradient is None else [self.gradient])))


@dataclass
class CellRunner:
    """Runs cases one after another on a device; keeps the last inputs, since neighbouring cells share them, and for a GPU earlier ones."""

    device: str
    protocol: Protocol
    monitor: environment.Monitor | None = None
    checkpoints: Path | None = None
    """folder of models that are trained; None keeps none"""
    _key: tuple[Any, ...] = ()
    _inputs: tuple[inputs.Inputs, str] | None = field(default=None, repr=False)
    _meter: energy.Meter | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._drawn = inputs.Drawn.beside(self.device)

    def __call__(self, message: Case | str) -> Reply:
        """Answer one message of the parent."""
        if message == ENVIRONMENT:
            return Reply(facts(self.device, self.protocol.timed))
        assert not isinstance(message, str), f"unknown message {message}"
        record = self.attempt(message)
        gc.collect()
        if self.device == "cuda" and record.status is not Status.ERROR:
            torch.cuda.empty_cache()
        return Reply(record, reusable=record.status not in (Status.ERROR, Status.OOM))

    def attempt(self, case: Case) -> Record:
        """Run one case; whatever goes wrong becomes its status."""
        try:
            return self.run(case)
        except UserError as error:
            return Record(case, Status.ERROR, "", reasons=(str(error),))
        except (torch.OutOfMemoryError, MemoryError) as error:
            return _out_of_memory(case, error)
        except Exception as error:  # a cell may raise anything and must not end the sweep
            if "can't allocate memory" in str(error) or "out of memory" in str(error).lower():
                return _out_of_memory(case, error)
            return Record(case, Status.ERROR, "", reasons=(raised(error),))

    def run(self, case: Case) -> Record:
        """Run one case. Raises whatever the implementation raises."""
        if case.task == TRAINED:
            return run_trained(case, self.device, self.checkpoints)
        method, params = case.resolve()
        dtype, backward = getattr(torch, case.dtype), case.mode == "forward+backward"
        chosen, why = method.choose(case.shape, dtype, self.device, params, backward=backward, graph=case.graph)
        if chosen is None:
            return Record(case, Status.UNSUPPORTED, "", reasons=tuple(why))
        tensors, digest = self._draw(case, dtype)
        weights = method.initial(case.shape, params, tensors[0], case.seed)
        cost = method.cost(case.shape, params)
        record = Record(
            case,
            Status.OK,
            "",
            chosen.name,
            input_hash=digest,
            flops=cost.total(case.mode),
            bytes=cost.bytes(dtype.itemsize, case.mode),
            learned=sum(x.numel() for x in weights.values()),
        )
        bound = Bound.of(method, chosen, params, tensors, weights, backward=backward)
        first_call_s = self._timed_once(bound)
        repeat = first_call_s < _SLOW_S
        verdict = check.gate(method, chosen, params, tensors, weights, backward=backward, rows=self.protocol.gate_rows, repeat=repeat)
        if not verdict.passed:
            return replace(record, status=Status.INCORRECT, gate=verdict, reasons=_excess(verdict.errors, verdict.bounds))
        metrics = TASKS[case.task](method, params, tensors, weights, forward=bound.forward, layout=chosen.layout)
        usage = memory.measure(bound.forward, bound.backward if backward else None, bound.input_bytes, self.device)
        record = replace(record, gate=verdict, metrics=metrics, memory=usage)
        if not self.protocol.timed:
            return record
        taken = timing.measure(self._clock(case, bound), self.protocol, first_call_s, self.monitor)
        record = replace(record, timing=taken)
        return self._metered(record, bound, median(taken.samples_s)) if self.protocol.energy else record

    def _metered(self, record: Record, bound: Bound, time_s: float) -> Record:
        """The record with the energy of a call, or with the reason why there is none; its measurements stand either way."""
        try:
            self._meter = self._meter or energy.Meter.of(self.monitor)
            return replace(record, energy=energy.measure(bound, self._meter, time_s))
        except energy.EnergyUnknownError as error:
            return replace(record, reasons=(*record.reasons, f"{energy.ABSENT}: {error}"))

    def _draw(self, case: Case, dtype: torch.dtype) -> tuple[inputs.Inputs, str]:
        key = (case.profile, case.shape, case.seed, dtype)
        if self._inputs is None or key != self._key:
            self._inputs = None  # freed before others are made
            self._key, self._inputs = key, self._drawn(*key, self.device)
        return self._inputs

    def _timed_once(self, bound: Bound) -> float:
        start = time.perf_counter()
        bound()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _clock(self, case: Case, bound: Bound) -> timing.Clock:
        cold = case.l2 == "cold"
        if self.device == "cpu":
            return timing.CpuClock(bound, cold=cold)
        if case.graph:
            copies = timing.copies_to_outgrow_cache(bound.input_bytes) if cold else 1
            return timing.GraphClock([bound, *(bound.copy() for _ in range(copies - 1))])
        return timing.CudaClock(bound, cold=cold)


def setup(device: str, protocol: Protocol, plugins: tuple[Path, ...], checkpoints: Path | None = None, number: int = 0) -> CellRunner:
    """Make a worker ready: plugins, NVML, and on the CPU a memory limit and one core left to the rest of the machine.

    `number` tells workers beside each other apart: they take the GPUs that are alike in turn.
    """
    add_plugins(plugins)
    if device == "cpu":
        limit_host_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # a thread that waits for a busy core would be timed waiting
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
        return CellRunner(device, protocol, checkpoints=checkpoints)
    torch.cuda.init()
    torch.cuda.set_device(_gpu(number))
    return CellRunner(device, protocol, environment.Monitor(), checkpoints)


def _gpu(number: int) -> int:
    """The GPU of a worker, among those of the same kind as the first, whose environment all records name."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    alike = [i for i, name in enumerate(names) if name == names[0]]
    return alike[number % len(alike)]


def facts(device: str, timed: bool = True) -> dict[str, Any]:
    """The environment with its id, and the ceilings measured now; none where nothing is timed, as others may then be at work beside it."""
    collected = environment.collect(device)
    ceilings = {"ceilings": environment.ceilings(device)} if timed else {}
    return {**collected, "env_id": environment.env_id(collected), **ceilings}


def _excess(errors: Any, bounds: Any) -> tuple[str, ...]:
    return tuple(f"{key} = {errors[key]:.3g}, at most {bounds[key]:.3g}" for key in errors if not errors[key] <= bounds[key])


_SIZES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def _out_of_memory(case: Case, error: BaseException) -> Record:
    text = str(error)
    match = re.search(r"[Tt]ried to allocate (?:more than )?([\d.]+) ?([KMGT]i)?B?(?:ytes)?", text)
    wanted = int(float(match[1]) * _SIZES[match[2] or ""]) if match else None
    lines = text.strip().splitlines()
    return Record(case, Status.OOM, "", reasons=(lines[0][:300] if lines else "out of memory",), wanted_bytes=wanted)
