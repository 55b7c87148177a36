"""A case: one cell of a sweep, its identity, and what the words in its fields mean."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnbench.errors import UserError, unknown
from attnbench.method import Shape
from attnbench.registry import get
from attnbench.tasks import trained

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnbench.method import Method, Params

TRAINED = "accuracy"
"""The task that trains a model; it alone reads the fields of a case from `data` on."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: everything that determines a number, and nothing else."""

    task: str
    method: str
    implementation: str = ""
    """as asked for; empty means the best supported"""
    params: tuple[tuple[str, Any], ...] = ()
    """every hyper-parameter, defaults included, by name"""
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0
    n: int = 1024
    dim: int = 64
    dim_v: int = 0
    dtype: str = "float32"
    mode: str = "forward"
    profile: str = "randn"
    """how q, k, v are drawn; `file:PATH` reads them"""
    seed: int = 0
    l2: str = "cold"
    """whether the GPU's second-level cache is flushed before each timed call"""
    graph: bool = False
    """whether a captured CUDA graph is timed, which leaves launch overhead out"""
    replicate: int = 0
    """above 0: the same cell measured again, for the noise floor"""
    data: str = ""
    """the trained task, such as `mqar`; width is `heads` times `dim`, and `batch`, `n`, `dtype` and `seed` are those of training"""
    steps: int = 0
    """updates of the weights, at most"""
    depth: int = 0
    """blocks of the model"""
    rates: str = ""
    """learning rates that are tried, as in `3e-4/1e-3`"""
    positions: str = "rotary"
    """how the model knows where a token is"""
    trained_with: str = ""
    """`METHOD` or `METHOD:PARAM=VALUE:...` that the model was trained with, before this case's method took its place; empty for the
    case's own"""
    model: str = "small"
    """`small` averages its tokens; `vit` is a vision transformer with a class token, as DeiT; `timm` is timm's of the same sizes"""
    recipe: str = "small"
    """settings of training that are the same for every method: `small`, or `deit` for images"""
    short_conv: int = 0
    """width of the short convolution between embedding and blocks, 0 for none"""

    @cached_property
    def case_id(self) -> str:
        """Hash of the canonical form."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """JSON form; `Case.from_dict` reads it back.

        Fields of training are left out where they are at their defaults: cases of other tasks keep the ids that they had before there were
        any.
        """
        plain = asdict(self) | {"params": dict(self.params)}
        return {key: value for key, value in plain.items() if key not in TRAINING or value != TRAINING[key]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        """Read the JSON form. Raises `UserError` for fields of another schema, `ValueError` for what is no number."""
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("case field", key, known)
            if key in _NUMBERS and type(data[key]) is not int:
                raise ValueError(f"case field {key} is {data[key]!r}, no whole number")
        return cls(**{**data, "params": tuple(sorted(data["params"].items()))})

    @property
    def label(self) -> str:
        """`method` or `method@implementation`."""
        return f"{self.method}@{self.implementation}" if self.implementation else self.method

    @property
    def shape(self) -> Shape:
        """Sizes of the call."""
        return Shape(self.batch, self.heads, self.n, self.dim, self.kv_heads, 0, self.dim_v)

    @property
    def series(self) -> Case:
        """The same case at every length: cases with equal series differ in n alone."""
        return replace(self, n=0, replicate=0)

    def resolve(self) -> tuple[Method, Params]:
        """The method, pinned as asked, and its parameters. Raises `UserError`."""
        method = get(self.label)
        return method, method.parse(dict(self.params))

    def __str__(self) -> str:
        what = f"{self.data} seed={self.seed}" if self.data else self.mode
        swapped = f" trained with {self.trained_with}" if self.trained_with else ""
        return f"{self.label} N={self.n} {what}{swapped}" + (f" #{self.replicate}" if self.replicate else "")


TRAINING = {f.name: f.default for f in fields(Case)[[f.name for f in fields(Case)].index("data") :]}
"""Field of training -> its default."""
_NUMBERS = frozenset(f.name for f in fields(Case) if f.type == "int")
"""fields that are whole numbers"""


def laid(method: Method, case: Case) -> dict[str, str]:
    """The grid of a trained task's tokens, for a method that asks for it. Raises `UserError` where N is no such grid."""
    if case.task != TRAINED:
        return {}
    sides = trained.get(case.data.partition(":")[0]).grid(case.n)
    return {"grid": f"{sides[0]}x{sides[1]}"} if sides and any(f.name == "grid" for f in fields(method.params)) else {}


def rates(text: str) -> tuple[float, ...]:
    """`3e-4/1e-3` -> the learning rates, smallest first. Raises `UserError`."""
    try:
        found = tuple(sorted({float(x) for x in text.split("/")}))
    except ValueError:
        found = ()
    if not found or not 0 < found[0] <= found[-1] < float("inf"):
        raise UserError(f"rates = {text!r} are no learning rates: write them as 3e-4/1e-3")
    return found


def other_method(text: str) -> tuple[Method, dict[str, str]]:
    """`mita:topk=16:landmarks=25` -> the method and the parameters given. Raises `UserError`."""
    name, *settings = text.split(":")
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [setting for setting, (_, equals, _) in zip(settings, pairs, strict=True) if not equals]:
        raise UserError(f"trained_with = {text!r}: {wrong[0]!r} sets no parameter: write it as METHOD:PARAM=VALUE")
    method, values = get(name), {key: value for key, _, value in pairs}
    method.parse(values)
    return method, values


def names(cases: Iterable[Case], *, params: bool = True) -> dict[Case, str]:
    """Each case in a few words, and what else differs among them: sizes and settings, and with `params` also those of one method."""
    cases = list(cases)
    told = ("method", "implementation", "n", "params", "replicate", "trained_with")
    varied = [f.name for f in fields(Case) if f.name not in told and len({getattr(c, f.name) for c in cases}) > 1]
    values: dict[tuple[str, str], set[Any]] = {}
    for case in cases:
        for key, value in case.params:
            values.setdefault((case.label, key), set()).add(value)

    def more(case: Case) -> dict[str, Any]:
        own = {name: getattr(case, name) for name in varied if name not in (("data", "seed") if case.data else ("mode",))}
        return own | {key: value for key, value in case.params if params and len(values[case.label, key]) > 1}

    return {case: str(case) + "".join(f" {name}={value}" for name, value in more(case).items()) for case in cases}
