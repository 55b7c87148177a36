"""Trained accuracy against the peak memory of a call."""

from attnbench.figures._earned import Against

NAME = "accuracy_memory"
_AGAINST = Against("peak_memory")
groups, data, build = _AGAINST.groups, _AGAINST.data, _AGAINST.build
