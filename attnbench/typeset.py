"""A table of text cells and how it is written, as Markdown or LaTeX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

NONE, TIMES, ABOUT = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{ALMOST EQUAL TO}"
"""A cell for which there is no record; the sign behind a speed-up; the sign before one that is within the noise."""


@dataclass(frozen=True)
class Table:
    """Text cells under a header; the caption states the conditions."""

    name: str
    """short and unique in a report, for cross-references"""
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """sentences below the caption"""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the fastest at a length, where every other is separably slower"""
    methods: tuple[str, ...] = ()
    """the method of each row, where the table is of trained models"""

    def markdown(self) -> str:
        """A pipe table, the caption below it."""
        lines = [self.header, ("---", "---", *["---:"] * (len(self.header) - 2)), *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join([table, self.caption, *self.notes]) + "\n"

    def latex(self) -> str:
        """A `table*` for booktabs, which the preamble must load."""
        lines = ([_bold(escape(x), (i, j) in self.best) for j, x in enumerate(line)] for i, line in enumerate(self.rows))
        body = [" & ".join(cells) + r" \\" for cells in lines]
        caption = self.caption + (" Bold: the fastest at that length, where every other is separably slower." if self.best else "")
        columns = "ll" + "r" * (len(self.header) - 2)
        return "\n".join([
            r"\begin{table*}", r"  \centering", r"  \small", rf"  \begin{{tabular}}{{{columns}}}", r"    \toprule",
            "    " + " & ".join(map(escape, self.header)) + r" \\", r"    \midrule", *(f"    {line}" for line in body),
            r"    \bottomrule", r"  \end{tabular}", rf"  \caption{{{escape(caption)}}}", rf"  \label{{tab:{self.name}}}",
            *(rf"  \par{{\footnotesize {escape(note)}\par}}" for note in self.notes),
            r"\end{table*}",
            "",
        ])  # fmt: skip


def _bold(text: str, wanted: bool) -> str:
    return rf"\textbf{{{text}}}" if wanted else text


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    TIMES: r"$\times$", ABOUT: r"$\approx$", NONE: "--",
}  # fmt: skip


def escape(text: str) -> str:
    """Plain text as LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def render(tables: Iterable[Table], form: str) -> str:
    """The tables as one text; `form` is `markdown` or `latex`. Raises `ValueError` for another."""
    if form not in ("markdown", "latex"):
        raise ValueError(f"unknown format {form!r}: choose from latex, markdown")
    return "\n".join(t.markdown() if form == "markdown" else t.latex() for t in tables)


def figures(value: float, digits: int = 3) -> str:
    """`value` to so many significant figures, without an exponent."""
    rounded = float(f"{value:.{digits}g}")
    decimals = 0 if rounded == 0 else max(0, digits - 1 - int(f"{rounded:e}".partition("e")[2]))
    return f"{rounded:.{decimals}f}"
