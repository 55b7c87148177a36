"""Load of the busiest expert against sequence length, a panel for each way to route."""

from attnbench.figures._facets import Facets

NAME = "load"
_FACETS = Facets("max_load", by="profile", task="health")
data, build = _FACETS.data, _FACETS.build
