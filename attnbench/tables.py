"""The report: one table for each device, suite, mode and set of conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnbench import compare, earned, frame, joining, references, series, stats
from attnbench.axes import CHOICES
from attnbench.stats import Verdict
from attnbench.typeset import ABOUT, NONE, TIMES, Table, figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd


def report(table: pd.DataFrame, lengths: Sequence[int] | None = None) -> list[Table]:
    """All tables of a results table: speed first, one a mode, then fidelity and routing health. `lengths` limits the columns to these N."""
    if table.empty:
        return []
    rows = frame.current(table)
    found: list[Table] = []
    for _, part in rows.groupby("device", sort=True):
        accuracy = part[part["task"] == "fidelity"]
        for group in series.groups(part[part["task"] == "speed"]):
            modes = [m for m in CHOICES["mode"] if (group.rows["mode"] == m).any()]
            found += [_speed(group, mode, accuracy, lengths) for mode in modes]
        found += [_fidelity(group, lengths) for group in series.groups(accuracy)]
        found += [_health(group, lengths) for group in series.groups(part[part["task"] == "health"])]
        for group in series.groups(part[part["task"] == earned.TASK]):
            found += _earned(group, rows, lengths)
    return _explained([t for t in found if len(t.header) > 2])


def _explained(found: list[Table]) -> list[Table]:
    """The tables, of which the first whose caption has a noise floor says what that is."""
    first = next((i for i, table in enumerate(found) if _PAIRS in table.caption), None)
    return [replace(table, caption=f"{table.caption} {stats.FLOOR}") if i == first else table for i, table in enumerate(found)]


_PAIRS = "A/A pair"
"""What `series.noise` says wherever a noise floor was measured."""


def _named(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(series, its rows) in the taxonomy's order."""
    parts = [(str(name), part) for name, part in rows.assign(series=series.labels(rows)).groupby("series", sort=True)]
    return sorted(parts, key=lambda item: (series.family_rank(series.family(str(item[1]["method"].iloc[0]))), series.natural(item[0])))


def _head(name: str, part: pd.DataFrame) -> tuple[str, str]:
    return name, str(series.family(str(part["method"].iloc[0])) or "unknown")


def _wanted(rows: pd.DataFrame, lengths: Sequence[int] | None) -> list[int]:
    present = sorted({int(n) for n in rows["n"]})
    return [n for n in present if lengths is None or n in lengths]


def _speed(group: series.Group, mode: str, accuracy: pd.DataFrame, lengths: Sequence[int] | None) -> Table:
    rows = group.rows[(group.rows["mode"] == mode) & (group.rows["replicate"] == 0)]
    noise, again = series.noise(group.rows[group.rows["mode"] == mode]), series.pairs(group.rows, mode)
    columns = _wanted(rows, lengths)
    base = {n: _best_dense(rows[rows["n"] == n]) for n in columns}
    measured = rows[(rows["status"] == "ok") & rows["n"].isin(columns)]
    top = int(measured["n"].max()) if len(measured) else 0
    accuracy = joining.closest(accuracy, group.rows)
    errors, at = _errors(accuracy)
    header = [f"N={n} (ms)" for n in columns] + ([f"peak memory, N={top} (MiB)"] if top else [])
    first = {n: (compare.fastest(_dicts(rows[rows["n"] == n]), again) or {}).get("case_id") for n in columns}
    lines, best = [], set()
    for i, (name, part) in enumerate(_named(rows)):
        by_n = {int(r["n"]): r for r in _dicts(part)}
        best |= {(i, 2 + j) for j, n in enumerate(columns) if n in by_n and by_n[n]["case_id"] == first[n]}
        cells = [_time(by_n.get(n), base[n], again) for n in columns] + ([_memory(by_n.get(top))] if top else [])
        lines.append((*_head(name, part), *cells, *(_error(part, errors, profile) for profile in errors)))
    caption = (
        f"{series.describe(rows)}, {mode}. {series.settings(rows)}"
        "Time per call: median [interquartile range] in ms, and speed-up over the best dense method "
        f"at that length; {ABOUT} where the two are not separable ({f'noise floor {noise}' if noise else 'noise floor not measured'}). "
        "Memory beside the inputs." + (f" Relative error against softmax at N={at}, {series.describe(accuracy)}." if errors else "")
    )
    titles = ("method", "family", *header, *(f"error, {profile}" for profile in errors))
    name = f"{group.suite}-{group.place}-{mode.replace('+', '-')}"
    return Table(name, caption, titles, tuple(lines), tuple(_cited(rows, columns)), frozenset(best))


def _cited(rows: pd.DataFrame, columns: Sequence[int]) -> Iterable[str]:
    """Numbers measured elsewhere under these conditions, each with its ratio to ours of the same setting, one sentence a source."""
    found: dict[str, list[str]] = {}
    for one in (*references.beside(rows, references.TIME), *references.beside(rows, references.MEMORY)):
        time = one.column == references.TIME
        ours = rows[one.same_setting(rows) & (rows["status"] == "ok")].sort_values("time_s")
        unit, what, scale = ("ms", "", 1e3) if time else ("MiB", "peak memory ", 2**-20)
        parts = []
        for n in (n for n in one.values if n in columns):
            mine = ours.loc[ours["n"] == n, one.column].dropna()
            ratio = f" ({figures(one.values[n] / float(mine.iloc[0]))}{TIMES} ours)" if len(mine) else ""
            parts.append(f"{one.values[n] * scale:.6g} {unit}{ratio} at N={n}")
        if parts:
            found.setdefault(one.source, []).append(f"{one.name(settings=True)}: {what}{', '.join(parts)}")
    return (f"Cited, not measured here. {'; '.join(lines)}. {source}." for source, lines in found.items())


def _dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def _best_dense(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The fastest measured row of a method that computes softmax attention itself."""
    dense = [r for r in _dicts(rows) if frame.timed(r) and series.exact(str(r["method"]))]
    return min(dense, key=lambda r: float(r["time_s"]), default=None)


def _time(row: dict[str, Any] | None, base: dict[str, Any] | None, again: Sequence[tuple[float, float]]) -> str:
    if row is None or row["status"] != "ok":
        return str(row["status"]) if row else NONE
    if not frame.timed(row):
        return compare.UNTIMED
    low, middle, high = stats.quartiles(row["samples_s"])
    text = f"{figures(middle * 1e3)} [{figures((high - low) * 1e3, 1)}]"
    if base is None:
        return text
    if row["case_id"] == base["case_id"]:
        return f"{text} 1{TIMES}"
    ratio = stats.ratio(base["samples_s"], row["samples_s"])
    mark = ABOUT if stats.verdict(ratio, stats.floor(again, min(middle, float(base["time_s"])))) is Verdict.NOT_SEPARABLE else ""
    return f"{text} {mark}{figures(1 / ratio.value)}{TIMES}"


def _memory(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] != "ok":
        return str(row["status"]) if row else NONE
    peak = row.get("peak_bytes")
    return NONE if peak is None or peak != peak else figures(float(peak) / 2**20)  # noqa: PLR0124 (NaN)


def _errors(accuracy: pd.DataFrame) -> tuple[dict[str, dict[tuple[str, str], float]], int]:
    """Profile -> (method, parameters) -> median relative error over seeds at the largest length there is, and that length."""
    if accuracy.empty or "rel_error" not in accuracy:
        return {}, 0
    known = accuracy[accuracy["rel_error"].notna()]
    if known.empty:
        return {}, 0
    at = int(known["n"].max())
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in _dicts(known[known["n"] == at]):
        found.setdefault(row["profile"], {}).setdefault((row["method"], row["params"]), []).append(float(row["rel_error"]))
    return {p: {key: stats.median(values) for key, values in found[p].items()} for p in series.panel_order(found)}, at


def _error(part: pd.DataFrame, errors: dict[str, dict[tuple[str, str], float]], profile: str) -> str:
    value = errors[profile].get((str(part["method"].iloc[0]), str(part["params"].iloc[0])))
    return NONE if value is None else f"{value:.2g}"


def _fidelity(group: series.Group, lengths: Sequence[int] | None) -> Table:
    rows = group.rows[group.rows["replicate"] == 0]
    columns = [(profile, n) for profile in series.panel_order(rows["profile"].unique()) for n in _wanted(rows, lengths)]
    lines = [
        (*_head(name, part), *(_distance(part[(part["profile"] == p) & (part["n"] == n)]) for p, n in columns))
        for name, part in _named(rows)
    ]
    caption = (
        f"{series.describe(rows)}. {series.settings(rows)}Relative error against float64 softmax attention, median over seeds; "
        f"in brackets the softmax mass recalled. {series.captured(rows['profile'])}".rstrip()
    )
    titles = series.profile_titles(rows["profile"])
    return Table(f"{group.suite}-{group.place}", caption, ("method", "family", *(f"{titles[p]}, N={n}" for p, n in columns)), tuple(lines))


def _distance(cell: pd.DataFrame) -> str:
    """Every seed of one cell; a single failure is what it says."""
    failed = cell.loc[cell["status"] != "ok", "status"]
    if len(failed) or cell.empty:
        return str(failed.iloc[0]) if len(failed) else NONE
    text = f"{stats.median(cell['rel_error'].tolist()):.2g}"
    mass = cell["mass_recalled"].dropna().tolist() if "mass_recalled" in cell else []
    return f"{text} [{stats.median(mass):.0%}]" if mass else text


def _earned(group: series.Group, others: pd.DataFrame, lengths: Sequence[int] | None) -> list[Table]:
    """Trained accuracy beside what the methods cost, joined from all records; and models in which another method took its place."""
    rows = group.rows[group.rows["n"].isin(_wanted(group.rows, lengths))]
    own, swapped = earned.lines(rows, others), earned.swapped(rows)
    stem = f"{group.suite}-{group.place}"
    costs = (
        "Then what a forward call takes, memory beside the inputs, and relative error against softmax attention, as measured elsewhere: "
        "with the same parameters where `costs of` says so, else with those it names, the nearest that were measured."
    )
    swap = "The method stands in a model that was trained with another, without any more training."
    made = []
    for name, found, words in (("accuracy", own, costs), ("swapped", swapped, swap)):
        if found.rows:
            caption = f"{_trained(rows, swapped=name == 'swapped')} {words}"
            made.append(Table(f"{stem}-{name}", caption, found.header, found.rows, found.notes, methods=found.methods))
    return made


def _trained(rows: pd.DataFrame, *, swapped: bool) -> str:
    """How the models of a table were trained."""
    rows = rows[(rows["trained_with"].fillna("") != "") == swapped] if "trained_with" in rows else rows
    seeds, steps = sorted(rows["seed"].unique().tolist()), sorted({int(x) for x in rows["steps"]})
    return (
        f"{series.describe(rows)}. {series.settings(rows)}Test accuracy of small transformers, mean and standard deviation over seeds "
        f"{', '.join(map(str, seeds))}, at most {'/'.join(map(str, steps))} steps, the best of the same learning rates."
    )


_HEALTH = {
    "load_entropy": "load entropy", "max_load": "busiest expert", "pruned": "pruned", "duplicates": "duplicates",
    "mass_recalled": "mass recalled",
}  # fmt: skip
_EVEN = "balanced"
"""Input profile against which the others' times are held."""


def _health(group: series.Group, lengths: Sequence[int] | None) -> Table:
    """A row for each method and input profile, at the longest length."""
    rows = group.rows[group.rows["replicate"] == 0]
    wanted = _wanted(rows, lengths)
    rows = rows[rows["n"] == max(wanted, default=0)]
    lines = []
    for name, part in _named(rows):
        by_profile = {str(row["profile"]): row for row in _dicts(part)}
        even = by_profile.get(_EVEN)
        base = even if even and even["status"] == "ok" else None
        for profile in series.panel_order(by_profile):
            row = by_profile[profile]
            again = series.pairs(group.rows, row["mode"])
            lines.append((*_head(name, part), profile, _time(row, base, again), *(_share(row.get(column)) for column in _HEALTH)))
    noise = series.noise(group.rows)
    caption = (
        f"{series.describe(rows)}. {series.settings(rows)}Time per call: median [interquartile range] in ms, and speed-up over {_EVEN} "
        f"inputs; {ABOUT} where the two are not separable ({f'noise floor {noise}' if noise else 'noise floor not measured'}). "
        "Load entropy over log E; shares of queries that the busiest expert serves, of tokens that no routed expert keeps, "
        "of places in experts that repeat a token, and of softmax mass that queries read."
    )
    header = ("method", "family", "inputs", f"N={max(wanted, default=0)} (ms)", *_HEALTH.values())
    return Table(f"{group.suite}-{group.place}-health", caption, header if lines else header[:2], tuple(lines))


def _share(value: Any) -> str:
    return NONE if value is None or value != value else figures(float(value), 2)  # noqa: PLR0124 (NaN)
