"""`attnbench check`."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from attnbench.cli._options import DeviceOption, Json, Plugins, complete_method, with_plugins
from attnbench.cli._output import complain, emit_json, emit_table
from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnbench.method import Implementation, Method, Params, Shape
    from attnbench.record import Gate

_SIZES = ((2, 2, 63, 32), (1, 4, 100, 64, 2), (1, 2, 257, 64))
"""B, H, N, D, Hkv: odd lengths, and fewer key heads than query heads."""
_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Check:
    """One implementation at one shape."""

    implementation: str
    shape: str
    dtype: str
    mode: str
    verdict: Literal["passed", "failed", "unsupported"]
    what: str
    """the measure that came nearest to its bound, or the reasons"""
    error: float | None = None
    bound: float | None = None


def check(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method, or NAME@IMPLEMENTATION.", autocompletion=complete_method)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every method.")] = False,
    device: DeviceOption = None,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """Hold implementations against their method's float64 definition, as every run does before it times one. Exit code 1 on a failure."""
    from attnbench.environment import pick_device
    from attnbench.registry import get, methods

    with_plugins(plugin)
    if (name is None) != every:
        raise UserError("name a method, or give --all: one of the two")
    kind = pick_device(device)
    found = [row for each in ([name] if name else methods()) for row in checks(get(each), kind)]
    emit_json([asdict(row) for row in found]) if json else emit_table([_line(row) for row in found])
    failed = sum(row.verdict == "failed" for row in found)
    complain(f"{len(found)} checks, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def _line(row: Check) -> dict[str, str]:
    numbers = {"error": "" if row.error is None else f"{row.error:.2e}", "bound": "" if row.bound is None else f"{row.bound:.2e}"}
    return {key: str(value) for key, value in asdict(row).items()} | numbers


def checks(method: "Method", device: str) -> "Iterator[Check]":
    """Every implementation of a method (or the pinned one) at several shapes and dtypes, causal too."""
    from attnbench.method import Shape

    for item in [method.implementation(method.pinned)] if method.pinned else method.all_implementations():
        for size in _SIZES:
            shape = Shape(*size)
            for causal in (False, True):
                params = method.parse({**method.params().fitted(shape).as_dict(), "causal": causal})
                for dtype in _DTYPES[device]:
                    yield _check(method, item, shape, params, dtype, device)


def _check(method: "Method", item: "Implementation", shape: "Shape", params: "Params", dtype: str, device: str) -> Check:
    import torch

    from attnbench.check import gate
    from attnbench.inputs import draw

    kind = getattr(torch, dtype)
    problems = params.problems(shape) or method.reasons(item, shape, kind, device, params)
    backward = not method.reasons(item, shape, kind, device, params, backward=True)
    heads = f"{shape.heads}" + (f"/{shape.kv_heads}" if shape.kv_heads != shape.heads else "")
    where = (f"{method.name}@{item.name}", f"B={shape.batch} H={heads} N={shape.n} D={shape.dim}", dtype)
    mode = ("causal " if params.causal else "") + ("forward+backward" if backward else "forward")
    if problems:
        return Check(*where, mode, "unsupported", "; ".join(problems))
    try:
        verdict = gate(method, item, params, draw("randn", shape, 0, kind, device), backward=backward)
    except Exception as error:  # an implementation may raise anything, and the others are still to be checked
        return Check(*where, mode, "failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return Check(*where, mode, "passed" if verdict.passed else "failed", **_worst(verdict))


def _worst(verdict: "Gate") -> dict[str, Any]:
    """The measure nearest to, or furthest beyond, its bound."""
    name = max(verdict.errors, key=lambda key: verdict.errors[key] / max(verdict.bounds[key], 1e-300))
    return {"what": name, "error": verdict.errors[name], "bound": verdict.bounds[name]}
