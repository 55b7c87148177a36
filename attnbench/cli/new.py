"""`attnbench new`."""

from importlib.resources import files as resources
from keyword import iskeyword
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from attnbench.cli._output import complain
from attnbench.errors import UserError


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the method is to be called.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where it goes. Default: NAME.py.")] = None,
) -> None:
    """Write a file with a small method that works, to be changed into your own; print its path, and what to run next."""
    from attnbench import files

    path = _path(name, out)
    files.write(path, _text(name), parents=False, remedy="give a folder that exists")
    shown = quote(str(path))
    print(path)
    complain("change it, then run")
    complain(f"  attnbench check --plugin {shown} {name}")
    complain(f"  attnbench run quick --plugin {shown} --method {name} --method softmax --results mine")


def _path(name: str, out: Path | None) -> Path:
    """Where the file goes. Raises `UserError` for a name that a method cannot have, and for a file that is there or would not be found."""
    from attnbench.registry import registry

    known = registry()
    if not name.isidentifier() or iskeyword(name) or name.startswith("_"):
        raise UserError(f"{name!r} is no name of a method: give letters, digits and underscores, a letter first, as my_method")
    if name in known.found or name in known.failed:
        raise UserError(f"there is a method {name!r} already: choose another name")
    path = out or Path(f"{name}.py")
    if path.name != f"{name}.py":
        raise UserError(f"--out {path}: the file is named as its method: give a path that ends in {name}.py")
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or another folder with --out")
    return path


def _text(name: str) -> str:
    """The template under another name: `my_method`, `My method` and `MyMethodParams`."""
    text = (resources("attnbench.methods") / "_template.py").read_text(encoding="utf-8")
    words = name.replace("_", " ").strip()
    title, kind = words[:1].upper() + words[1:], "".join(word[:1].upper() + word[1:] for word in words.split())
    for old, fresh in (
        ('"template"', f'"{name}"'),
        ("template.", f"{name}."),
        ('"Template"', f'"{title}"'),
        ("TemplateParams", f"{kind}Params"),
    ):
        text = text.replace(old, fresh)
    return text
