"""Roofline floor over time: the share of the device's measured ceilings that a method reaches."""

from attnbench.figures._facets import Facets

NAME = "efficiency"
_FACETS = Facets("efficiency", by="mode", task="speed")
data, build = _FACETS.data, _FACETS.build
