"""Every method that can be found: the built-in folder, installed plugins, and files or folders named by the user."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from attnbench.errors import UserError, unknown
from attnbench.method import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import ModuleType

GROUP = "attnbench.methods"
"""Entry-point group of third-party packages; each entry names a module that has `METHOD`, or the value itself."""


@dataclass(frozen=True)
class FailedImport:
    """A method that could not be loaded; the others keep working."""

    name: str
    source: str
    """file or entry point"""
    error: str
    """one line"""
    trace: str


@dataclass
class Registry:
    """Methods by name, and what failed to load."""

    found: dict[str, Method] = field(default_factory=dict)
    failed: dict[str, FailedImport] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, source: str, load: Callable[[], object]) -> None:
        """Load one method; an exception becomes a `FailedImport`. A name taken already raises `UserError`."""
        try:
            value = load()
            method = getattr(value, "METHOD", value)
            if not isinstance(method, Method):
                raise TypeError(f"{source} exports no METHOD of type attnbench.method.Method")  # noqa: TRY301
            if method.name != name:
                raise ValueError(f"METHOD.name is {method.name!r}, but it is loaded as {name!r}: make them equal")  # noqa: TRY301
        except Exception as error:  # a plugin may raise anything, and must not hide the others
            first = str(error).splitlines()[0] if str(error) else ""
            self.failed[name] = FailedImport(name, source, f"{type(error).__name__}: {first}", traceback.format_exc())
            return
        if name in self.found:
            raise UserError(f"method {name!r} is defined twice, in {self.sources[name]} and in {source}: rename one")
        self.found[name], self.sources[name] = method, source

    def get(self, name: str) -> Method:
        """The method called `name`, or `name@implementation`. Raises `UserError`."""
        base, _, pinned = name.partition("@")
        if base in self.failed and base not in self.found:
            failure = self.failed[base]
            raise UserError(f"method {base!r} failed to load from {failure.source}: {failure.error}")
        if base not in self.found:
            raise unknown("method", base, self.found)
        method = self.found[base]
        if pinned:
            method.implementation(pinned)
        return _pin(method, pinned) if pinned else method


@cache
def _pin(method: Method, implementation: str) -> Method:
    """One object for one label, so that compiled layers of the same method share a graph."""
    return replace(method, pinned=implementation)


@cache
def registry() -> Registry:
    """The registry of this process: built-in methods and entry points; `add_plugins` extends it."""
    result = Registry()
    package = _builtin_package()
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if not info.name.startswith("_"):
            module = f"{package.__name__}.{info.name}"
            result.add(info.name, module, lambda module=module: importlib.import_module(module))  # type: ignore[misc]
    for point in entry_points(group=GROUP):
        result.add(point.name, f"entry point {point.value}", point.load)
    return result


def _builtin_package() -> ModuleType:
    try:
        return importlib.import_module("attnbench.methods")
    except ModuleNotFoundError as error:
        if error.name != "attnbench.methods":
            raise
        raise UserError("attnbench is not installed: run `pip install -e .` in the checkout") from None


def add_plugins(paths: Iterable[Path]) -> None:
    """Add the methods of files, or of all files of folders. Raises `UserError` for a path that does not exist."""
    for path in paths:
        if not path.exists():
            raise UserError(f"plugin {path} does not exist: give a .py file or a folder of them")
        files = sorted(p for p in path.glob("*.py") if not p.name.startswith("_")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"plugin folder {path} holds no .py file")
        for file in files:
            if registry().sources.get(file.stem) != str(file):
                registry().add(file.stem, str(file), lambda file=file: _load_file(file))  # type: ignore[misc]


def _load_file(path: Path) -> ModuleType:
    name = f"attnbench_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that dataclasses and lazy targets find it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def methods() -> list[str]:
    """Names of all methods that loaded."""
    return sorted(registry().found)


def get(name: str) -> Method:
    """The method called `name`, or pinned to one implementation by `name@implementation`.

    Raises `UserError` with near names where there is no such method.
    """
    return registry().get(name)
