"""A suite: a question that expands to cases. Nothing here runs a method."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from attnbench.axes import BUDGET, CAUSAL, axis_name, axis_values, listed
from attnbench.case import TRAINED, TRAINING, Case, laid
from attnbench.errors import UserError, unknown
from attnbench.protocol import Protocol
from attnbench.registry import get

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


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
        own = {k: listed(v) for n in reversed(self.names) for k, v in settings.get(n, {}).items()}
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
    protocol: Protocol = field(default_factory=Protocol)
    source: str = ""
    """what `suite_file.load` was asked for: a name or a path; empty means `name`"""
    points: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    """axes whose values belong together, as a trained task and its lengths: each is a product with `axes`, of which it may replace some"""

    def override(self, axes: Mapping[str, Sequence[object]], methods: Sequence[str], params: Mapping[str, Mapping[str, object]]) -> Suite:
        """The suite with other axis values, only the `methods` named (added where absent), and other method parameters.

        Raises `UserError`, also for a budget that no method can follow.
        """
        changed: dict[str, tuple[Any, ...]] = {axis_name(k, self.name): axis_values(k, v, self.name) for k, v in axes.items()}
        if idle := [name for name in changed if name in TRAINING and self.task != TRAINED]:
            raise UserError(f"suite {self.name} trains no model: leave out --axis {idle[0]}, or run accuracy, swap_in or pruning")
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
        """The points with other values; of a trained task and of a length the points that have it, if there are any.

        Tasks that are named are asked at every length, each with its own points.
        """
        parts = [self.points]
        if "data" in changed and any("data" in point for point in self.points):
            parts = [tuple({**point, "data": (name,)} for point in _of(self.points, name)) for name in changed["data"]]
        if "n" in changed:
            parts = [tuple({**point, "n": (n,)} for n in changed["n"] for point in _at(part, n)) for part in parts]
        kept = [point for part in parts for point in part]
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


def _of(points: Sequence[Mapping[str, tuple[Any, ...]]], data: str) -> Sequence[Mapping[str, tuple[Any, ...]]]:
    """The points of a trained task; of one that has none, those of the first other level of it, else the first of all."""
    known = [name for point in points for name in point.get("data", ())]
    alike = [name for name in known if name.partition(":")[0] == data.partition(":")[0]]
    chosen = data if data in known else next(iter(alike), "")
    return [point for point in points if chosen in point.get("data", ())] or points[:1]


def _at(points: Sequence[Mapping[str, tuple[Any, ...]]], n: int) -> list[Mapping[str, tuple[Any, ...]]]:
    """The points of a length, and any that names none; where no task has such a point, of each those of the length that it has first."""
    if any(n in point.get("n", ()) for point in points):
        return [point for point in points if n in point.get("n", (n,))]
    first: dict[Any, Any] = {}
    for point in points:
        first.setdefault(point.get("data"), point.get("n"))
    return [point for point in points if point.get("n") == first[point.get("data")]]
