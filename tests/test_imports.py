"""Imports point one way, and importing every method stays cheap."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import attnbench

CORE = Path(attnbench.__file__).parent
METHODS = Path(importlib.import_module("attnbench.methods").__file__ or "").parent
STANDARD = sys.stdlib_module_names
CONTRACT = {f"attnbench.{name}" for name in ("method", "taxonomy", "fastweights", "eager", "errors", "sdpa", "stages")}


def sources(folder: Path, package: str) -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = sources(CORE, "attnbench") | sources(METHODS, "attnbench.methods")
KERNELS = [m for m in MODULES if m.startswith("attnbench.kernels")]
PLUGGABLE = [m for m in MODULES if m.startswith("attnbench.methods.")]
REST = [m for m in MODULES if m not in KERNELS and not m.startswith("attnbench.methods")]


def imports(module: str, *, everywhere: bool = True) -> set[str]:
    """Modules that a module imports, those for type checkers left out; `everywhere` includes imports inside functions."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= _targets(module, node)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def _targets(module: str, node: ast.ImportFrom) -> set[str]:
    """`from a import b` means `a.b` where that is a module of ours, else `a`."""
    base = node.module or ""
    if node.level:
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = f"{package}.{base}".rstrip(".")
    return {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}


def top(module: str) -> str:
    return module.partition(".")[0]


def test_the_walk_sees_imports() -> None:
    assert imports("attnbench.methods.agent") >= {"dataclasses", "attnbench.method", "attnbench.methods._landmarks"}
    assert "attnbench.cli.run" in imports("attnbench.cli")
    assert "attnbench.runner" in imports("attnbench.cli.run")
    assert "attnbench.runner" not in imports("attnbench.cli.run", everywhere=False)


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_torch_and_triton_alone(module: str) -> None:
    wrong = {m for m in imports(module) if top(m) not in STANDARD | {"torch", "triton"} and not m.startswith("attnbench.kernels")}
    assert not wrong


@pytest.mark.parametrize("module", PLUGGABLE)
def test_methods_import_their_contract_and_siblings(module: str) -> None:
    ours = {m for m in imports(module) if top(m) == "attnbench"}
    assert not {m for m in ours if m not in CONTRACT and not m.startswith(("attnbench.methods.", "attnbench.kernels"))}


@pytest.mark.parametrize("module", [m for m in PLUGGABLE if not m.rpartition(".")[2].startswith("_")])
def test_methods_reach_no_optional_package_when_imported(module: str) -> None:
    seen: set[str] = set()
    pending = [module]
    while pending:
        new = imports(pending.pop(), everywhere=False) - seen
        seen |= new
        pending += [m for m in new if m in PLUGGABLE]
    assert not {m for m in seen if top(m) not in STANDARD | {"torch", "attnbench"} or m.startswith("attnbench.kernels")}


@pytest.mark.parametrize("module", REST)
def test_the_core_imports_no_method_and_no_kernel(module: str) -> None:
    wrong = {m for m in imports(module) if m.startswith(("attnbench.methods.", "attnbench.kernels"))}
    assert not wrong or module.startswith("attnbench.nn")


@pytest.mark.parametrize("module", REST)
def test_the_core_names_no_method(module: str) -> None:
    words = {"linear", "softmax"}  # also the activations of hidden units
    names = set(attnbench.methods()) - words
    if module == "attnbench.environment":
        names -= {"xformers"}  # there a package
    if module == "attnbench.nn.mita":
        names -= {"mita"}  # the layer of that method
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert not names & {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_the_command_line_is_imported_by_nobody_and_figures_only_by_it() -> None:
    for module in MODULES:
        targets = imports(module)
        if not module.startswith(("attnbench.cli", "attnbench.__main__")):
            assert not {m for m in targets if m.startswith("attnbench.cli") or m == "attnbench.runner"}, module
            if not module.startswith("attnbench.figures"):
                assert not {m for m in targets if m.startswith("attnbench.figures")}, module


def test_no_two_modules_wait_for_each_other() -> None:
    graph = {m: {t for t in imports(m, everywhere=False) if t in MODULES and t != m} for m in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("attnbench.method") < order.index("attnbench.case") < order.index("attnbench.runner")


def fresh(code: str) -> str:
    """What `code` prints in a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_importing_every_method_imports_no_triton_and_touches_no_gpu() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import attnbench
from attnbench.registry import registry
assert len(attnbench.methods()) >= 10 and not registry().failed, registry().failed
new = set(sys.modules) - before
optional = sorted(m for m in new if m.partition('.')[0] in ('triton', 'xformers', 'flash_attn'))
print(optional, 'triton' in sys.modules, torch.cuda.is_initialized())
"""
    assert fresh(code) == "[] False False"


def test_help_waits_for_no_torch() -> None:
    assert fresh("import sys, attnbench.cli; print('torch' in sys.modules, 'pandas' in sys.modules)") == "False False"


def test_the_folder_of_methods_refuses_to_be_imported_under_its_own_name() -> None:
    code = f"import sys; sys.path.insert(0, {str(METHODS.parent)!r})\ntry:\n import {METHODS.name}\nexcept ImportError as e: print(e)"
    assert "import attnbench.methods, not methods" in fresh(code)
