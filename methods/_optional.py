"""Ways to import optional packages that stand in each other's way."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def installed(distribution: str) -> str:
    """`name version`, or the name alone where the installation has no metadata."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


@contextmanager
def flash_attn_hidden() -> Iterator[None]:
    """Within it, a `flash_attn` that lacks `flash_attn_interface` (that of flash-attn-4) looks as if it were not installed.

    xformers 0.0.35 takes any package of that name for flash-attn 2.x and fails to import. A usable one stays visible.
    """
    if _has_interface():
        yield
        return
    absent = object()
    before = sys.modules.get("flash_attn", absent)
    sys.modules["flash_attn"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is absent:
            del sys.modules["flash_attn"]
        else:
            sys.modules["flash_attn"] = before  # type: ignore[assignment]


def _has_interface() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
    except (ImportError, ValueError):  # no flash_attn, one that cannot be imported, or one without a spec
        return False


def preload_cuda_runtime(library: str = "libcudart.so.12") -> Path | None:
    """Make the runtime of package nvidia-cuda-runtime-cu12 loadable by name, and say where it lies; None where it is not installed.

    xformers 0.0.35 is linked to it, while a torch for CUDA 13 brings another. Raises `OSError` where the file is damaged.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "cuda_runtime" / "lib" / library
        if path.is_file():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return path
    return None
