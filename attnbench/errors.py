"""What a user did wrong, and what was raised, said in one line."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


PLUGIN = "attnbench_plugin_"
"""how the names of modules begin that are files of a user"""


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what is wrong, and what to do. The CLI exits with 2."""


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> UserError:
    """A `UserError` for a name that is not among `known`, with near names first."""
    options = sorted(known)
    near = get_close_matches(str(name), options, n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(options) or 'nothing: none exist'}"
    place = f" in {where}" if where else ""
    return UserError(f"unknown {kind} {str(name)!r}{place}: {advice}")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is `here` and differs `there`, each with both values, as messages name it."""
    return [f"{key} = {there.get(key)!r} there, {value!r} here" for key, value in here.items() if there.get(key) != value]


def raised(error: Exception) -> str:
    """An exception's kind, the first line of what it says, and the line of the plugin that it passed through last, if any."""
    text = str(error).strip().partition("\n")[0][:300]
    within = [frame for frame in walk_tb(error.__traceback__) if frame[0].f_globals.get("__name__", "").startswith(PLUGIN)]
    where = f" ({Path(within[-1][0].f_code.co_filename).name}, line {within[-1][1]})" if within else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"
