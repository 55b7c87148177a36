"""Tokens per second against sequence length."""

from attnbench.figures._facets import Facets

NAME = "throughput"
_FACETS = Facets("throughput", by="mode", task="speed")
data, build = _FACETS.data, _FACETS.build
