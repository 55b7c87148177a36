"""A suite: a question, written as TOML, that expands to cases. Nothing here runs a method."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.errors import UserError, unknown
from attnbench.inputs import PROFILES
from attnbench.method import Shape
from attnbench.registry import get
from attnbench.tasks import trained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from attnbench.method import Method, Params

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

TRAINED = "accuracy"
"""The task that trains a model; it alone reads the fields of a case from `data` on."""

CAUSAL = "causal"
"""The axis that is no field of a case: it sets the parameter of that name of every method."""

BUDGET = "budget"
"""The axis that is no field of a case: hidden units that a query is to read. It sets the parameters of every method that can follow it."""


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
        return {key: value for key, value in plain.items() if key not in _TRAINING or value != _TRAINING[key]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        """Read the JSON form. Raises `UserError` for fields of another schema."""
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("case field", key, known)
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


_TRAINING = {f.name: f.default for f in fields(Case)[[f.name for f in fields(Case)].index("data") :]}
"""Field of training -> its default."""


_LONGEST_S = 2_000_000
"""operating systems count a wait in milliseconds of 31 bits"""


@dataclass(frozen=True)
class Protocol:
    """How long to measure; it changes how sure a number is, not which number is sought."""

    half_width: float = 0.01
    """stop when the 95% interval of the median is narrower than this share of it on each side"""
    budget_s: float = 1.0
    """seconds of timed calls a cell, at most; three samples are always taken"""
    max_samples: int = 200
    timeout_s: float = 120.0
    """seconds a cell may take in all before its worker is replaced"""
    gate_rows: int = 256
    """queries at which an output is held against the float64 definition"""
    aa: bool = True
    """measure one method of each point a second time, for the noise floor"""
    timed: bool = True
    """whether calls are timed; where not, cells may run beside each other"""
    breakdown: bool = False
    """after the clocks, take some calls apart by stage under a profiler"""
    energy: bool = False
    """after the clocks, meter the energy of some calls, where the GPU reports it"""

    def __post_init__(self) -> None:
        for name in ("half_width", "budget_s", "max_samples", "timeout_s", "gate_rows"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("breakdown", "energy"):
            if getattr(self, name) and not self.timed:
                raise UserError(f"{name} is of calls that are timed: leave it out, or time them")
        if self.timeout_s > _LONGEST_S:
            raise UserError(f"timeout_s = {self.timeout_s:g} must be at most {_LONGEST_S:g}, which is 23 days")


@dataclass(frozen=True)
class Entry:
    """One method of a suite; parameters given as lists sweep."""

    name: str
    params: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    """parameters that a budget may not change: those of the command line, and in a suite with budgets those that sweep"""

    @property
    def names(self) -> tuple[str, str]:
        """The name as written, and the method's alone."""
        return self.name, self.name.partition("@")[0]

    def with_params(self, settings: Mapping[str, Mapping[str, object]]) -> Entry:
        """The entry with the parameters that `settings` holds for it, by either name; a budget leaves them alone."""
        own = {k: _listed(v) for n in reversed(self.names) for k, v in settings.get(n, {}).items()}
        return replace(self, params={**self.params, **own}, pinned=self.pinned | own.keys())


@dataclass(frozen=True)
class Suite:
    """A question: methods, axes, and values that are fixed."""

    name: str
    title: str
    question: str
    task: str
    methods: tuple[Entry, ...]
    axes: Mapping[str, tuple[Any, ...]]
    """axis -> values; an axis with one value is fixed"""
    protocol: Protocol = Protocol()
    source: str = ""
    """what `load` was asked for: a name or a path; empty means `name`"""
    points: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    """axes whose values belong together, as a trained task and its lengths: each is a product with `axes`, of which it may replace some"""

    def override(self, axes: Mapping[str, Sequence[object]], methods: Sequence[str], params: Mapping[str, Mapping[str, object]]) -> Suite:
        """The suite with other axis values, only the `methods` named (added where absent), and other method parameters.

        Raises `UserError`, also for a budget that no method can follow.
        """
        changed: dict[str, tuple[Any, ...]] = {_axis(k, self.name): _values(k, v, self.name) for k, v in axes.items()}
        entries = [e for name in methods for e in self._named(name) or [Entry(name)]] if methods else list(self.methods)
        for name in params:
            if not any(name in e.names for e in entries):
                raise unknown("method", name, [e.name for e in entries], self.name)
        if BUDGET in axes and not any(get(e.name).budget for e in entries):
            names = dict.fromkeys(e.name for e in entries)
            why = "".join(f" ({name}: {get(name).no_budget})" for name in names if get(name).no_budget)
            raise UserError(
                f"suite {self.name}: no budget sets what {', '.join(names)} read{why}: leave the budget out, or name a method that has one"
            )
        return replace(
            self, axes={**self.axes, **changed}, points=self._pointed(changed), methods=tuple(e.with_params(params) for e in entries)
        )

    def _pointed(self, changed: Mapping[str, tuple[Any, ...]]) -> tuple[Mapping[str, tuple[Any, ...]], ...]:
        """The points with other values; of a trained task and of a length the points that have it, else the first."""
        kept = self.points
        if "data" in changed and any("data" in point for point in kept):
            having = {name: [point for point in kept if name in point.get("data", ())] or kept[:1] for name in changed["data"]}
            kept = tuple({**point, "data": (name,)} for name, points in having.items() for point in points)
        if "n" in changed:
            kept = tuple({**point, "n": (n,)} for n in changed["n"] for point in _at(kept, n))
        return tuple({k: v if k in ("data", "n") else changed.get(k, v) for k, v in point.items()} for point in kept)

    def _named(self, name: str) -> list[Entry]:
        """Entries called exactly so, else those of the method whatever their implementation."""
        return [e for e in self.methods if e.name == name] or [e for e in self.methods if name in e.names]

    def expand(self) -> tuple[Case, ...]:
        """All cases, shortest first, shuffled within a length so that drift is no method's. Raises `UserError`."""
        return tuple(self.planned())

    def planned(self) -> dict[Case, tuple[int, ...]]:
        """The cases of `expand`, and for each the budgets that it is the answer to; none where they changed nothing. Raises `UserError`."""
        asked: dict[Case, list[int]] = {}
        for entry in self.methods:
            for case, units in self._cases(entry):
                asked.setdefault(case, []).extend([units] if units else [])
        if self.protocol.aa and self.task in ("speed", "health"):
            asked |= {again: asked[case] for case in list(asked) for again in self._replicates(case)}
        cases = list(asked)
        random.Random(self.name).shuffle(cases)
        return {case: tuple(dict.fromkeys(asked[case])) for case in sorted(cases, key=lambda c: c.n)}

    def _cases(self, entry: Entry) -> Iterator[tuple[Case, int]]:
        """Cases of one method, each with the budget that set its parameters, 0 where none did."""
        method = get(entry.name)
        for values in itertools.product(*entry.params.values()):
            given = dict(zip(entry.params, values, strict=True))
            for axes in self._grid():
                units = axes.pop(BUDGET, 0)
                units = units if method.budget else 0
                told = {CAUSAL: axes.pop(CAUSAL)} if CAUSAL in axes else {}
                case = Case(task=self.task, method=method.name, implementation=method.pinned, **axes)
                yield self._settled(case, {**told, **laid(method, case), **given}, units, entry.pinned)

    def _grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of axis values."""
        for point in self.points or ({},):
            axes = {**self.axes, **point}
            for values in itertools.product(*axes.values()):
                yield dict(zip(axes, values, strict=True))

    def _settled(self, case: Case, given: Mapping[str, Any], units: int, pinned: frozenset[str]) -> tuple[Case, int]:
        """The case with its parameters: those given, then those of a budget of `units`; and the budget, 0 where it set none of them.

        Raises `UserError`.
        """
        method = get(case.label)
        params, used = method.parse(given), 0
        if units and method.budget:
            if units > case.shape.keys:
                raise UserError(f"suite {self.name}: budget = {units} exceeds N = {case.n}: lower the budget, or raise N")
            chosen = {k: v for k, v in method.budget(case.shape, params, units).items() if k not in pinned}
            params, used = method.parse({**given, **chosen}), units if chosen else 0
        if problems := params.problems(case.shape):
            raise UserError(f"suite {self.name}: {case.label} at N = {case.n}: {'; '.join(problems)}")
        return replace(case, params=tuple(sorted(params.as_dict().items()))), used

    def _replicates(self, case: Case) -> Iterator[Case]:
        first = get(self.methods[0].name)
        if (case.method, case.implementation) == (first.name, first.pinned):
            yield replace(case, replicate=1)


def _at(points: Sequence[Mapping[str, tuple[Any, ...]]], n: int) -> list[Mapping[str, tuple[Any, ...]]]:
    """The points of a length; of a task that has none, those of the lengths that it has first, and any that names no length."""
    found = []
    for data in dict.fromkeys(point.get("data") for point in points):
        own = [point for point in points if point.get("data") == data]
        having = [point for point in own if n in point.get("n", (n,))]
        found += having or [point for point in own if point["n"] == own[0]["n"]]
    return found


def laid(method: Method, case: Case) -> dict[str, str]:
    """The grid of a trained task's tokens, for a method that asks for it. Raises `UserError` where N is no such grid."""
    if case.task != TRAINED:
        return {}
    sides = trained.get(case.data.partition(":")[0]).grid(case.n)
    return {"grid": f"{sides[0]}x{sides[1]}"} if sides and any(f.name == "grid" for f in fields(method.params)) else {}


_AXES = (*(f.name for f in fields(Case) if f.name not in ("task", "method", "implementation", "params", "replicate")), BUDGET, CAUSAL)


def _axis(name: str, suite: str) -> str:
    if name not in _AXES:
        raise unknown("axis", name, _AXES, f"suite {suite}")
    return name


def _listed(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _values(axis: str, value: object, suite: str) -> tuple[Any, ...]:
    values = _listed(value)
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
    least = 0 if axis in ("seed", "kv_heads", "dim_v") else 1
    try:
        number = int(str(item))
    except ValueError:
        number = least - 1
    if number < least or isinstance(item, bool):
        raise UserError(f"suite {suite}: {axis} = {item!r} must be a whole number of at least {least}")
    return number


def rates(text: str) -> tuple[float, ...]:
    """`3e-4/1e-3` -> the learning rates, smallest first. Raises `UserError`."""
    try:
        found = tuple(sorted({float(x) for x in text.split("/")}))
    except ValueError:
        found = ()
    if not found or not 0 < found[0] <= found[-1] < float("inf"):
        raise UserError(f"rates = {text!r} are no learning rates: write them as 3e-4/1e-3")
    return found


def _rates(text: str) -> str:
    return "/".join(f"{rate:g}" for rate in rates(text))


def _data(text: str) -> str:
    trained.get(text)  # which looks into the folder, once
    return text


def other_method(text: str) -> tuple[Method, dict[str, str]]:
    """`mita:topk=16:landmarks=25` -> the method and the parameters given. Raises `UserError`."""
    name, *settings = text.split(":")
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [setting for setting, (_, equals, _) in zip(settings, pairs, strict=True) if not equals]:
        raise UserError(f"trained_with = {text!r}: {wrong[0]!r} sets no parameter: write it as METHOD:PARAM=VALUE")
    method, values = get(name), {key: value for key, _, value in pairs}
    method.parse(values)
    return method, values


def _other(text: str) -> str:
    return text if not text or other_method(text) else ""


_WORDS: dict[str, Callable[[str], str]] = {"data": _data, "rates": _rates, "trained_with": _other}


def available() -> dict[str, Path]:
    """Built-in suites: name -> file."""
    folder = Path(str(files("attnbench.suites")))
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


def load(name: str) -> Suite:
    """The built-in suite `name`, or the one in the TOML file at that path. Raises `UserError`."""
    path = Path(name) if name.endswith(".toml") else available().get(name)
    if path is None:
        raise unknown("suite", name, available())
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read suite {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"suite {path} is not valid TOML: {error}") from None
    return replace(_suite(path.stem, data, str(path)), source=name)


def _suite(name: str, data: Mapping[str, Any], path: str) -> Suite:
    _known(data, ("title", "question", "task", "axes", "fixed", "measure", "point", "method"), path)
    for key in ("task", "method"):
        if key not in data:
            raise UserError(f"{path} lacks {key!r}")
    if data["task"] not in CHOICES["task"]:
        raise unknown("task", data["task"], CHOICES["task"], path)
    axes: dict[str, tuple[Any, ...]] = {}
    for section in ("axes", "fixed"):
        for key, value in data.get(section, {}).items():
            if key in axes:
                raise UserError(f"{path}: {key} stands under both [axes] and [fixed]: keep one")
            axes[_axis(key, path)] = _values(key, value, path)
    points = tuple({_axis(k, path): _values(k, v, path) for k, v in point.items()} for point in data.get("point", ()))
    _needs(data["task"], {**axes, **(points[0] if points else {})}, path)
    measure = data.get("measure", {})
    _known(measure, [f.name for f in fields(Protocol)], f"{path} [measure]")
    entries = []
    budgets = any(BUDGET in part for part in (axes, *points))
    for table in data["method"]:
        if "name" not in table:
            raise UserError(f"{path}: a [[method]] lacks its name")
        swept = frozenset(k for k, v in table.items() if isinstance(v, list)) if budgets else frozenset()
        entries.append(Entry(table["name"], {k: _listed(v) for k, v in table.items() if k != "name"}, swept))
    words = data.get("title", name), data.get("question", "")
    return Suite(name, *words, data["task"], tuple(entries), axes, Protocol(**measure), points=points)


def _needs(task: str, axes: Mapping[str, tuple[Any, ...]], path: str) -> None:
    """Raises `UserError` where a suite that trains leaves out what training needs."""
    if task == TRAINED and (absent := [name for name in ("data", "steps", "depth", "rates") if name not in axes]):
        raise UserError(f"{path}: task {task} needs {', '.join(absent)}: set them under [fixed], [axes] or [[point]]")


def _known(data: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    for key in data:
        if key not in known:
            raise unknown("key", key, known, path)
