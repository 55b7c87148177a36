"""What a layer tells its method, learned weights that depend on the length, and mistakes in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layer_support import COMPILER, DIM, HEADS, grads, tokens
from torch import Tensor

import attnbench
import attnbench.nn.attention
from attnbench import registry
from attnbench.errors import UserError
from attnbench.method import Params, Shape, param
from attnbench.nn import AttentionLayer


def test_methods_are_told_prefix_grid_and_causality_as_they_ask() -> None:
    layer = AttentionLayer(DIM, HEADS, "agent", prefix=2, grid=(4, 6), landmarks=4)
    told = layer.operator.params.as_dict()
    assert (told["prefix"], told["grid"], told["landmarks"]) == (2, "4x6", 4)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer.qkv(tokens(26, torch.float32)).chunk(3, -1))
    want = attnbench.get("agent")(q, k, v, prefix=2, grid="4x6", landmarks=4)
    assert torch.equal(layer.operator(q, k, v), want)
    assert AttentionLayer(DIM, HEADS, "linear", causal=True, prefix=2, grid=(4, 6)).operator.params.causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnGrid(Params):
    """Of a method that lays all tokens on a grid."""

    grid: str = param("auto", "grid of the tokens")


def test_methods_that_lay_all_tokens_on_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = dataclasses.replace(attnbench.get("softmax"), params=OnGrid)
    monkeypatch.setitem(registry.registry().found, "softmax", fake)
    for grid, seen in (("4x6", "4x6"), ((4, 6), "4x6"), ("square", "auto"), ("line", "line"), (None, "auto")):
        assert AttentionLayer(DIM, HEADS, grid=grid).operator.params.grid == seen
    with pytest.raises(UserError, match="grid = square needs N - prefix to be a square number, not 26"):
        AttentionLayer(DIM, HEADS, grid="square")(tokens(26, torch.float32))
    for grid in (None, "square", (4, 6)):
        with pytest.raises(UserError, match="softmax lays all tokens on its grid"):
            AttentionLayer(DIM, HEADS, grid=grid, prefix=1)
    assert AttentionLayer(DIM, HEADS, grid="line", prefix=1)(tokens(26, torch.float32)).shape[1] == 26


def learning(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """`softmax` becomes a method whose one learned parameter has the size `n` or `heads` of a shape."""

    def weights(shape: Shape, params: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.rand(getattr(shape, size), generator=generator, dtype=torch.float64)}

    def reference(q: Tensor, k: Tensor, v: Tensor, params: Any, weights: Any = None) -> Tensor:
        return v * weights["gain"].view((1, 1, -1, 1) if size == "n" else (1, -1, 1, 1))

    fake = dataclasses.replace(attnbench.get("softmax"), weights=weights, reference=reference, implementations=())
    monkeypatch.setitem(registry.registry().found, "softmax", fake)


def test_learned_weights_that_depend_on_the_length_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    learning(monkeypatch, "n")
    with pytest.raises(UserError, match="give tokens = N or grid"):
        AttentionLayer(DIM, HEADS)
    for options in ({"tokens": 13}, {"grid": (3, 4), "prefix": 1}):
        layer = AttentionLayer(DIM, HEADS, **options)
        assert layer.operator.weights["gain"].shape == (13,)
        found = grads(layer, tokens(13, torch.float32))
        assert found["operator.weights.gain"].abs().min() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens(13, torch.float32)).dtype == torch.bfloat16
    torch._dynamo.reset()
    x = tokens(13, torch.float32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=COMPILER)(x), layer(x))


def test_learned_weights_that_do_not_take_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    learning(monkeypatch, "heads")
    layer = AttentionLayer(DIM, HEADS)
    assert [layer(tokens(n, torch.float32)).shape[1] for n in (7, 30)] == [7, 30]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3 does not divide dim = 16"),
        ({"num_heads": 0}, "num_heads = 0 does not divide"),
        ({"prefix": -1}, "prefix = -1 is below 0"),
        ({"positions": "rotary-2d"}, "need grid = .height, width. or square"),
        ({"conv": True}, "need grid = .height, width. or square"),
        ({"positions": "rotery"}, "did you mean rotary"),
        ({"positions": "rotary-2d", "grid": "square", "num_heads": 8}, "multiple of 4"),
        ({"grid": (3, 0)}, "is no height and width"),
        ({"grid": "3x0"}, "is no height and width"),
        ({"grid": (3, 4), "tokens": 13}, "needs N - prefix to be 3 x 4 = 12, not 13"),
        ({"method": "agent", "causal": True}, "agent has no causal form"),
        ({"method": "agent", "tokens": 10, "landmarks": 11}, "landmarks = 11 exceeds N = 10"),
        ({"method": "agnt"}, "did you mean agent"),
        ({"topk": 3}, "unknown parameter 'topk' in softmax"),
    ],
)
def test_mistakes_are_told_when_the_layer_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttentionLayer(DIM, **({"num_heads": HEADS} | options))


def test_a_grid_that_does_not_fit_the_tokens_is_told() -> None:
    for layer in (AttentionLayer(DIM, HEADS, grid=(3, 4), conv=True), AttentionLayer(DIM, HEADS, grid="square", positions="rotary-2d")):
        with pytest.raises(UserError, match=r"needs N - prefix to be .* not 13"):
            layer(tokens(13, torch.float32))
