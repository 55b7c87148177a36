"""Examples of a task whose tokens lie on a grid, as pictures with their classes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd

from attnbench.errors import UserError
from attnbench.figures._style import WIDTHS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from attnbench.tasks.trained import Batch, TrainedTask

COUNT, _ACROSS = 16, 8


def data(task: TrainedTask, n: int) -> pd.DataFrame:
    """What is drawn: the first test examples, each with its class, its slice and a hash of all. Raises `UserError` for a sequence."""
    batch = _batch(task, n)
    columns = {"class": batch.targets.tolist(), task.group: batch.groups.tolist()}
    return pd.DataFrame({"task": task.name, "n": n, "example": range(COUNT), **columns, "hash": batch.digest})


def build(task: TrainedTask, n: int) -> Figure:
    """Two rows of eight pictures, as wide as a page. Raises `UserError` for a sequence and for N that is no grid of the task."""
    batch = _batch(task, n)
    down = math.ceil(COUNT / _ACROSS)
    side = WIDTHS[2] / _ACROSS
    figure, axes = plt.subplots(down, _ACROSS, figsize=(WIDTHS[2], down * (side + 0.16)), layout="constrained")
    for panel, tokens, label in zip(axes.flat, batch.inputs, batch.targets.tolist(), strict=True):
        panel.imshow(picture(task, tokens.numpy(), n), cmap="gray", interpolation="nearest")
        panel.set_title(str(label), fontsize=6, pad=2)
        panel.set_axis_off()
    return figure


def picture(task: TrainedTask, tokens: np.ndarray, n: int) -> np.ndarray:
    """The picture of an example, `[H, W]` or `[H, W, 3]` in [0, 1], from its tokens `[N]` or `[N, F]`."""
    height, width = _grid(task, n)
    if task.kind == "image":
        patch = math.isqrt(task.features // 3)
        folded = tokens.reshape(height, width, 3, patch, patch).transpose(0, 3, 1, 4, 2)
        tokens = folded.reshape(height * patch, width * patch, 3)
    else:
        tokens = tokens.reshape(height, width)
    low, high = float(tokens.min()), float(tokens.max())
    shown: np.ndarray = (tokens - low) / (high - low or 1.0)
    return shown


def _grid(task: TrainedTask, n: int) -> tuple[int, int]:
    sides = task.grid(n)
    if sides is None:
        raise UserError(f"examples of {task.name} are sequences, not pictures: choose pathfinder, digits or images:PATH")
    return sides


def _batch(task: TrainedTask, n: int) -> Batch:
    _grid(task, n)
    return task.batch("test", 0, COUNT, n, 0)
