"""`attnbench env`."""

from collections.abc import Mapping
from typing import Any

from attnbench.cli._options import DeviceOption, Json
from attnbench.cli._output import emit_json, emit_table


def env(device: DeviceOption = None, json: Json = False) -> None:
    """Show this machine: device, versions, and which optional packages are missing and how to get them."""
    from attnbench import environment

    facts = environment.collect(environment.pick_device(device))
    facts |= {"commit": environment.commit(), "env_id": environment.env_id(facts), "missing": environment.missing()}
    if json:
        return emit_json(facts)
    emit_table([{"fact": key, "value": value} for key, value in _flat(facts)])
    return None


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as `outer.inner` pairs."""
    pairs: list[tuple[str, Any]] = []
    for key, value in facts.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs
