"""`attnbench list`."""

from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer

from attnbench.cli._options import Device, DeviceOption, Json, Plugins, with_plugins
from attnbench.cli._output import complain, emit_json, emit_table
from attnbench.errors import unknown


def list_methods(
    pattern: Annotated[str, typer.Argument(help="Only names that match, as 'flash*'.")] = "*",
    device: DeviceOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of each method that failed to load.")] = False,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """List methods, and which of their implementations can run here."""
    from attnbench.registry import registry

    with_plugins(plugin, refuse=False)
    rows = _methods(pattern, device)
    failed = [vars(f) for name, f in sorted(registry().failed.items()) if fnmatchcase(name, pattern)]
    if not rows and not failed:
        raise unknown("method", pattern, registry().found)
    if json:
        return emit_json({"methods": rows, "failed": failed})
    emit_table([*(line for row in rows for line in _lines(row)), *map(_failure, failed)])
    if failed:
        complain(f"failed to load: {', '.join(failure['name'] for failure in failed)}" + ("" if verbose else "; -v shows the traceback"))
    for failure in failed if verbose else ():
        complain(failure["trace"])
    return None


def _methods(pattern: str, device: Device | None) -> list[dict[str, Any]]:
    from attnbench.cli._describe import implementations
    from attnbench.environment import pick_device
    from attnbench.registry import get, methods

    kind = pick_device(device)
    found = [get(name) for name in methods() if fnmatchcase(name, pattern)]
    return [
        {"name": m.name, "title": m.title, "family": str(m.family), "library": m.library, "implementations": implementations(m, kind)}
        for m in found
    ]


def _lines(row: dict[str, Any]) -> list[dict[str, str]]:
    """One line an implementation; the method's own columns stand on the first."""
    head = {"method": row["name"], "title": row["title"], "family": row["family"]}
    lines: list[dict[str, str]] = []
    for item in row["implementations"]:
        state = "yes" if item["available"] else "no: " + "; ".join(item["reasons"])
        lines.append({**(head if not lines else dict.fromkeys(head, "")), "implementation": item["name"], "runs here": state})
    return lines


def _failure(failed: dict[str, Any]) -> dict[str, str]:
    """The line of a method that failed to load."""
    state = f"failed to load from {failed['source']}: {failed['error']}"
    return {"method": failed["name"], "title": "", "family": "", "implementation": "", "runs here": state}
