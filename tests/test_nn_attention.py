"""The layer around a method: projections, autocast, positions, convolution and gate, the same for all methods."""

from __future__ import annotations

import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
from layer_support import DIM, HEADS, tokens
from torch import Tensor, nn

import attnbench
import attnbench.nn.attention
from attnbench.method import Shape
from attnbench.nn import AttentionLayer
from attnbench.nn._rotary import angles, rotate


def dense(layer: AttentionLayer, x: Tensor) -> Tensor:
    """Softmax attention written out, one head at a time."""
    q, k, v = (x @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)).chunk(3, -1)
    width, heads = DIM // HEADS, []
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        scores = (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).softmax(-1)
        heads.append(scores @ v[..., part])
    return torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("bias", [False, True])
def test_softmax_attention_is_the_textbook_layer(bias: bool) -> None:
    layer = AttentionLayer(DIM, HEADS, qkv_bias=bias).double()
    x = tokens(33)
    torch.testing.assert_close(layer(x), dense(layer, x))


class Spy(nn.Module):
    """Keeps what it is called with and returns the values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen, self.autocast = (q, k, v), torch.is_autocast_enabled("cpu")
        return v


@pytest.mark.parametrize("gate", [False, True])
def test_operators_read_the_projection_in_place(gate: bool) -> None:
    layer = AttentionLayer(DIM, HEADS, gate=gate)
    spy, kept = Spy(), []
    layer.operator = spy
    getattr(layer, layer.parts).register_forward_hook(lambda module, args, out: kept.append(out))
    layer(tokens(10, torch.float32))
    (fused,) = kept
    for i, x in enumerate(spy.seen):
        assert x.data_ptr() == fused.data_ptr() + i * DIM * fused.element_size()
        assert x.stride() == (10 * len(layer.parts) * DIM, DIM // HEADS, len(layer.parts) * DIM, 1)
    q, k, v = (fused[..., i * DIM : (i + 1) * DIM].unflatten(-1, (HEADS, -1)).transpose(1, 2) for i in range(3))
    assert all(torch.equal(a, b) for a, b in zip(spy.seen, (q, k, v), strict=True))


def test_operators_run_outside_autocast_in_its_dtype() -> None:
    layer = AttentionLayer(DIM, HEADS, "topk", topk=5, positions="rotary", qk_norm=True)
    layer.operator, plain = Spy(), layer.operator
    x = tokens(12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert not layer.operator.autocast
    assert {t.dtype for t in layer.operator.seen} == {out.dtype} == {torch.bfloat16}
    mixed, layer.operator = plain(*layer.operator.seen), plain
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.proj(mixed.transpose(1, 2).flatten(2)))
        layer(x).sum().backward()
    assert layer.qkv.weight.grad is not None
    assert layer.qkv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("conv", [0, 3])
def test_a_module_of_a_method_runs_outside_autocast_too_and_casts_its_own_weights(conv: int) -> None:
    layer = AttentionLayer(DIM, HEADS, "nystromformer", landmarks=4)
    layer.operator = attnbench.get("nystromformer").build(Shape(1, HEADS, 16, DIM // HEADS), landmarks=4, conv=conv)
    x, inside = tokens(16, torch.float32), []
    layer.operator.register_forward_pre_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert inside == [False]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def neighbours(v: Tensor, weight: Tensor, bias: Tensor, sides: tuple[int, int]) -> Tensor:
    """A 3 x 3 depthwise convolution of `[N, C]`, one token at a time."""
    out = []
    for i in range(len(v)):
        row, column = divmod(i, sides[1])
        total = bias
        for a, b in ((a, b) for a in range(3) for b in range(3)):
            y, x = row + a - 1, column + b - 1
            if 0 <= y < sides[0] and 0 <= x < sides[1]:
                total = total + weight[:, 0, a, b] * v[y * sides[1] + x]
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize(("grid", "sides"), [((3, 5), (3, 5)), ("square", (4, 4))])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_convolution_and_gate(grid: Any, sides: tuple[int, int], gate: bool, prefix: int) -> None:
    torch.manual_seed(0)
    layer = AttentionLayer(DIM, HEADS, grid=grid, prefix=prefix, conv=True, gate=gate).double()
    layer.operator = Spy()
    assert layer.dwc is not None
    x = tokens(prefix + sides[0] * sides[1])
    parts = getattr(layer, layer.parts)(x).split(DIM, -1)
    assert len(parts) == 3 + gate
    want = parts[2].clone()  # what the spy returns
    for b in range(2):
        want[b, prefix:] += neighbours(parts[2][b, prefix:], layer.dwc.weight, layer.dwc.bias, sides)
    if gate:
        want = want * parts[3] / (1 + (-parts[3]).exp())
    torch.testing.assert_close(layer(x), layer.proj(want))


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 12, 8) for _ in range(2))
    turns = angles((12,), 8, 100.0, 0, q.device)
    scores = (rotate(q, turns) @ rotate(k, turns).transpose(-1, -2))[0, 0]
    for offset in range(-11, 12):
        along = scores.diagonal(offset)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert scores[0, :4].unique().numel() == 4
    grid = rotate(q, angles((3, 4), 8, 100.0, 0, q.device)) @ rotate(k, angles((3, 4), 8, 100.0, 0, q.device)).transpose(-1, -2)
    table = grid.view(3, 4, 3, 4)
    torch.testing.assert_close(table[0, 0, 1, 2], table[1, 1, 2, 3])
    torch.testing.assert_close(table[2, 0, 1, 1], table[1, 2, 0, 3])
    assert not torch.isclose(table[0, 0, 1, 2], table[0, 0, 2, 1])


def test_rotary_turns_pairs_as_complex_numbers_and_leaves_the_prefix() -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    turns = angles((5,), 6, 50.0, 2, x.device)
    powers = torch.tensor([50.0 ** (-i / 3) for i in range(3)], dtype=torch.float64)
    want = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous())[:, :, 2:] * torch.exp(1j * torch.arange(5)[:, None] * powers)
    got = rotate(x, turns)
    torch.testing.assert_close(got[:, :, 2:], torch.view_as_real(want).flatten(-2))
    assert torch.equal(got[:, :, :2], x[:, :, :2])
    rows = angles((2, 3), 8, 50.0, 0, x.device)
    assert torch.equal(rows[:, :2], angles((2,), 4, 50.0, 0, x.device).repeat_interleave(3, 0))
    assert torch.equal(rows[:, 2:], angles((3,), 4, 50.0, 0, x.device).repeat(2, 1))


def test_positions_and_norms_reach_the_operator() -> None:
    layer = AttentionLayer(DIM, HEADS, positions="rotary-2d", grid=(3, 4), prefix=1, qk_norm=True, theta=30.0).double()
    spy = Spy()
    layer.operator = spy
    x = tokens(13)
    layer(x)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    turns = angles((3, 4), DIM // HEADS, 30.0, 1, x.device)
    for got, plain in zip(spy.seen[:2], (q, k), strict=True):
        normed = plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(got, rotate(normed, turns))
    assert torch.equal(spy.seen[2], v)
    assert {"q_norm.weight", "k_norm.weight"} < set(layer.state_dict())


def test_causal_layers_see_no_later_token() -> None:
    layer = AttentionLayer(DIM, HEADS, "linear", causal=True, positions="rotary").double()
    x = tokens(20)
    later = x.clone()
    later[:, 12:] += 1
    assert torch.equal(layer(x)[:, :12], layer(later)[:, :12])
    assert not torch.isclose(layer(x)[:, 12:], layer(later)[:, 12:]).all()


def test_dropout_acts_in_training_alone() -> None:
    layer = AttentionLayer(DIM, HEADS, attn_drop=0.5, proj_drop=0.25).double()
    x = tokens(400)
    out = layer(x)
    assert 0.2 < (out == 0).double().mean() < 0.3
    layer.proj_drop.p = 0.0
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), dense(layer, x))


def test_a_layer_says_what_it_is() -> None:
    said = repr(AttentionLayer(DIM, HEADS, "linear@eager", prefix=1, grid=(3, 4), positions="rotary", causal=True))
    assert "16, heads=2, method=linear@eager, prefix=1, grid=(3, 4), positions=rotary, causal=True" in said
    assert "16, heads=2, method=softmax\n" in repr(AttentionLayer(DIM, HEADS))


def test_the_example_runs() -> None:
    result = doctest.testmod(attnbench.nn.attention)
    assert result.attempted > 5
    assert result.failed == 0


def test_importing_layers_imports_no_triton_and_touches_no_gpu() -> None:
    code = """
import sys, torch, attnbench
assert "attnbench.nn" not in sys.modules
import attnbench.nn
print("triton" in sys.modules, torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False False"
