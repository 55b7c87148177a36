"""Settings and small inputs of methods with learned projections, for their tests."""

from __future__ import annotations

import torch

import attnbench
from attnbench.method import Shape

SETTINGS = {
    "inline": [{}, {"kernel": "relu"}, {"kernel": "leakyrelu"}, {"kernel": "exp"}, {"conv": 3}, {"conv": 5, "kernel": "exp"}],
    "mhla": [
        {},
        {"grid": "none", "blocks": 7},
        {"blocks": 6, "transform": "linear", "conv": 3},
        {"blocks": 4, "transform": "gaussian", "normalizer": "none"},
        {"grid": "none", "blocks": 5, "transform": "local"},
        {"blocks": 1, "transform": "exp"},
    ],
    "linformer": [{"rank": 5}, {"rank": 4, "per_head": True}, {"rank": 7, "share": True}, {"rank": 3, "per_head": True, "share": True}],
    "pvt": [{"reduction": 3}, {"reduction": 2, "per_head": True}, {"reduction": 4}, {"pool": 3}, {"pool": 2, "per_head": True}],
}
CASES = [(name, setting) for name, settings in SETTINGS.items() for setting in settings]
REPO = {"blocks": 4, "normalizer": "repo"}


def make(n, kv_heads=2, *, heads=4, dim=6, dim_v=5, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim_v)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def prepared(name, setting, qkv, seed=3):
    """A method, its parameters, and learned weights moved off their initial values."""
    method = attnbench.get(name)
    params, shape = method.parse(setting), Shape.of(*qkv)
    assert not params.problems(shape)
    generator = torch.Generator().manual_seed(seed)
    drawn = method.initial(shape, params, qkv[0])
    return method, params, {k: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for k, x in drawn.items()}


def repeated(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)
