"""Where output goes: data to stdout, everything else to stderr."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def complain(line: str) -> None:
    """One line to stderr, as it is."""
    print(line, file=sys.stderr)


class StdoutError(Exception):
    """Standard output cannot be written, as on a full disk: no bug, and no mistake in what was asked."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")


class Stdout(io.TextIOWrapper):
    """Standard output whose failures are told from those of other files: `StdoutError`. A broken pipe stays what it is."""

    def write(self, text: str) -> int:
        """Write a text."""
        with _told():
            return super().write(text)

    def flush(self) -> None:
        """Hand on what is kept."""
        with _told():
            super().flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(error) from None


@contextmanager
def whole_stdout() -> Iterator[None]:
    """See to it that what is printed is written by the end, else exit with 1: with a line on stderr, or none where the reader left."""
    own = sys.stdout or io.TextIOWrapper(io.BytesIO())  # None where it was closed before the start
    sys.stdout = Stdout(own.buffer, own.encoding, own.errors, line_buffering=own.isatty())
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        silence()
        sys.exit(1)
    except StdoutError as error:
        silence()
        complain(str(error))
        sys.exit(1)


def silence() -> None:
    """Let standard output lead nowhere, so that what is left of it is not tried again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def emit_json(value: object) -> None:
    """A value as indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def emit_table(rows: Rows, title: str = "", right: Sequence[str] = ()) -> None:
    """Rows as a table on stdout; the columns in `right` are aligned there. Nothing is cut off where stdout is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v).replace("|", "\\|") for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(rows: Rows) -> str:
    """Rows as a booktabs table."""
    if not rows:
        return ""
    body = [" & ".join(_tex(str(v)) for v in row.values()) + r" \\" for row in rows]
    head = " & ".join(_tex(name) for name in rows[0]) + r" \\"
    return "\n".join(
        [rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def comma_separated(rows: Rows) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def si(value: float, unit: str) -> str:
    """A value with a decimal prefix: `1.23 TFLOP`."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}" if value == 0 else f"{value / 1e-9:.3g} n{unit}"
