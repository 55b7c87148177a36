"""Time per call against sequence length, a panel for each way to route."""

from attnbench.figures._facets import Facets

NAME = "routing"
_FACETS = Facets("latency", by="profile", task="health")
data, build = _FACETS.data, _FACETS.build
