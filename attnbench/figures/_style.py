"""One look for every figure: a colour a family, a marker a method, fills and dashes for implementations and parameters."""

from __future__ import annotations

import hashlib
import textwrap
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from attnbench import series
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

WIDTHS = {1: 3.4, 2: 7.0}
"""Columns of the page -> inches."""

COLOURS: dict[Family | None, str] = {
    Family.DENSE: "#000000",
    Family.LINEAR: "#E69F00",
    Family.COMPRESSED: "#56B4E9",
    Family.TEST_TIME: "#0072B2",
    Family.SAMPLED: "#882255",
    Family.PER_QUERY: "#009E73",
    Family.MOE: "#CC79A7",
    Family.COMPRESS_ROUTE: "#D55E00",
    None: "#6E6E6E",
}
"""Okabe and Ito's palette and Tol's wine, safe for colour-blind readers; None is a method that the registry does not know."""

BASELINE = "#9a9a9a"
"""The best dense time, repeated in the panels of the other families."""

MARKERS: tuple[Any, ...] = ("o", "s", "^", "v", "<", ">", "D", "d", "p", "P", "X", "*", (4, 1, 0), (3, 1, 0))
_SALT = 550  # a test holds that it gives the built-in methods of one family different markers
_FILLS = ("full", "none", "left", "right", "top", "bottom")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))

LETTERS = {"oom": "O", "timeout": "T", "unsupported": "U", "incorrect": "I", "error": "E", "skipped": "S", "diverged": "D"}
"""Failed status -> the letter that marks it in a strip above the axes."""

WORDS = {
    "oom": "out of memory",
    "timeout": "timed out",
    "unsupported": "unsupported",
    "incorrect": "failed the gate",
    "error": "error",
    "skipped": "not tried, a shorter length failed",
    "diverged": "training diverged",
}
"""Failed status -> what a caption says."""


@contextmanager
def paper() -> Iterator[None]:
    """Matplotlib's defaults with the paper's style, and nothing of the user's own settings."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(mpl.rc_params_from_file(str(files("attnbench.figures").joinpath("paper.mplstyle")), use_default_template=False))
        yield


def marker(method: str) -> Any:
    """Marker of a method: a function of its name alone, so that no other method can change it."""
    return MARKERS[hashlib.sha256(f"{_SALT}:{method}".encode()).digest()[0] % len(MARKERS)]


def look(label: str, variant: int = 0) -> dict[str, Any]:
    """Line properties of a series: `label` is `method[@implementation]`, `variant` counts its parameter sets."""
    name, _, implementation = label.partition("@")
    method = series.method_of(name)
    order = ["", *(i.name for i in method.all_implementations())] if method else ["", implementation]
    rank = order.index(implementation) if implementation in order else 1
    colour = _tint(COLOURS[series.family(name)], variant)
    return {
        "color": colour,
        "marker": marker(name),
        "markersize": 5.2 if marker(name) in {"*", (4, 1, 0), (3, 1, 0)} else 3.8,
        "fillstyle": _FILLS[rank % len(_FILLS)],
        "markerfacecoloralt": "white",
        "markeredgecolor": colour,
        "linestyle": _DASHES[(rank + variant) % len(_DASHES)],
    }


def cited(method: str, variant: int = 0) -> dict[str, Any]:
    """Line properties of numbers measured elsewhere: the method's colour and marker, hollow, on a dotted line."""
    return {**look(method, variant), "fillstyle": "none", "linestyle": ":", "linewidth": 0.8, "markersize": 5.2}


def _tint(colour: str, variant: int) -> str:
    """The colour itself, then steps towards black and white in turn."""
    step = (variant + 1) // 2
    share, towards = min(0.7, 0.3 * step), 0.0 if variant % 2 else 1.0
    if variant and colour == COLOURS[Family.DENSE]:
        towards = 1.0  # black has no darker shade
    red, green, blue = (c + (towards - c) * share for c in to_rgb(colour))
    return to_hex((red, green, blue))


def variants(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Series -> its number among the parameter sets of the same method and implementation, in order of its name."""
    by_label: dict[str, set[str]] = {}
    for row in rows:
        by_label.setdefault(str(row["label"]), set()).add(str(row["series"]))
    return {name: i for names in by_label.values() for i, name in enumerate(sorted(names, key=series.natural))}


def length(n: float) -> str:
    """A sequence length as ticks print it: 784, 1k, 256k, 1M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if n >= size and n % size == 0:
            return f"{int(n // size)}{unit}"
    return f"{n:g}"


def length_axis(axes: Axes, lengths: Sequence[int], room_in: float) -> None:
    """Logarithmic axis with a grid line at each length and as many labels as `room_in` inches hold."""
    axes.set_xscale("log", base=2)
    shown = sorted(lengths)
    every = max(1, -(-len(shown) * 24 // max(1, int(room_in * 72))))
    labels = {n: length(n) for n in shown[::every]}
    axes.xaxis.set_major_locator(FixedLocator([float(n) for n in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: labels.get(round(n), "")))
    margin = (shown[-1] / shown[0]) ** 0.04 if len(shown) > 1 else 1.3
    axes.set_xlim(shown[0] / margin, shown[-1] * margin)


def folded(text: str, letters: int) -> str:
    """Each line of a text broken between words to at most so many letters, if its words let it."""
    return "\n".join(textwrap.fill(line, letters, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))


def heading(text: str, width_in: float) -> str:
    """A panel's title, its lines broken to the panel's width."""
    return folded(text, max(1, int(width_in * 15)))


def wrapped(text: str, width_in: float) -> str:
    """Small print broken to lines of the figure's width."""
    return "\n".join(textwrap.wrap(text, int(width_in * 23.5)))
