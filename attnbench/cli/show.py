"""`attnbench show`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli._options import DeviceOption, Json, Plugins, complete_method, with_plugins
from attnbench.cli._output import emit_json, emit_table, si
from attnbench.errors import UserError

if TYPE_CHECKING:
    from attnbench.method import Method, Shape


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method.", autocompletion=complete_method)],
    n: Annotated[int, typer.Option("--n", help="Queries and keys at which the cost is counted.")] = 4096,
    batch: Annotated[int, typer.Option("--batch")] = 1,
    heads: Annotated[int, typer.Option("--heads")] = 16,
    dim: Annotated[int, typer.Option("--dim", help="Head dimension.")] = 64,
    set_: Annotated[list[str], typer.Option("--set", metavar="PARAM=VALUE", help="Another parameter for the cost. Repeatable.")] = [],
    device: DeviceOption = None,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """Show one method: coordinates, source, parameters, implementations, limits, and cost at a size."""
    from attnbench.method import Shape
    from attnbench.registry import get

    with_plugins(plugin)
    method = get(name)
    facts = _facts(method, Shape(batch, heads, n, dim), set_, device)
    if json:
        emit_json(facts)
    else:
        _print(facts)


def _facts(method: "Method", shape: "Shape", settings: list[str], device: str | None) -> dict[str, Any]:
    from attnbench.cli._describe import implementations, limits, parameters
    from attnbench.environment import pick_device

    return {
        "name": method.name,
        "title": method.title,
        "family": str(method.family),
        "coordinates": method.coordinates.as_dict(),
        "citation": vars(method.citation),
        "exact": method.exact,
        "parameters": parameters(method.params),
        "budget": sorted(method.budget(shape, method.params(), 1)) if method.budget else [],
        "no_budget": method.no_budget,
        "implementations": implementations(method, pick_device(device)),
        "limits": limits(method.limits),
        "cost": _cost(method, shape, settings),
    }


def _cost(method: "Method", shape: "Shape", settings: list[str]) -> dict[str, Any]:
    """FLOP by stage. Parameters left at their defaults are fitted to the size; those given must fit as they are."""
    given = dict(_setting(text) for text in settings)
    params = method.parse({**method.params().fitted(shape).as_dict(), **given})
    if problems := params.problems(shape):
        raise UserError(f"{method.name}: {'; '.join(problems)}")
    cost = method.cost(shape, params)
    return {
        "n": shape.n, "batch": shape.batch, "heads": shape.heads, "dim": shape.dim, "params": params.as_dict(),
        "flops": dict(cost.flops), "forward_flops": cost.total(), "forward+backward_flops": cost.total("forward+backward"),
        "elements": cost.elements, "index_bytes": cost.index_bytes,
    }  # fmt: skip


def _width(facts: dict[str, Any]) -> str:
    if facts["budget"]:
        return f"what a query reads is set by {', '.join(facts['budget'])} (--budget)"
    return f"--budget cannot set what a query reads: {facts['no_budget']}" if facts["no_budget"] else "what a query reads is fixed"


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: there is no '=' after a name: write it as topk=32")
    return key.rpartition(".")[2].strip(), value.strip()


def _print(facts: dict[str, Any]) -> None:
    source, cost = facts["citation"], facts["cost"]
    print(f"{facts['title']} ({facts['name']}): {facts['family']}")
    print(", ".join(str(part) for part in (source["authors"], source["year"], source["title"], source["venue"], source["url"]) if part))
    emit_table([facts["coordinates"]])
    emit_table(facts["parameters"], "parameters")
    print(_width(facts))
    emit_table(
        [{k: "; ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in facts["implementations"]], "implementations"
    )
    emit_table([facts["limits"]], "limits of the definition")
    stages = {**cost["flops"], "forward": cost["forward_flops"], "forward+backward": cost["forward+backward_flops"]}
    title = f"cost at B={cost['batch']} H={cost['heads']} N={cost['n']} D={cost['dim']}"
    emit_table([{"stage": stage, "work": si(flops, "FLOP")} for stage, flops in stages.items()], title, right=["work"])
