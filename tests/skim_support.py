"""Settings and small inputs of Spark attention and DeepSeek sparse attention, for their tests."""

from __future__ import annotations

import torch

from attnbench.method import Shape

SPARK = [{"topk": 5}, {"topk": 3, "predictor": 3, "unbiased": True}, {"topk": 8, "predictor": 7, "scale": "whole"}, {"topk": 1}]
DSA = [{"topk": 5}, {"topk": 7, "index_heads": 3, "index_dim": 5}, {"topk": 1, "index_heads": 1, "index_dim": 1}]
CASES = [*(("spark", s) for s in SPARK), *(("dsa", s) for s in DSA)]
BOTH = [("spark", SPARK[0]), ("dsa", DSA[0])]


def make(n, kv_heads=4, *, keys=None, heads=4, dim=8, dim_v=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, n, dim), (2, kv_heads, keys or n, dim), (2, kv_heads, keys or n, dim_v)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def options(method, qkv, params, seed=3):
    """Learned parameters, the same for every form, moved off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = method.initial(Shape.of(*qkv), params, qkv[0])
    return (
        {"weights": {name: x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in drawn.items()}}
        if drawn
        else {}
    )
