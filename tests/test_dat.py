"""DAT: its definition against grid_sample, its limit, groups of heads, bias and strides."""

from __future__ import annotations

import pytest
import torch
from method_support import close
from offset_support import DAT, make, practical
from torch.nn.functional import conv2d, gelu, grid_sample, layer_norm, scaled_dot_product_attention

import attnbench


def published(qkv, params, own):
    """DAT as the authors compute it: convolution, layer norm and sampling by torch's functions, positions in coordinates, x before y."""
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in qkv)
    batch, heads, n, d = q.shape
    (h, w), (stride, kernel), share = params.sides(n), params.strides(n), params.group_heads
    groups, width, old = heads // share, share * d, params.release == "2022"
    image = q.transpose(2, 3).reshape(batch * groups, width, h, w)
    margin = 0 if stride == kernel else kernel // 2
    x = conv2d(image, own["conv_weight"].reshape(width, 1, kernel, kernel), own["conv_bias"].flatten(), stride, margin, groups=width)
    x = gelu(layer_norm(x.movedim(1, -1), (width,), own["norm_weight"], own["norm_bias"])) @ own["offset_weight"].T
    rows, columns = x.shape[1:3]
    centres = [torch.linspace(0.5, m - 0.5, m, dtype=x.dtype) / (m if old else m - 1) * 2 - 1 for m in (rows, columns)]
    reference = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1)
    if params.reach > 0 or (params.reach == 0 and not old):
        x = x.tanh() * torch.tensor([1 / (rows - (not old)), 1 / (columns - (not old))], dtype=x.dtype) * params.reach
    place = x + reference
    if params.reach < 0:
        place = place.tanh() if old else place.clamp(-1, 1)
    place = place.flatten(1, 2).unflatten(0, (batch, groups)).repeat_interleave(share, 1).flatten(0, 1).unsqueeze(1)
    keys, values = (
        grid_sample(t.transpose(2, 3).reshape(batch * heads, -1, h, w), place.flip(-1), align_corners=True)[:, :, 0].mT for t in (k, v)
    )
    logits = q.flatten(0, 1) @ keys.mT / d**0.5
    if params.bias:
        sides = [
            torch.linspace(0.5, m - 0.5, m, dtype=x.dtype) / m * 2 - 1 if old else torch.linspace(-1, 1, m, dtype=x.dtype) for m in (h, w)
        ]
        own_place = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1).unsqueeze(1)
        table = own["table"].repeat(batch, 1, 1).unsqueeze(1)
        logits = logits + grid_sample(table, ((own_place - place) / 2).flip(-1), align_corners=True)[:, 0]
    return (logits.softmax(-1) @ values).unflatten(0, (batch, heads))


@pytest.mark.parametrize(("n", "grid", "kv_heads"), [(63, "7x9", 4), (64, "auto", 2)])
@pytest.mark.parametrize("setting", DAT)
def test_dat_against_the_published_computation(setting, n, grid, kv_heads):
    method = attnbench.get("dat")
    qkv, params, own = make(method, {**setting, "grid": grid}, n, kv_heads)
    want = published(qkv, params, own)
    close(method.reference(*qkv, params, weights=own), want)
    close(practical(method)(*qkv, params, own), want)


def test_dat_with_a_point_on_every_token_is_softmax():
    """References of 2023 with stride 1 lie between tokens; half a step back they lie on them."""
    method = attnbench.get("dat")
    qkv, params, own = make(method, {"stride": 1, "grid": "5x7"}, dim_v=6)
    own["norm_weight"], own["norm_bias"] = torch.zeros_like(own["norm_weight"]), torch.ones_like(own["norm_bias"])
    back = torch.tensor([[-1 / 4], [-1 / 6]], dtype=torch.float64) / gelu(torch.ones((), dtype=torch.float64)) / 12
    own["offset_weight"] = back.expand(2, 12)
    want = scaled_dot_product_attention(*qkv)
    close(method.reference(*qkv, params, weights=own), want)
    close(practical(method)(*qkv, params, own), want)


def test_heads_of_a_group_share_points_and_queries_share_them_all():
    method = attnbench.get("dat")
    (q, k, _), params, own = make(method, {"points": 9, "group_heads": 2}, 36)
    places = torch.stack([torch.arange(36) // 6, torch.arange(36) % 6], -1).double().expand(2, 4, -1, -1)
    bank = method.experts(q, k, places, params, weights=own).banks[0]
    assert bank.routes is None
    assert bank.w2.shape == (2, 4, 1, 9, 2)
    close(bank.w2[:, 0], bank.w2[:, 1])
    close(bank.w2[:, 2], bank.w2[:, 3])
    assert not torch.allclose(bank.w2[:, 0], bank.w2[:, 2])
    assert bank.w2.amin() >= 0
    assert bank.w2.amax() <= 5


def test_a_constant_table_is_no_bias():
    method = attnbench.get("dat")
    qkv, params, own = make(method, {"points": 9, "bias": True}, 36)
    own["table"] = torch.full_like(own["table"], 7.0)
    plain = {name: x for name, x in own.items() if name != "table"}
    close(method.reference(*qkv, params, weights=own), method.reference(*qkv, method.parse({"points": 9}), weights=plain))


@pytest.mark.parametrize(("side", "stride", "kernel"), [(56, 8, 9), (28, 4, 7), (14, 2, 5), (7, 1, 3), (512, 74, 75), (24, 4, 7)])
def test_strides_are_those_of_dat_plus_plus(side, stride, kernel):
    params = attnbench.get("dat").params()
    assert params.strides(side**2) == (stride, kernel)
    assert params.counts(side**2) == ((7, 7) if side != 24 else (6, 6))
