"""How a stage looks: one colour each, in every figure."""

from __future__ import annotations

from typing import Any

from matplotlib.colors import to_hex, to_rgb

from attnbench.stages import GRADIENT

COLOURS = {
    "project": "#661100",
    "pool": "#88CCEE",
    "state": "#6699CC",
    "score": "#DDCC77",
    "probe": "#999933",
    "compress": "#117733",
    "invert": "#AA4466",
    "select": "#CC6677",
    "route": "#AA4499",
    "permute": "#44AA99",
    "gather": "#882255",
    "attend": "#332288",
    "merge": "#E69F00",
    "backward": "#777777",
    "other": "#CCCCCC",
}
"""Paul Tol's qualitative scheme of twelve colours, made for colour-blind readers, an orange of Okabe and Ito's, and two greys."""

GAPS = "launch gaps"
"""What a call takes beyond its kernels."""


def fill(stage: str) -> dict[str, Any]:
    """Patch properties of a stage; its backward pass has a lighter tone of its colour, launch gaps are hatched."""
    if stage == GAPS:
        return {"facecolor": "white", "edgecolor": "#888888", "hatch": "//////", "linewidth": 0.3}
    return {"facecolor": colour(stage), "edgecolor": "white", "linewidth": 0.3}


def colour(stage: str) -> str:
    """Colour of a stage."""
    base = COLOURS[stage.removesuffix(GRADIENT)]
    if not stage.endswith(GRADIENT):
        return base
    red, green, blue = (c + 0.5 * (1 - c) for c in to_rgb(base))
    return to_hex((red, green, blue))
