"""Softmax mass of the tokens that a query reads, a panel for each input profile."""

from attnbench.figures._facets import Facets

NAME = "recall"
_FACETS = Facets("mass_recalled", by="profile", task="fidelity", dense=False)
data, build = _FACETS.data, _FACETS.build
