"""Energy per token against sequence length, where the GPU reports it."""

from attnbench.figures._facets import Facets

NAME = "energy"
_FACETS = Facets("energy", by="mode", task="speed")
data, build = _FACETS.data, _FACETS.build
