"""attnbench: speed, memory and accuracy of efficient attention, over the taxonomy of fast-weight scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnbench.method import Method

__version__ = "0.1.0"
__all__ = ["__version__", "get", "methods"]


def methods() -> list[str]:
    """Names of all methods that loaded: built in, from installed packages, and from plugins added."""
    from attnbench import registry  # imports torch, which `attnbench --help` can do without

    return registry.methods()


def get(name: str) -> Method:
    """The method called `name`, or pinned to one implementation by `name@implementation`.

    Raises `UserError` with near names where there is no such method.
    """
    from attnbench import registry

    return registry.get(name)
