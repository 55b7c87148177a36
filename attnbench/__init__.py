"""attnbench: speed, memory and accuracy of efficient attention, over the taxonomy of fast-weight scaling."""

from attnbench.registry import get, methods

__version__ = "0.1.0"
__all__ = ["__version__", "get", "methods"]
