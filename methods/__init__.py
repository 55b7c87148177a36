"""The methods that attnbench compares, one a file; a name with a leading underscore is a helper."""

import sys
from types import ModuleType

if __name__ != "attnbench.methods":
    raise ImportError("import attnbench.methods, not methods: run `pip install -e .` in the checkout")


class _Methods(ModuleType):
    """Importing this package binds it over the function `attnbench.methods`; being callable, it answers as that does."""

    def __call__(self) -> list[str]:
        """Names of all methods that loaded."""
        from attnbench import registry

        return registry.methods()


sys.modules[__name__].__class__ = _Methods
