"""What a cell answers beside time and memory: task name -> function of its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.tasks import fidelity, health

if TYPE_CHECKING:
    from collections.abc import Callable


def speed(*_: object, **__: object) -> dict[str, float]:
    """Time and memory are all that is asked."""
    return {}


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    "speed": speed,
    "fidelity": fidelity.measure,
    "health": health.measure,
}
"""Task -> `(method, params, inputs, weights, *, forward, layout) -> metrics`; `forward` runs the implementation in its own layout."""
