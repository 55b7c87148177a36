"""Sizes of a call, and the hyper-parameters of a method: declared with their units and bounds, parsed and checked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_origin, get_type_hints

from attnbench.errors import UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call."""

    batch: int
    heads: int
    n: int
    """queries"""
    dim: int
    """head dimension of q and k"""
    kv_heads: int = 0
    """heads of k and v; 0 means as many as `heads`"""
    keys: int = 0
    """keys; 0 means as many as queries"""
    dim_v: int = 0
    """head dimension of v; 0 means `dim`"""

    def __post_init__(self) -> None:
        for name, default in (("kv_heads", self.heads), ("keys", self.n), ("dim_v", self.dim)):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, default)
        for f in fields(self):
            if getattr(self, f.name) < 1:
                raise UserError(f"{f.name} = {getattr(self, f.name)} is not a size: give a whole number of at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Self:
        """The shape of a call with these tensors. Raises `UserError` where they do not fit together."""
        if not (q.ndim == k.ndim == v.ndim == 4):
            raise UserError(f"q, k, v must be [B, H, N, D]: got {q.ndim}, {k.ndim} and {v.ndim} dimensions")
        if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise UserError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit [B, H, N, D]")
        return cls(q.shape[0], q.shape[1], q.shape[2], q.shape[3], k.shape[1], k.shape[2], v.shape[3])


def param(default: Any, doc: str, *, unit: str = "", low: float | None = None, at_most: str = "") -> Any:
    """A field of a `Params` dataclass.

    `low` is the smallest legal value; `at_most` names the size of `Shape` that it may not exceed.
    """
    return field(default=default, metadata={"doc": doc, "unit": unit, "low": low, "at_most": at_most})


@dataclass(frozen=True, kw_only=True)
class Params:
    """Hyper-parameters of a method; a method adds its own fields with `param`."""

    causal: bool = param(False, "a query reads only keys at or before its own position")

    @classmethod
    def parse(cls, values: Mapping[str, object], owner: str = "") -> Self:
        """Make parameters from named values. Strings are converted. Raises `UserError` naming the culprit."""
        hints = _HINTS.get(cls) or _HINTS.setdefault(cls, get_type_hints(cls))
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("parameter", name, known, owner)
        converted: dict[str, Any] = {name: _convert(name, value, hints[name], owner) for name, value in values.items()}
        return cls(**converted)

    def problems(self, shape: Shape) -> list[str]:
        """Why these values make no sense at `shape`; empty when they do. Methods extend it."""
        found = []
        for f in fields(self):
            value, low, most = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("at_most")
            if low is not None and value < low:
                found.append(f"{f.name} = {value} is below its least value {low}")
            if most and value > getattr(shape, most):
                name = {"n": "N", "keys": "M (keys)"}.get(most, most)
                found.append(f"{f.name} = {value} exceeds {name} = {getattr(shape, most)}: lower {f.name}")
        return found

    def fitted(self, shape: Shape) -> Self:
        """These parameters with every bounded value clamped to `shape`."""
        bounded = {f.name: f.metadata["at_most"] for f in fields(self) if f.metadata.get("at_most")}
        return replace(self, **{name: min(getattr(self, name), getattr(shape, most)) for name, most in bounded.items()})

    def as_dict(self) -> dict[str, Any]:
        """Field -> value, every field, defaults included."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_HINTS: dict[type, dict[str, Any]] = {}


def _convert(name: str, value: object, hint: Any, owner: str) -> object:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(f"value of {owner}.{name}" if owner else f"value of {name}", value, map(str, get_args(hint)))
        return value
    text = str(value).strip()
    if hint is bool and (isinstance(value, bool) or text.lower() in {"true", "false"}):
        return value if isinstance(value, bool) else text.lower() == "true"
    if hint in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return hint(text)
    if hint is str and isinstance(value, str):
        return value
    raise UserError(f"{owner + '.' if owner else ''}{name} = {value!r} is not of type {hint.__name__}")
