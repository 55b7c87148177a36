"""Time per call against sequence length."""

from attnbench.figures._facets import Facets

NAME = "latency"
_FACETS = Facets("latency", by="mode", task="speed")
data, build = _FACETS.data, _FACETS.build
