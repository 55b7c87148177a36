"""Implementations of a method: what they can run, and how they are found and imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Literal

from attnbench.params import Params, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

EAGER = "eager"
"""Name of the implementation that every method has: its own reference."""


@dataclass(frozen=True)
class Limits:
    """What a method or an implementation can run, as data."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    max_dim: int | None = None
    """largest head dimension"""
    dim_multiple: int = 1
    """head dimensions must be multiples of this"""
    gqa: bool = True
    """fewer key heads than query heads"""
    value_dim: bool = True
    """a head dimension of v other than that of q"""
    cross: bool = False
    """a number of keys other than that of queries"""
    no_causal: str = ""
    """why there is no causal form; empty where there is one"""
    no_backward: str = ""
    """why there is no backward pass; empty where there is one"""
    no_graph: str = ""
    """why it cannot be captured in a CUDA graph; empty where it can"""
    extra: Callable[[Shape, Params, torch.dtype, str], list[str]] | None = None
    """further reasons"""

    def reasons(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: str,
        params: Params | None = None,
        *,
        backward: bool = False,
        graph: bool = False,
    ) -> list[str]:
        """Why such a call is not supported; empty means it is. `device` is a type: `cpu` or `cuda`."""
        p = params or Params()
        name = str(dtype).removeprefix("torch.")
        checks = (
            (device not in self.devices, f"runs on {' and '.join(self.devices)} only, not on {device}"),
            (name not in self.dtypes, f"takes {', '.join(self.dtypes)}, not {name}"),
            (self.max_dim is not None and max(shape.dim, shape.dim_v) > (self.max_dim or 0),
             f"head dimension {max(shape.dim, shape.dim_v)} exceeds {self.max_dim}"),
            (bool(shape.dim % self.dim_multiple or shape.dim_v % self.dim_multiple),
             f"head dimension {shape.dim} is not a multiple of {self.dim_multiple}"),
            (not self.gqa and shape.kv_heads != shape.heads,
             f"needs as many key heads as query heads, not {shape.kv_heads} for {shape.heads}"),
            (not self.value_dim and shape.dim_v != shape.dim, f"needs Dv = D, not {shape.dim_v} and {shape.dim}"),
            (not self.cross and shape.keys != shape.n, f"needs as many keys as queries, not {shape.keys} for {shape.n}"),
            (p.causal and bool(self.no_causal), f"no causal form: {self.no_causal}"),
            (backward and bool(self.no_backward), f"no backward pass: {self.no_backward}"),
            (graph and bool(self.no_graph), f"no CUDA graph: {self.no_graph}"),
        )  # fmt: skip
        found = [reason for fails, reason in checks if fails]
        return found + (self.extra(shape, p, dtype, device) if self.extra else [])


@dataclass(frozen=True)
class Implementation:
    """One way to run a method: `target` names a function `(q, k, v, params) -> Tensor`, imported when first run.

    Of a method with learned parameters it is `(q, k, v, params, weights=...)`.
    """

    name: str
    target: str
    """`package.module:function`"""
    limits: Limits = Limits()
    requires: tuple[str, ...] = ()
    """packages that must be importable"""
    operators: tuple[str, ...] = ()
    """torch operators (`aten::...` or `library::...`) of which at least one must be dispatched when this runs"""
    witness: str = ""
    """`package.module:function` of `(q, k, v, params) -> str`, naming the operator where torch does not dispatch it"""
    layout: Literal["bhnd", "bnhd"] = "bhnd"
    """`bnhd`: the function takes and returns `[B, N, H, D]`; inputs are converted before any clock starts"""
    note: str = ""
    backward_reasons: Callable[[Shape], list[str]] | None = field(default=None, hash=False)
    """why the gradients of such a call may be wrong: where there is a reason, one with a backward pass runs only pinned"""
    stages: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """stage of `attnbench.stages` -> parts of the names of the kernels that do it; where several match, the longest counts"""

    def load(self) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        """Import the function. Raises `ImportError`."""
        function: Callable[[Tensor, Tensor, Tensor, Any], Tensor] = resolve(self.target)
        return function

    def missing(self) -> str:
        """Why it cannot be imported here; empty when it can."""
        return self._unimportable()[0]

    def broken(self) -> str:
        """Why it cannot be imported where no package of `requires` is the reason, so that the implementation itself is at fault."""
        why, excused = self._unimportable()
        return "" if excused else why

    def _unimportable(self) -> tuple[str, bool]:
        """Why it cannot be imported, and whether a package that it requires is absent, or fails as it is imported."""
        for package in self.requires:
            if importlib.util.find_spec(package) is None:
                return f"package {package.replace('_', '-')} is not installed", True
        try:
            self.load()
        except Exception as error:  # a broken optional package may raise anything at import
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'import failed'}"
            return why, not _failing(error).isdisjoint(self.requires)
        return "", False


def _failing(error: Exception) -> set[str]:
    """Packages that were being imported when this was raised, or of which something was that they lack."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    names += [error.name] if isinstance(error, ImportError) and error.name else []
    return {name.partition(".")[0] for name in names}


def resolve(target: str) -> Any:
    """The object that `package.module:name` names. Raises `ImportError`."""
    module, _, name = target.partition(":")
    if module not in sys.modules:  # `torch.compile` traces what follows, and no import
        importlib.import_module(module)
    return getattr(sys.modules[module], name)
