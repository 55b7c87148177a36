"""Settings and small inputs of deformable attention and DAT, for their tests."""

from __future__ import annotations

import torch

from attnbench.method import Shape

DAT = [
    {},
    {"points": 9, "bias": True},
    {"stride": 2, "kernel": 3, "reach": 2.0, "bias": True},
    {"stride": 3, "kernel": 3, "reach": 0.0},
    {"release": "2022", "stride": 2, "kernel": 5, "bias": True},
    {"release": "2022", "stride": 2, "reach": 1.5, "bias": True},
    {"release": "2022", "stride": 3, "reach": 0.0},
]
CASES = [("deformable", {}), ("deformable", {"points": 3}), *(("dat", setting) for setting in DAT)]
PRACTICAL = {"deformable": "chunked", "dat": "sdpa"}


def make(method, setting, n=35, kv_heads=4, *, heads=4, dim=6, dim_v=5, dtype=torch.float64, moved=0.3):
    """q, k, v, parameters, and learned parameters moved off their initial values."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, dim), (2, kv_heads, n, dim), (2, kv_heads, n, dim_v)]
    qkv = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    params = method.parse(setting)
    drawn = method.initial(Shape.of(*qkv), params, torch.empty(0, dtype=torch.float64))
    return qkv, params, {name: (x + moved * torch.randn(x.shape, generator=g, dtype=x.dtype)).to(dtype) for name, x in drawn.items()}


def practical(method):
    return method.function(method.implementation(PRACTICAL[method.name]))
