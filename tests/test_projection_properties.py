"""InLine, MHLA, Linformer and PVT: limits, normalisation, supports, and where the order of tokens matters."""

from __future__ import annotations

import pytest
import torch
from method_support import close
from projection_support import CASES, REPO, make, prepared, repeated
from torch.nn.functional import scaled_dot_product_attention

import attnbench
from attnbench.method import Shape


def test_limits_are_softmax_attention():
    q, k, v = make(36)
    want = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    eye = torch.eye(36, dtype=torch.float64)
    close(attnbench.get("linformer")(q, k, v, rank=36, weights={"e": eye, "f": eye}), want)
    close(attnbench.get("pvt")(q, k, v, reduction=1), want)
    assert attnbench.get("pvt").initial(Shape.of(q, k, v), attnbench.get("pvt").params(reduction=1), q) == {}


def test_inline_is_an_affine_map_of_the_covariance():
    q, k, v = make(36, 4)
    centred = [x - x.mean(2, keepdim=True) for x in (k, v)]
    want = v.mean(2, keepdim=True) + q @ (centred[0].mT @ centred[1]) / 36 / 6**0.5
    close(attnbench.get("inline")(q, k, v), want)


def test_inline_tells_apart_queries_that_differ_in_length_alone():
    q, k, v = make(36)
    short, long, other = (attnbench.get("inline")(x, k, v) for x in (q, 2 * q, 3 * q))
    close(other - long, long - short)
    assert (long - short).norm(dim=-1).min() > 1e-3


def test_mhla_without_mixing_weights_is_normalised_linear_attention():
    q, k, v = make(36)
    got = attnbench.get("mhla")(q, k, v, blocks=9, weights={"mix": torch.ones(9, 9, dtype=torch.float64)})
    weights = (q.clamp(min=0) + 1e-6) @ (repeated(k, q).clamp(min=0) + 1e-6).mT
    close(got, weights @ repeated(v, q) / (weights.sum(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(("name", "setting"), [c for c in CASES if c[0] in ("inline", "mhla") and "conv" not in c[1]])
def test_weights_that_sum_to_one_keep_a_constant_value(name, setting):
    q, k, v = make(36)
    q, constant = q.abs(), torch.ones_like(v) * torch.arange(5)  # a query without a positive entry has features of the size of eps
    out = attnbench.get(name)(q, k, constant, **setting)
    if setting.get("normalizer"):
        assert not torch.allclose(out, repeated(constant, q), rtol=0.1)
    else:
        torch.testing.assert_close(out, repeated(constant, q), rtol=1e-6, atol=1e-6)  # mhla adds 1e-6 to the denominator


def test_denominator_of_the_authors_code_does_not_normalise():
    q, k, v = make(36)
    out = attnbench.get("mhla")(q, k, torch.ones_like(v), **REPO)
    assert out.min() < 0.9
    assert out.max() > 1.1


def outside(name):
    """A setting, learned weights, and tokens `[N]` that the first query does not read."""
    q, k, v = make(35)
    if name == "pvt":  # the seventh column and the fifth row fill no patch of 2 x 2
        grid = torch.zeros(5, 7, dtype=torch.bool)
        grid[4], grid[:, 6] = True, True
        return {"reduction": 2}, None, grid.flatten()
    if name == "mhla":  # five blocks of seven in a row: the first reads itself and its neighbour
        return {"grid": "none", "blocks": 5, "transform": "local"}, None, torch.arange(35) >= 14
    w = prepared(name, {"rank": 5}, (q, k, v))[2]
    unread = torch.arange(35) % 4 == 1
    return {"rank": 5}, {key: x.masked_fill(unread, 0.0) for key, x in w.items()}, unread


@pytest.mark.parametrize("name", ["mhla", "linformer", "pvt"])
def test_tokens_outside_the_support_do_not_matter(name):
    q, k, v = make(35)
    setting, w, unread = outside(name)
    method = attnbench.get(name)
    before = method(q, k, v, weights=w, **setting)[:, :, 0]
    far = [torch.where(unread.unsqueeze(-1), x + 3.0, x) for x in (k, v)]
    close(method(q, *far, weights=w, **setting)[:, :, 0], before)
    near = torch.where(unread.unsqueeze(-1), v, v + torch.randn_like(v))
    assert not torch.allclose(method(q, k, near, weights=w, **setting)[:, :, 0], before)


@pytest.mark.parametrize(
    ("name", "setting", "equivariant"),
    [
        ("inline", {}, True),
        ("inline", {"conv": 3}, False),
        ("mhla", {"blocks": 4}, False),
        ("mhla", {"blocks": 1}, True),
        ("linformer", {"rank": 5}, False),
        ("pvt", {"reduction": 2}, False),
    ],
)
def test_the_order_of_tokens_matters_where_it_should(name, setting, equivariant):
    qkv = make(36)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    method, _, w = prepared(name, setting, qkv)
    moved = method(*(x[:, :, order] for x in qkv), weights=w, **setting)
    assert torch.allclose(moved, method(*qkv, weights=w, **setting)[:, :, order], rtol=1e-9, atol=1e-11) == equivariant


def test_the_order_inside_a_block_does_not_matter():
    qkv = make(36)
    method, params, w = prepared("mhla", {"blocks": 4}, qkv)
    owner = params.tiles(36).owner(torch.device("cpu"))
    order = torch.cat([(owner == b).nonzero()[:, 0].roll(2) for b in range(4)])
    order = order[torch.cat([(owner == b).nonzero()[:, 0] for b in range(4)]).argsort()]
    assert not order.equal(torch.arange(36))
    close(method(*(x[:, :, order] for x in qkv), weights=w, blocks=4), method(*qkv, weights=w, blocks=4)[:, :, order])
