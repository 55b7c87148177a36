"""What a paper takes from results: tables and figures with their captions as LaTeX, citations, and where every number comes from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from attnbench import __version__, bibtex, frame, series, store, tables
from attnbench.errors import UserError
from attnbench.joining import TRAINED
from attnbench.taxonomy import Coordinates
from attnbench.typeset import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from attnbench.method import Method
    from attnbench.typeset import Table

COLUMNS = 4
"""Lengths in a table where none are asked for: as many as a page is wide."""

PREAMBLE = r"""% What the tables and figures of attnbench need: \input{preamble} before \begin{document}.
\usepackage[T1]{fontenc}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage{url}
% A table at its own size where it fits, else scaled down to the width of the page and to two thirds of its height.
\newsavebox{\attnbenchbox}
\newlength{\attnbenchheight}
\newenvironment{attnbenchfit}
  {\setlength{\tabcolsep}{3.5pt}\begin{lrbox}{\attnbenchbox}}
  {\end{lrbox}%
   \ifdim\wd\attnbenchbox>\textwidth
     \sbox{\attnbenchbox}{\resizebox{\textwidth}{!}{\usebox{\attnbenchbox}}}%
   \fi
   \setlength{\attnbenchheight}{\dimexpr\ht\attnbenchbox+\dp\attnbenchbox\relax}%
   \ifdim\attnbenchheight>0.66\textheight
     \resizebox*{!}{0.66\textheight}{\usebox{\attnbenchbox}}%
   \else
     \usebox{\attnbenchbox}%
   \fi}
"""

_FLOATS = 6
"""Figures and tables between two page breaks of the sample document: LaTeX holds only so many."""


@dataclass(frozen=True)
class Picture:
    """A figure that was drawn."""

    name: str
    """file name without suffix"""
    title: str
    """what it shows, in a sentence"""
    rows: pd.DataFrame
    """what it was drawn from"""
    columns: int = 1
    """of a page that it is wide"""
    small_print: str = ""
    """what the figure itself says below its panels"""

    def latex(self) -> str:
        """A `figure` at the width of a column, or a `figure*` at that of two.

        That may take most of a page, so its caption leaves parameters out that its small print has.
        """
        rows = frame.current(self.rows)
        noise = series.noise(rows)
        wide, settings = self.columns > 1, series.settings(rows)
        told = all(f"{part.partition(':')[0]}: " in self.small_print for part in settings.split("; "))
        shown = f"{self.title} {series.describe(rows)}. {'' if wide and told else settings}" + (f"Noise floor {noise}." if noise else "")
        kind, width, height = ("figure*", "textwidth", 0.84) if wide else ("figure", "columnwidth", 0.66)
        return "\n".join([
            rf"\begin{{{kind}}}", r"  \centering",
            rf"  \includegraphics[width=\{width},height={height}\textheight,keepaspectratio]{{figures/{self.name}.pdf}}",
            rf"  \caption{{{escape(shown.strip())}}}", rf"  \label{{fig:{self.name}}}", rf"\end{{{kind}}}", "",
        ])  # fmt: skip


def contents(table: pd.DataFrame, pictures: Sequence[Picture], lengths: Sequence[int] | None = None) -> dict[str, str]:
    """Relative path -> text of every LaTeX and BibTeX file; `lengths` are the columns of tables, `COLUMNS` of them by default.

    Raises `UserError` where the results hold nothing.
    """
    if table.empty:
        raise UserError("these results hold no records: run a suite first")
    methods = [m for name in sorted(table["method"].unique()) if (m := series.method_of(str(name)))]
    found = {f"tables/{t.name}.tex": fitted(t.latex()) for t in measured(table, lengths)}
    found |= {"tables/methods.tex": fitted(taxonomy(methods))}
    found |= {f"figures/{p.name}.tex": p.latex() for p in pictures}
    return {
        "preamble.tex": PREAMBLE,
        "main.tex": document(sorted(found)),
        "references.bib": bibtex.bibliography(m.citation for m in methods),
        **found,
    }


def measured(table: pd.DataFrame, lengths: Sequence[int] | None = None) -> list[Table]:
    """The tables of the report, each suite's with lengths of its own where none are given."""
    suites, found = sorted(table["suite"].unique()), []
    for suite in suites:
        own = table["suite"] == suite
        beside = ("fidelity", "speed") if TRAINED in set(table.loc[own, "task"]) else ("fidelity",)  # distances belong into tables of speed
        rows = table[own | table["task"].isin(beside)]
        made = tables.report(rows, lengths or spread(table.loc[table["suite"] == suite, "n"].tolist()))
        found += [t for t in made if max((s for s in suites if t.name.startswith(f"{s}-")), key=len) == suite]
    return found


def spread(lengths: Iterable[int]) -> list[int]:
    """At most `COLUMNS` of the lengths, evenly by rank, the shortest and the longest among them."""
    known = sorted(set(lengths))
    steps = min(COLUMNS, len(known)) - 1
    return [known[round(i * (len(known) - 1) / steps)] for i in range(steps + 1)] if steps > 0 else known


def fitted(latex: str) -> str:
    """A table no wider than the page, by the environment of `preamble.tex`."""
    begin, end = r"\begin{tabular}", r"\end{tabular}"
    return latex.replace(begin, rf"\begin{{attnbenchfit}}{begin}").replace(end, rf"{end}\end{{attnbenchfit}}")


def taxonomy(methods: Sequence[Method]) -> str:
    """Every method with its citation and its place in the five dimensions."""
    ordered = sorted(methods, key=lambda m: (series.family_rank(m.family), series.natural(m.title)))
    names = [f.name for f in fields(Coordinates)]
    lines = [
        " & ".join([rf"{escape(m.title)}~\cite{{{bibtex.key(m.citation)}}}", *(escape(str(getattr(m.coordinates, n))) for n in names)])
        for m in ordered
    ]
    return "\n".join([
        r"\begin{table*}", r"  \centering", r"  \small", rf"  \begin{{tabular}}{{l{'l' * len(names)}}}", r"    \toprule",
        rf"    {' & '.join(['method', *map(escape, names)])} \\", r"    \midrule", *(rf"    {line} \\" for line in lines),
        r"    \bottomrule", r"  \end{tabular}",
        r"  \caption{The methods compared, read as fast-weight experts and a routing of queries to them.}",
        r"  \label{tab:methods}", r"\end{table*}", "",
    ])  # fmt: skip


def document(parts: Sequence[str]) -> str:
    """A minimal document that shows every part, to look at and to copy from."""
    shown = [rf"\input{{{part}}}" for part in parts]
    broken = [line for i, line in enumerate(shown) for line in ([line, r"\clearpage"] if i % _FLOATS == _FLOATS - 1 else [line])]
    return "\n".join([
        r"\documentclass[twocolumn]{article}", r"\usepackage[margin=1in]{geometry}", r"\input{preamble}",
        r"\begin{document}", *broken, r"\clearpage",
        r"\bibliographystyle{plain}", r"\bibliography{references}", r"\end{document}", "",
    ])  # fmt: skip


def provenance(results: Path, table: pd.DataFrame, made: Mapping[str, bytes], command: str) -> str:
    """As JSON: the records files and what they held, environments, commits, and a hash of every file that was made."""
    sources: list[dict[str, Any]] = []
    for file in store.find(results):
        raw = file.read_bytes()
        where = file.name if results.is_file() else file.relative_to(results).as_posix()
        sources.append({
            "file": where, "sha256": _hash(raw), "records": raw.count(b"\n"), "environments": store.environments(file),
        })  # fmt: skip
    return json.dumps(
        {
            "attnbench": __version__,
            "remake": command,
            "commits": sorted({str(c) for c in table["commit"] if c}),
            "results": sources,
            "files": {name: _hash(content) for name, content in sorted(made.items())},
        },
        indent=1,
        sort_keys=True,
    ) + "\n"  # fmt: skip


def commands(table: pd.DataFrame) -> str:
    """One line a cell: the command that measures it again."""
    return "".join(f"{line}\n" for line in sorted({str(c) for c in table["command"] if c}))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
