"""Suites as they are written down: TOML files, those of the package or a user's own."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.axes import BUDGET, CHOICES, axis_name, axis_values, listed
from attnbench.case import TRAINED
from attnbench.errors import UserError, unknown
from attnbench.protocol import Protocol
from attnbench.suite import Entry, Suite

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


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
        data = _parsed(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read suite {path}: {error.strerror}") from None
    return replace(_suite(path.stem, data, str(path)), source=name)


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    """What the file says. Raises `UserError`, which names the line that is at fault."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"suite {path}, line {line}: byte {raw[error.start]:#x} is no UTF-8: save the file as UTF-8") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        why = str(error).replace("(at end of document)", f"(at the end of what begins at line {_last_begun(text)})")
        raise UserError(f"suite {path} is not valid TOML: {why}") from None


def _last_begun(text: str) -> int:
    """Line at which the statement begins that the end of the text leaves open: all before it is TOML."""
    lines = text.splitlines()
    for count in range(len(lines) - 1, 0, -1):
        with suppress(tomllib.TOMLDecodeError):
            tomllib.loads("\n".join(lines[:count]))
            return count + 1
    return 1


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
            axes[axis_name(key, path)] = axis_values(key, value, path)
    points = tuple({axis_name(k, path): axis_values(k, v, path) for k, v in point.items()} for point in data.get("point", ()))
    _needs(data["task"], {**axes, **(points[0] if points else {})}, path)
    measure = data.get("measure", {})
    _known(measure, [f.name for f in fields(Protocol)], f"{path} [measure]")
    entries = []
    budgets = any(BUDGET in part for part in (axes, *points))
    for table in data["method"]:
        if "name" not in table:
            raise UserError(f"{path}: a [[method]] lacks its name")
        swept = frozenset(k for k, v in table.items() if isinstance(v, list)) if budgets else frozenset()
        entries.append(Entry(table["name"], {k: listed(v) for k, v in table.items() if k != "name"}, swept))
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
