"""Distance from softmax attention against sequence length, a panel for each input profile."""

from attnbench.figures._facets import Facets

NAME = "fidelity"
_FACETS = Facets("rel_error", by="profile", task="fidelity", dense=False)
data, build = _FACETS.data, _FACETS.build
