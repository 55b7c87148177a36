"""What the tests of figures share."""

from __future__ import annotations


def axes_with_lines(figure):
    return [a for a in figure.axes if a.get_xscale() == "log" and a.get_yscale() == "log"]


def captioned(figure):
    """The small print of a figure, in one line."""
    assert figure is not None
    return str(figure.get_supxlabel()).replace("\n", " ")
