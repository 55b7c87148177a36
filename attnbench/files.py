"""Files that are written whole or not at all: whatever happens, a path holds what it held before or all of what was to stand there."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what stands there at the end takes the place of `path`, unless an error ends the writing.

    A link stays one, the file that it leads to is replaced. What is no file, as `/dev/stdout`, is written to as it is. Raises `OSError`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    target = Path(os.path.realpath(path))
    fresh = target.with_name(target.name + ".new")
    try:
        yield fresh
        fresh.replace(target)
    except BaseException:
        with suppress(OSError):  # as where the folder is a file
            fresh.unlink(missing_ok=True)
        raise


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Only one process at a time makes what is to stand at `path`; the others wait, and then find it there.

    Where the folder takes no file, each makes its own.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("a")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(path: Path, data: str | bytes | memoryview, *, parents: bool = True, remedy: str = "") -> None:
    """Write `data`, a text as UTF-8, and where `parents` the folder too where it is absent. It is on the disk when this returns.

    Raises `UserError`, in which `remedy` is what to do; what `path` held is then as it was.
    """
    if path.is_dir():
        raise UserError(f"cannot write: {path} is a folder: name a file")
    if parents:
        make_folder(path.parent)
    try:
        with replacing(path) as fresh, fresh.open("wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            if fresh.is_file():  # a device or a pipe has no disk
                os.fsync(f.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}{f'; {remedy}' if remedy else ''}") from None


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where it is absent. Raises `UserError`."""
    hold_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


def hold_folder(path: Path) -> None:
    """Raise `UserError` where `path`, or one above it, is something else than a folder."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise UserError(f"cannot write: {part} is a file: name a folder")
