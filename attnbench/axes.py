"""Axes of a suite: their names, and what may stand as their values in a file or on the command line."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from attnbench.case import Case, other_method, rates
from attnbench.errors import UserError, unknown
from attnbench.inputs import PROFILES
from attnbench.tasks import trained

if TYPE_CHECKING:
    from collections.abc import Callable

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "mode": ("forward", "forward+backward"),
    "l2": ("cold", "warm"),
    "task": ("speed", "fidelity", "health", "accuracy"),
    "positions": ("rotary", "learned", "none"),
    "model": ("small", "vit", "timm"),
    "recipe": ("small", "deit"),
}
"""Values of the axes that are words."""

CAUSAL = "causal"
"""The axis that is no field of a case: it sets the parameter of that name of every method."""

BUDGET = "budget"
"""The axis that is no field of a case: hidden units that a query is to read. It sets the parameters of every method that can follow it."""

AXES = (*(f.name for f in fields(Case) if f.name not in ("task", "method", "implementation", "params", "replicate")), BUDGET, CAUSAL)
"""Names of all axes."""


def axis_name(name: str, suite: str) -> str:
    """The name, where an axis has it. Raises `UserError`, which names the `suite`."""
    if name not in AXES:
        raise unknown("axis", name, AXES, f"suite {suite}")
    return name


def listed(value: object) -> tuple[Any, ...]:
    """A list as a tuple, and anything else as a tuple of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def axis_values(axis: str, value: object, suite: str) -> tuple[Any, ...]:
    """One value or a list of them, each as a case holds it. Raises `UserError`, which names the `suite`."""
    values = listed(value)
    if not values:
        raise UserError(f"suite {suite}: axis {axis} has no values")
    return tuple(_value(axis, item, suite) for item in values)


def _value(axis: str, item: object, suite: str) -> object:
    if axis in CHOICES:
        if item not in CHOICES[axis]:
            raise unknown(f"value of {axis}", item, CHOICES[axis], f"suite {suite}")
        return item
    if axis == "profile":
        if str(item).partition(":")[0] not in PROFILES:
            raise unknown("profile", item, PROFILES, f"suite {suite}")
        return str(item)
    if axis in _WORDS:
        return _WORDS[axis](str(item))
    if axis in ("graph", CAUSAL):
        if str(item).lower() not in ("true", "false"):
            raise UserError(f"suite {suite}: {axis} = {item!r} must be true or false")
        return str(item).lower() == "true"
    least = 0 if axis in ("seed", "kv_heads", "dim_v", "short_conv") else 1
    try:
        number = int(str(item))
    except ValueError:
        number = least - 1
    if number < least or isinstance(item, bool):
        raise UserError(f"suite {suite}: {axis} = {item!r} must be a whole number of at least {least}")
    return number


def _rates(text: str) -> str:
    return "/".join(f"{rate:g}" for rate in rates(text))


def _data(text: str) -> str:
    """A folder as it is given, and a level that is the plain task by that name, so that its cases are the same."""
    task = trained.get(text)  # which looks into the folder, once
    return text if trained.folder(text) else task.name


def _other(text: str) -> str:
    return text if not text or other_method(text) else ""


_WORDS: dict[str, Callable[[str], str]] = {"data": _data, "rates": _rates, "trained_with": _other}
