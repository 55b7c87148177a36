"""Layers that a method is plugged into to be trained."""

from .attention import AttentionLayer
from .mita import MiTAAttention

__all__ = ["AttentionLayer", "MiTAAttention"]
