"""Every method that can be found: the built-in folder, installed plugins, and files or folders named by the user."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.errors import PLUGIN, UserError, unknown
from attnbench.method import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
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
            method = _checked(load(), name)
        except (Exception, SystemExit) as error:  # a plugin may raise anything, and must not hide the others
            self.failed[name] = FailedImport(name, source, _told(error, source), traceback.format_exc())
            return
        self.failed.pop(name, None)
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


def _checked(value: object, name: str) -> Method:
    """The method that a module or an entry point holds. Raises `UserError`."""
    method = getattr(value, "METHOD", value)
    if not isinstance(method, Method):
        raise UserError("it exports no METHOD of type attnbench.method.Method: add one, or begin the name of a helper's file with _")
    if method.name != name:
        raise UserError(f"METHOD.name is {method.name!r}, but its file or entry point is named {name!r}: make them equal")
    return method


def _told(error: BaseException, source: str) -> str:
    """What went wrong while a method was loaded, in one line, with the line of its file where there is one."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UserError):
        return text
    if lacking := re.search(r"\bMethod\.__init__\(\) missing .* arguments?: (.*)", text):
        names = re.findall(r"'(\w+)'", lacking[1])
        return f"METHOD lacks {', '.join(names)}: give Method({', '.join(f'{name}=...' for name in names)}), as `attnbench new` writes it"
    if strange := re.search(r"\bMethod\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        return str(unknown("field", strange[1], [f.name for f in fields(Method)], "METHOD"))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(source).absolute()]
    return f"{type(error).__name__}: {text or 'no message'}" + (f" (line {lines[-1]})" if lines else "")


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


def add_plugins(paths: Iterable[Path]) -> list[FailedImport]:
    """Add the methods of files, or of all files of folders, and return what failed to load.

    Raises `UserError` for a path that does not exist, or holds nothing, and for a name that is taken.
    """
    failed = []
    for path in paths:
        for file in plugin_files(path):
            name, source = file.stem, str(file)
            if registry().sources.get(name) != source:
                registry().add(name, source, lambda file=file: _load_file(file))  # type: ignore[misc]
            failure = registry().failed.get(name)
            failed += [failure] if failure and failure.source == source else []
    return failed


def plugin_files(path: Path) -> list[Path]:
    """The files of methods at a path: itself, or those of a folder whose names begin with no underscore. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"plugin {path} does not exist: give a .py file or a folder of them")
    files = sorted(p for p in path.glob("*.py") if not p.name.startswith("_")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"plugin folder {path} holds no .py file")
    return files


def _load_file(path: Path) -> ModuleType:
    name = f"{PLUGIN}{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
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


def built_in(name: str) -> bool:
    """Whether a method is one of this package, so that its name tells what is in it."""
    return registry().sources.get(name.partition("@")[0], "").startswith(f"{_builtin_package().__name__}.")


def get(name: str) -> Method:
    """The method called `name`, or pinned to one implementation by `name@implementation`.

    Raises `UserError` with near names where there is no such method.
    """
    return registry().get(name)
