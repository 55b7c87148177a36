"""Deformable attention: its definition against loops, where it starts, and what it reads."""

from __future__ import annotations

import math

import pytest
import torch
from method_support import close
from offset_support import make, practical

import attnbench
from attnbench.method import Shape


def between(v, y, x, sides):
    """Value of `v: [N, Dv]` at (y, x), beyond the grid zero, corner by corner."""
    total = torch.zeros(v.shape[1], dtype=v.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < sides[0] and 0 <= j < sides[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * v[i * sides[1] + j]
    return total


def deformed(qkv, params, own):
    """Deformable attention, one query of one head at a time."""
    q, _, v = qkv
    out, sides = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), params.sides(q.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            value = v[b, h * v.shape[1] // q.shape[1]]
            for i in range(q.shape[2]):
                x = torch.cat([q[b, other, i] for other in range(q.shape[1])])
                share = (own["point_weight"][h] @ x + own["point_bias"][h]).softmax(0)
                where = own["offset_weight"][h] @ x + own["offset_bias"][h]
                reads = [between(value, i // sides[1] + float(dy), i % sides[1] + float(dx), sides) for dx, dy in where]
                out[b, h, i] = sum(a * r for a, r in zip(share, reads, strict=True))
    return out


@pytest.mark.parametrize(("n", "grid", "kv_heads"), [(35, "5x7", 4), (12, "auto", 2), (13, "auto", 1)])
@pytest.mark.parametrize("points", [1, 4])
def test_deformable_against_loops(points, n, grid, kv_heads):
    method = attnbench.get("deformable")
    qkv, params, own = make(method, {"points": points, "grid": grid}, n, kv_heads)
    want = deformed(qkv, params, own)
    close(method.reference(*qkv, params, weights=own), want)
    close(practical(method)(*qkv, params, own), want)


@pytest.mark.parametrize("implementation", ["eager", "chunked"])
def test_where_the_paper_starts(implementation):
    """Eight heads look one to four steps along the axes and diagonals, with equal shares."""
    method = attnbench.get("deformable")
    q, v = torch.randn(1, 8, 121, 4, dtype=torch.float64), torch.zeros(1, 8, 121, 1, dtype=torch.float64)
    v[:, :, 5 * 11 + 5] = 1
    seen = attnbench.get(f"deformable@{implementation}")(q, q, v).view(8, 11, 11)
    steps = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
    for head, (down, right) in enumerate(steps):
        want = torch.zeros(11, 11, dtype=torch.float64)
        for p in range(1, 5):
            want[5 - p * down, 5 - p * right] = 1 / 4
        close(seen[head], want)
    offsets = method.initial(Shape(1, 8, 121, 4), method.params(), q)["offset_bias"]
    assert offsets.abs().amax((0, 2)).tolist() == [1, 2, 3, 4]


def test_deformable_attention_reads_no_key_and_without_offsets_itself():
    method = attnbench.get("deformable")
    (q, k, v), params, own = make(method, {})
    out = method.reference(q, k, v, params, weights=own)
    close(method.reference(q, 5 * k, v, params, weights=own), out)
    own["offset_weight"], own["offset_bias"] = torch.zeros_like(own["offset_weight"]), torch.zeros_like(own["offset_bias"])
    close(method.reference(q, k, v, params, weights=own), v)


def test_values_beyond_the_grid_are_zero_and_nothing_makes_up_for_them():
    method = attnbench.get("deformable")
    (q, k, v), params, own = make(method, {"points": 2, "grid": "5x7"}, moved=0.0)
    own["offset_bias"] = torch.tensor([[0.0, 0.0], [0.0, -1.5]], dtype=torch.float64).expand(4, 2, 2)
    out = method.reference(q, k, torch.ones_like(v), params, weights=own)[0, 0, :, 0].view(5, 7)
    close(out, torch.tensor([0.5, 0.75, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None].expand(5, 7))
