"""Energy per token where the GPU reports it: against sequence length, or of one length a row a method, the thriftiest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench.figures import _ranked
from attnbench.figures._facets import Facets

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from matplotlib.figure import Figure

NAME = "energy"
_CELL = ["mode", "label", "params", "n"]


class Metered(Facets):
    """Energy is metered where it was asked for: modes and lengths without any are left out, and what failed there with them."""

    def _points(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        """As of other metrics, with the column `joules_per_call`."""
        points = super()._points(rows)
        metered = {(p["panel"], p["n"]) for p in points if p["status"] == "ok"}
        known: Any = rows[rows["replicate"] == 0].groupby(_CELL)["energy_j"].median() if "energy_j" in rows else {}
        return [
            {**p, "joules_per_call": known.get((p["panel"], p["label"], p["params"], p["n"]), np.nan)}
            for p in points
            if (p["panel"], p["n"]) in metered
        ]

    def _drawing(self, drawn: pd.DataFrame) -> Callable[..., Figure]:
        return _ranked.draw if self._single(drawn) else super()._drawing(drawn)

    def _single(self, drawn: pd.DataFrame) -> bool:
        return _ranked.fits(drawn)


_FACETS = Metered("energy", by="mode", task="speed")
data, build = _FACETS.data, _FACETS.build
