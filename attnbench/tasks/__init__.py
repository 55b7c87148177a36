"""What a cell answers beside time and memory: task name -> function of its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.tasks import fidelity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from attnbench.inputs import Inputs
    from attnbench.method import Method, Params


def speed(*_: object) -> dict[str, float]:
    """Time and memory are all that is asked."""
    return {}


TASKS: dict[str, Callable[[Method, Params, Inputs, Callable[[], Tensor], str], dict[str, float]]] = {
    "speed": speed,
    "fidelity": fidelity.measure,
}
"""Task -> `(method, params, inputs, forward, layout) -> metrics`."""
