"""Checkpoints: written atomically, read only where they are of the same model and recipe."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

from attnbench import files
from attnbench.environment import commit
from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 3


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace `path` by `state` and the commit of this code, so that at any moment it is the old file or the new one.

    Raises `UserError` where it cannot be written; the old file is then as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "commit": commit(), **state}, buffer)
    files.write(path, buffer.getbuffer(), remedy="the checkpoint before it is as it was: free space and run again")


def load(path: Path, remedy: str = "delete it to train from the start") -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Raises `UserError` for a file that is damaged or of another format; `remedy` says what to do, and as it stands is meant for a run that
    goes on from a file of its own: whoever opens a file that somebody named must not tell them to delete it.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # whatever unpickling makes of a file that is something else
        raise UserError(f"{path} is no checkpoint, or is damaged: {remedy}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version: {remedy}")
    return state


def of_other_code(state: Mapping[str, Any], what: str) -> list[str]:
    """A note that `what` a checkpoint holds was done by other code than this; empty where it was not."""
    there = state.get("commit", "")
    return [] if there == commit() else [f"{what} at commit {there or 'unknown'}, which a checkpoint holds"]


def hold(path: Path, what: str, differences: list[str]) -> None:
    """Raises `UserError` where a checkpoint is of another `what`: the first few differences, in one line."""
    if differences:
        raise UserError(f"{path} is of another {what} ({'; '.join(differences[:3])}): delete it, or train into another folder")


def hold_weights(wrong: list[str]) -> None:
    """Raises `UserError` where weights of a state and a model do not match, by the first few names."""
    if wrong:
        raise UserError(f"weights are of another model ({', '.join(wrong[:3])}): give both the same width, depth, N and positions")
