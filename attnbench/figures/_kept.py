"""Maps of the tokens that experts keep, layer by layer, over the pictures that a trained model was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba

from attnbench.errors import UserError
from attnbench.figures._examples import picture
from attnbench.figures._style import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnbench.tasks.routing import Layer
    from attnbench.tasks.trained import Batch, TrainedTask


DROPPED, OPACITY = "#D55E00", 0.75
"""Colour over tokens that no expert keeps, and how strong it is where no head keeps one."""


def shares(task: TrainedTask, batch: Batch, layers: Sequence[Layer]) -> np.ndarray:
    """Share of heads in which at least one expert keeps a token, `[L, B, H, W]`; class and register tokens are left out.

    Raises `UserError` where tokens lie on no grid, or experts hold no tokens.
    """
    n = batch.inputs.shape[1]
    sides = task.grid(n)
    if sides is None:
        raise UserError(f"examples of {task.name} are sequences, not pictures: choose a model of pathfinder, digits or images")
    kept = [layer.kept for layer in layers if layer.kept is not None]
    if not kept:
        raise UserError("no layer of this model has experts that hold tokens: nothing is kept or pruned")
    return np.stack([x[:, :, x.shape[2] - n :].double().mean(1).reshape(-1, *sides).cpu().numpy() for x in kept])


def data(task: TrainedTask, batch: Batch, layers: Sequence[Layer]) -> pd.DataFrame:
    """What is drawn: a row for each layer, example and token."""
    maps = shares(task, batch, layers)
    axes = np.unravel_index(np.arange(maps.size), maps.shape)
    return pd.DataFrame(dict(zip(("layer", "example", "row", "column"), axes, strict=True)) | {"kept": maps.flatten()})


def build(task: TrainedTask, batch: Batch, layers: Sequence[Layer]) -> Figure:
    """A row an example: its picture, then once a layer with colour over what experts drop, full where no head keeps a token."""
    maps = shares(task, batch, layers)
    depth, count = maps.shape[:2]
    side = WIDTHS[2] / (depth + 1)
    figure, axes = plt.subplots(count, depth + 1, figsize=(WIDTHS[2], count * side + 0.3), squeeze=False, layout="constrained")
    for example, row in enumerate(axes):
        image = picture(task, batch.inputs[example].numpy(), batch.inputs.shape[1])
        shade(row[0], image, None)
        for panel, kept in zip(row[1:], maps[:, example], strict=True):
            shade(panel, image, kept)
    axes[0, 0].set_title(task.title, fontsize=6, pad=2)
    for number, panel in enumerate(axes[0, 1:]):
        panel.set_title(f"layer {number}: {1 - maps[number].mean():.0%} pruned", fontsize=6, pad=2)
    return figure


def shade(axes: Axes, image: np.ndarray | None, kept: np.ndarray | None) -> None:
    """A picture `[H, W]` or `[H, W, 3]`, if any, under a colour as strong as the share of heads that drop a token, `1 - kept`."""
    if image is not None:
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if kept is not None:
        dropped = np.broadcast_to(to_rgba(DROPPED), (*kept.shape, 4)).copy()
        dropped[..., 3] = OPACITY * (1 - kept)
        axes.imshow(dropped, interpolation="nearest")
    axes.set_axis_off()
