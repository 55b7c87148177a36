"""What a method is and what of it can run here, as JSON-able data."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.method import Limits, Method, Params


def implementations(method: "Method", device: str) -> list[dict[str, Any]]:
    """Each implementation, best first: whether it can run on `device` here, and why not."""
    rows = []
    for item in method.all_implementations():
        wrong = [f"runs on {' and '.join(x.devices)} only" for x in (method.limits, item.limits) if device not in x.devices]
        missing = item.missing()
        reasons = list(dict.fromkeys([*wrong, *([missing] if missing else [])]))
        rows.append({"name": item.name, "available": not reasons, "reasons": reasons, "requires": list(item.requires), "note": item.note})
    return rows


def parameters(params: "type[Params]") -> list[dict[str, Any]]:
    """Each parameter: default, unit, what it means."""
    return [
        {"name": f.name, "default": f.default, "unit": f.metadata.get("unit", ""), "doc": f.metadata.get("doc", "")} for f in fields(params)
    ]


def limits(value: "Limits") -> dict[str, str]:
    """What a method takes, in words."""
    return {
        "devices": ", ".join(value.devices),
        "dtypes": ", ".join(value.dtypes),
        "head dimension": (f"at most {value.max_dim}" if value.max_dim else "any")
        + (f", a multiple of {value.dim_multiple}" if value.dim_multiple > 1 else ""),
        "causal": value.no_causal or "yes",
        "backward": value.no_backward or "yes",
        "cross-attention": "yes" if value.cross else "no",
        "grouped key heads": "yes" if value.gqa else "no",
    }
