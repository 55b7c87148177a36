"""Trained accuracy against the time of a call."""

from attnbench.figures._earned import Against

NAME = "accuracy_time"
_AGAINST = Against("latency")
groups, data, build = _AGAINST.groups, _AGAINST.data, _AGAINST.build
