"""Layers that a method is plugged into to be trained, and a small model made of them."""

from ._operator import told
from .attention import AttentionLayer
from .block import Block
from .mita import MiTAAttention
from .transformer import Architecture, TinyTransformer, built

__all__ = ["Architecture", "AttentionLayer", "Block", "MiTAAttention", "TinyTransformer", "built", "told"]
