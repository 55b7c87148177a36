"""`attnbench suites`."""

from attnbench.cli._options import Json
from attnbench.cli._output import emit_json, emit_table


def suites(json: Json = False) -> None:
    """List the built-in suites and the questions they ask."""
    from attnbench.suite_file import available, load

    found = [load(name) for name in available()]
    rows = [
        {"suite": s.name, "task": s.task, "methods": len(s.methods), "n": " ".join(map(str, s.axes.get("n", ()))), "question": s.question}
        for s in found
    ]
    if json:
        emit_json(rows)
    else:
        emit_table(rows)
