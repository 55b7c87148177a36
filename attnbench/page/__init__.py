"""The results as one HTML file that needs no network: what was found, plots to zoom into, a table to sort, and how each number is made.

A content security policy in the page itself forbids every request.
"""

from __future__ import annotations

import base64
import json
import zlib
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Protocol

from attnbench import series, tables, typeset
from attnbench.environment import leaves
from attnbench.page import joined
from attnbench.page.summary import sentences, subject
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
_DIMENSIONS = ("family", "scaling", "expert", "count", "construction", "topology")
_UNKNOWN = "unknown"


class Plot(Protocol):
    """A plot, and where it stands."""

    @property
    def section(self) -> str:
        """Plots of one section stand together."""

    @property
    def title(self) -> str:
        """What is above it."""

    @property
    def item(self) -> str:
        """JSON for `Bokeh.embed.embed_item`."""


def build(
    table: pd.DataFrame, environments: Mapping[str, Mapping[str, Any]], plots: Sequence[Plot], script: str, colours: Mapping[str, str]
) -> str:
    """The page. `script` is Bokeh's own JavaScript, `colours` gives each family its colour, `environments` those of the records by id."""
    rows = joined.rows(table)
    made = [one for one in tables.report(table) if one.methods]
    known = _methods(rows)
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', '<link rel="icon" href="data:,">',
        "<title>attnbench: results</title>", f"<style>{_asset('page.css')}</style>", "</head>", "<body>", "<main>",
        "<h1>attnbench: results</h1>", '<section id="summary">', *(f"<p>{escape(s)}</p>" for s in sentences(table)), "</section>",
        *_filters(known, rows, colours), *_figures(plots, subject(table)), *_joined(made), *_table(rows),
        *_environments(environments, rows), "</main>",
        f'<script type="application/json" id="methods">{_json(known)}</script>',
        f"<script>{_inline(script)}</script>", f"<script>{_asset('page.js')}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def _asset(name: str) -> str:
    return files("attnbench.page").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    return _inline(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def _packed(text: str) -> str:
    """Deflated, as base64: a page holds a hundred plots."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _inline(text: str) -> str:
    """Text inside a script element, which it may not end."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def _methods(rows: Iterable[joined.Row]) -> dict[str, dict[str, str]]:
    """Method -> its place in the taxonomy."""
    found = {}
    for name in dict.fromkeys(str(row["method"]) for row in rows):
        method = series.method_of(name)
        place = {d: str(getattr(method.coordinates, d)) for d in _DIMENSIONS[1:]} if method else dict.fromkeys(_DIMENSIONS[1:], _UNKNOWN)
        found[name] = {"family": str(method.family) if method else _UNKNOWN, **place}
    return found


def _filters(known: Mapping[str, Mapping[str, str]], rows: Sequence[joined.Row], colours: Mapping[str, str]) -> Iterable[str]:
    yield '<form id="filters" aria-label="Filters"><label>search<input type="search" name="text" placeholder="method"></label>'
    for name in _DIMENSIONS:
        yield _select(name, sorted({place[name] for place in known.values()}, key=lambda v: (series.family_rank(v), v)))
    for name in ("suite", "mode", "status"):
        yield _select(name, sorted({str(row[name]) for row in rows}))
    yield '<button type="reset">show all</button><output id="shown" aria-live="polite"></output></form>'
    present = {place["family"] for place in known.values()}
    keys = (f'<span><i style="background:{colours[f]}"></i>{escape(f)}</span>' for f in map(str, Family) if f in present and f in colours)
    yield f'<p id="legend">{"".join(keys)}</p>'


def _select(name: str, values: Iterable[str]) -> str:
    options = "".join(f"<option>{escape(v)}</option>" for v in values)
    return f'<label>{name}<select name="{name}"><option value="">all</option>{options}</select></label>'


def _figures(plots: Sequence[Plot], told: tuple[str, str]) -> Iterable[str]:
    """Section by section, the one `told` of in the summary first and open, other conditions of its suite after it."""
    yield '<section id="figures"><h2>Figures</h2><p class="hint">Drag to zoom, point at a mark to read it. Crosses above the lines '
    yield "or at the left of a row are cells that failed; a grey band is the noise floor. Filters by method act on plots and table.</p>"
    yield "<noscript><p>Plots and commands need JavaScript, the tables below do not.</p></noscript>"
    whole, suite = ": ".join(told), f"{told[0]}: "
    sections = sorted(dict.fromkeys(plot.section for plot in plots), key=lambda s: (s != whole, not s.startswith(suite)))
    for i, section in enumerate(sections):
        yield f"<details{'' if i else ' open'}><summary>{escape(section)}</summary>"
        for plot in (p for p in plots if p.section == section):
            yield f'<figure><figcaption>{escape(plot.title)}</figcaption><div class="plot"></div>'
            yield f'<script type="text/plain">{_packed(plot.item)}</script></figure>'
        yield "</details>"
    yield "</section>"


def _joined(made: Sequence[typeset.Table]) -> Iterable[str]:
    """What each method reached in training beside what it costs."""
    if not made:
        return
    yield '<section id="joined"><h2>Trained accuracy</h2><p class="hint">A heading sorts by its column; filters by method act here too.</p>'
    for one in made:
        title = one.caption.partition(". ")[0]
        yield f"<details open><summary>{escape(one.name)}: {escape(title)}</summary>"
        yield from _sortable(one.header, [_texts(line, method) for line, method in zip(one.rows, one.methods, strict=True)])
        yield from (f'<p class="hint">{escape(text)}</p>' for text in (one.caption, *one.notes))
        yield "</details>"
    yield "</section>"


def _texts(line: Sequence[str], method: str) -> str:
    cells = "".join(f"<td{_number(text)}>{escape(text)}</td>" for text in line)
    return f'<tr data-method="{escape(method)}" data-series="{escape(line[0])}">{cells}</tr>'


def _number(text: str) -> str:
    """The attributes of a cell that begins with a number, by which it is sorted."""
    try:
        return _sorted_by(f"{float(text.split(maxsplit=1)[0]):.6g}", text)
    except (ValueError, IndexError):
        return _sorted_by("", text) if text == typeset.NONE else ""


def _sorted_by(key: str, text: str) -> str:
    """Of a cell that is sorted by a number, empty for none; the text tells it where it can."""
    told = key == text or (not key and text == typeset.NONE)
    return " class=n" if told else f' class=n data-v="{key}"'


def _sortable(heads: Iterable[str | joined.Column], lines: Iterable[str], last: str = "") -> Iterable[str]:
    titles = [h if isinstance(h, joined.Column) else joined.Column(h, lambda _: None, numeric=False) for h in heads]
    cells = "".join(
        f'<th scope="col"{" class=n" if c.numeric else ""}><button type="button" title="{escape(c.help or c.title)}">'
        f"{escape(c.title)}</button></th>"
        for c in titles
    )
    yield f'<div class="wide"><table><thead><tr>{cells}{last}</tr></thead><tbody>'
    yield from lines
    yield "</tbody></table></div>"


def _table(rows: Sequence[joined.Row]) -> Iterable[str]:
    columns = [c for c in joined.COLUMNS if not c.numeric or any(c.key(row) for row in rows)]
    yield '<section id="cells"><h2>Cells</h2><p class="hint">A heading sorts by its column.</p>'
    yield from _sortable(columns, (_line(row, columns) for row in rows), '<th scope="col">again</th>')
    again = [
        [row["reason"], row["command"], f"{row['started']}, commit {row['commit'] or 'unknown'}, environment {row['env_id']}"]
        for row in rows
    ]
    yield f'</section><script type="text/plain" id="again">{_packed(json.dumps(again))}</script>'


def _line(row: joined.Row, columns: Sequence[joined.Column]) -> str:
    marks = {name: row[name] for name in ("method", "suite", "mode", "status", "series")}
    data = "".join(f' data-{name}="{escape(str(value))}"' for name, value in marks.items())
    cells = "".join(f"<td{_sorted_by(c.key(row), c.text(row)) if c.numeric else ''}>{escape(c.text(row))}</td>" for c in columns)
    return f"<tr{data}>{cells}<td><details><summary>command</summary></details></td></tr>"


def _environments(environments: Mapping[str, Mapping[str, Any]], rows: Iterable[joined.Row]) -> Iterable[str]:
    used = dict.fromkeys(str(row["env_id"]) for row in rows)
    yield '<section id="environments"><h2>Environments</h2>'
    for key in used:
        facts = environments.get(key, {})
        yield f"<details><summary>{escape(key)}: {escape(str(facts.get('device', 'not recorded')))}</summary><dl>"
        for path, value in leaves(facts):
            told = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield f"<dt>{escape(' '.join(path))}</dt><dd>{escape(told)}</dd>"
        yield "</dl></details>"
    yield "</section>"
