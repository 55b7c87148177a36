"""`attnbench env`."""

from attnbench.cli._options import DeviceOption, Json
from attnbench.cli._output import emit_json, emit_table


def env(device: DeviceOption = None, json: Json = False) -> None:
    """Show this machine: device, versions, and which optional packages are missing and how to get them."""
    from attnbench import environment

    facts = environment.collect(environment.pick_device(device))
    facts |= {"commit": environment.commit(), "env_id": environment.env_id(facts), "missing": environment.missing()}
    if json:
        return emit_json(facts)
    emit_table([{"fact": ".".join(path), "value": value} for path, value in environment.leaves(facts)])
    return None
