"""The model of a case that trains: whether its method can be trained on a task, how the model is built, and how it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnbench.errors import UserError
from attnbench.nn import Architecture, TinyTransformer, built, told
from attnbench.recipe import DEIT, DROP_PATH, Recipe
from attnbench.tasks import trained

if TYPE_CHECKING:
    from attnbench.case import Case
    from attnbench.tasks.trained import TrainedTask

_DTYPES = ("float32", "bfloat16")
EXAMPLES = 1 << 17
"""training examples of a task that draws them: as many as published, which is 100k (mqar), 96k (listops) and 128k (pathfinder)"""


def reasons(case: Case, task: TrainedTask, device: str) -> list[str]:
    """Why a method cannot be trained on a task; empty where it can."""
    method, params = case.resolve()
    found = [] if case.dtype in _DTYPES else [f"models train in {' or '.join(_DTYPES)}, not in {case.dtype}"]
    if params.causal not in task.forms():
        need, have = ("causal", "reads later tokens") if task.causal else ("bidirectional", "reads no later token")
        found.append(f"{task.name} is a {need} task, and {case.label} with causal = {str(params.causal).lower()} {have}")
    chosen, why = method.choose(case.shape, getattr(torch, case.dtype), device, params, backward=not case.trained_with)
    if case.model != "small":
        try:
            told(method, 1, task.grid(case.n), causal=params.causal)
        except UserError as error:
            found.append(f"{error}, as model = small has it")
    return found + ([] if chosen else why)


def architecture(case: Case, task: TrainedTask) -> Architecture:
    """The model of a case."""
    params = dict(case.params)
    return Architecture(
        method=case.label,
        params=params,
        vocabulary=task.vocabulary,
        features=task.features,
        classes=task.classes,
        tokens=case.n,
        grid=task.grid(case.n),
        dim=case.heads * case.dim,
        heads=case.heads,
        depth=case.depth,
        positions=case.positions,  # type: ignore[arg-type]
        short_conv=case.short_conv,
        causal=bool(params.get("causal", False)),
        per_token=task.per_token,
        class_token=case.model != "small",
        qkv_bias=case.model != "small",
        drop_path=DROP_PATH if case.recipe == "deit" else 0.0,
        library="timm" if case.model == "timm" else "",
    )


def recipe(case: Case, rate: float) -> Recipe:
    """How a case is trained at one learning rate."""
    settings = DEIT if case.recipe == "deit" else {}
    plain = Recipe(steps=case.steps, rate=rate, batch=case.batch, n=case.n, seed=case.seed, autocast=case.dtype == "bfloat16", **settings)
    return plain if trained.folder(case.data) else replace(plain, examples=trained.get(case.data).examples or EXAMPLES)


def fresh(case: Case, task: TrainedTask) -> TinyTransformer:
    """The model of a case, initialised from the case's seed; torch's random state goes on from there."""
    torch.manual_seed(case.seed)
    return built(architecture(case, task))


def implementation(case: Case, device: str) -> str:
    """Name of the implementation that runs in the model of a case; empty where none can."""
    method, params = case.resolve()
    chosen, _ = method.choose(case.shape, getattr(torch, case.dtype), device, params, backward=not case.trained_with)
    return chosen.name if chosen else ""


def why_eager(case: Case, device: str) -> str:
    """Why a step of this case cannot be captured in a CUDA graph; empty where it can."""
    method, params = case.resolve()
    dtype = getattr(torch, case.dtype)
    chosen, _ = method.choose(case.shape, dtype, device, params, backward=True)
    found = method.reasons(chosen, case.shape, dtype, device, params, backward=True, graph=True) if chosen and device != "cpu" else []
    return "; ".join(found)
