"""Figures: one module each, records -> Figure. A new module is found by its file; a leading underscore hides a helper.

A module has `NAME`, `data(table) -> DataFrame` (exactly what is drawn), `build(table, columns=2) -> Figure | None` (None where
there is nothing to draw) and, where `attnbench.series.groups` does not split tables as it needs, its own `groups(table)`.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from attnbench import series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure


class FigureModule(Protocol):
    """What a module of this package offers."""

    NAME: str

    def data(self, table: pd.DataFrame) -> pd.DataFrame:
        """Exactly what is drawn; empty where there is nothing."""

    def build(self, table: pd.DataFrame, columns: int = 2) -> Figure | None:
        """The figure, as wide as one or two columns of a page."""


def modules() -> dict[str, FigureModule]:
    """Every figure by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    found = [cast("FigureModule", importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {module.NAME: module for module in found}


def parts(module: FigureModule, table: pd.DataFrame) -> Iterator[series.Group]:
    """The pieces of a table that the module draws one figure of."""
    return cast("Iterator[series.Group]", getattr(module, "groups", series.groups)(table))


SUFFIXES = (".pdf", ".png", ".csv")
"""What a figure is written as: vectors, pixels, and what was drawn, to seven digits."""


def draw_all(table: pd.DataFrame, folder: Path, columns: int = 2, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Write every figure that the table allows as `<suite>-<figure>-<device>.pdf`, `.png` and `.csv`. Returns the paths.

    Devices and conditions are never pooled: each gets its own figure, as wide as `columns` columns of a page or, where it would be
    `TALL` in one, two. Raises `UserError` where nothing can be drawn or written.
    """
    return [path for one in drawn(table, columns) for path in write(one.figure, one.module.data(one.rows), folder / one.stem, suffixes)]


class Drawn(NamedTuple):
    """A figure, and what it was drawn from."""

    stem: str
    """`<suite>-<figure>-<device>`"""
    module: FigureModule
    rows: pd.DataFrame
    figure: Figure

    @property
    def columns(self) -> int:
        """Of a page that the figure is wide."""
        from attnbench.figures._style import WIDTHS

        return 2 if self.figure.get_figwidth() > WIDTHS[1] else 1


TALL = 1.6
"""Height over width beyond which a figure of one column is drawn as wide as two: a page would scale it down until nobody reads it."""


_AT_EQUAL_WIDTH = frozenset({"fidelity", "pareto", "recall"})
"""Figures that name every setting of a method, which are many where budgets chose them: `equal_width` draws a line through them."""


def planned(table: pd.DataFrame, names: Sequence[str] = ()) -> list[tuple[FigureModule, series.Group]]:
    """What may be drawn of a table: those figures that are named, each with the groups that it takes, or all that are of use.

    Raises `UserError` for unknown names.
    """
    from attnbench.errors import UserError

    known = modules()
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"there is no figure {unknown[0]!r}: they are {', '.join(known)}")
    chosen = [module for name, module in known.items() if name in names or not names] if len(table) else []
    found = [(module, group) for module in chosen for group in parts(module, table)]
    return [(module, group) for module, group in found if names or module.NAME not in _AT_EQUAL_WIDTH or not _budgets(group.rows)]


def _budgets(rows: pd.DataFrame) -> bool:
    """Whether parameters were set by several budgets."""
    return "budget" in rows and len({units for asked in rows["budget"] for units in asked}) > 1


def told(one: tuple[FigureModule, series.Group]) -> str:
    """What is being drawn, in words."""
    return f"{one[0].NAME} of {one[1].suite}"


def drawn(
    table: pd.DataFrame, columns: int = 2, names: Sequence[str] = (), follow: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> Iterator[Drawn]:
    """Every figure that the table allows, or those named, one after another. Raises `UserError` at the end where there was none.

    `follow` passes on what is `planned`, and may so show how far it is.
    """
    from attnbench.errors import UserError
    from attnbench.figures import _style

    count = 0
    for module, group in follow(planned(table, names)):
        with _style.paper():
            figure = module.build(group.rows, columns)
            if figure is not None and columns == 1 and figure.get_figheight() > TALL * figure.get_figwidth():
                figure = module.build(group.rows, 2)
            if figure is not None:
                count += 1
                yield Drawn(f"{group.suite}-{module.NAME}-{group.place}", module, group.rows, figure)
    if not count:
        what = f"no {' or '.join(names)}" if names else "nothing"
        raise UserError(f"{what} to draw: no cell of these results was measured for it; `attnbench report` lists why")


_DIGITS = "%.7g"
"""of numbers in a .csv: more than a figure can show"""
_METADATA: dict[str, dict[str, Any]] = {".pdf": {"CreationDate": None, "ModDate": None, "Creator": "attnbench", "Producer": None}}
"""Nothing of the moment, so that the same records give the same bytes."""


def write(figure: Figure, data: pd.DataFrame, stem: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Write a figure as .pdf and .png, and what is in it as .csv, each whole or not at all. Returns the paths. Raises `UserError`."""
    from attnbench.errors import UserError
    from attnbench.files import make_folder, replacing

    paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
    make_folder(stem.parent)
    try:
        with _laid_out(figure):
            for path in paths:
                with replacing(path) as fresh:
                    if path.suffix == ".csv":
                        data.to_csv(fresh, index=False, float_format=_DIGITS)
                    elif path.suffix == ".png":
                        _save_png(figure, fresh)
                    else:
                        _save_vectors(figure, fresh, path.suffix)
    except OSError as error:
        raise UserError(f"cannot write to {stem.parent}: {error.strerror}") from None
    return paths


@contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """Lay the figure out once, as its pixels need it, and leave everything in its place for each format that is written."""
    from matplotlib import rcParams

    engine, dpi = figure.get_layout_engine(), figure.dpi
    figure.set_dpi(dpi if rcParams["savefig.dpi"] == "figure" else rcParams["savefig.dpi"])
    try:
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)
        yield
    finally:
        figure.set_layout_engine(engine)
        figure.set_dpi(dpi)


def _save_vectors(figure: Figure, path: Path, suffix: str) -> None:
    """Drawn in memory, since Matplotlib's own writer takes a full disk for a fault of its compression."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:], metadata=_METADATA[suffix])
    path.write_bytes(buffer.getbuffer())


def _save_png(figure: Figure, path: Path) -> None:
    """With a palette of 256 colours that keeps the rare ones, and so the colours of families; it takes a third of the space."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, "PNG")
