"""Peak memory against sequence length."""

from attnbench.figures._facets import Facets

NAME = "memory"
_FACETS = Facets("peak_memory", by="mode", task="speed")
data, build = _FACETS.data, _FACETS.build
