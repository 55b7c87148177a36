"""What a resumed run says of earlier ones: which cells it runs again, and which it leaves alone though it might not be meant to."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench import environment, registry, store

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from attnbench.record import Record


def elsewhere(left: Collection[str], records: list[Record], known: Mapping[str, dict[str, Any]], here: str, timeout_s: float) -> list[str]:
    """A note of how many of the cells `left`, by id, are settled in other environments than `here`, and of what differs from the one that
    settled most; none where there are no such cells."""
    others = sorted({r.env_id for r in records} - {here})
    found = {key: left & store.done(records, key, timeout_s).keys() for key in others}
    if not (count := len(set().union(*found.values()))):
        return []
    most = max(others, key=lambda key: len(found[key]))
    why = environment.changes(known[most], known[here]) if most in known else []
    shown = f" ({'; '.join(why[:3])})" if why else ""
    return [f"{count} of these cells were settled in another environment{shown}: they run again"]


def edited(settled: Collection[Record]) -> list[str]:
    """A note for each plugin whose file is younger than cells of it that are left alone."""
    begun: dict[Path, float] = {}
    for record in settled:
        file = Path(registry.registry().sources.get(record.case.method, ""))
        if record.started and file.is_file() and not registry.built_in(record.case.method):
            started = datetime.fromisoformat(record.started).timestamp()
            begun[file] = min(started, begun.get(file, started))
    changed = [file for file, started in begun.items() if file.stat().st_mtime > started]
    return [
        f"{file} was changed after cells of it were settled, which are left alone: leave out --resume to run them again" for file in changed
    ]
