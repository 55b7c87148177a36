"""Any method in a layer: shapes, gradients, projections, compiled, checkpointed, copied and saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layer_support import COMPILER, DIM, HEADS, N, grads, settings, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnbench
import attnbench.nn.attention
from attnbench.method import Shape
from attnbench.nn import AttentionLayer

UNTRACED = {"performer": "draws its directions from a generator of its own, which torch.compile does not trace"}


@pytest.fixture(params=attnbench.methods())
def layer(request: pytest.FixtureRequest) -> AttentionLayer:
    """One layer of each method, run by its definition."""
    torch.manual_seed(0)
    method = attnbench.get(f"{request.param}@eager")
    shape = Shape(1, HEADS, N, DIM // HEADS)
    if reasons := method.limits.reasons(shape, torch.float64, "cpu", method.parse({}).fitted(shape)):
        pytest.skip("; ".join(reasons))
    return AttentionLayer(DIM, HEADS, method.label, tokens=N, **settings(method)).double()


def test_any_method_keeps_the_shape_and_passes_gradients(layer: AttentionLayer) -> None:
    x = tokens()
    out = layer(x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert out.isfinite().all()
    found = grads(layer, x)
    for name in ("x", "qkv.weight", "proj.weight", "proj.bias"):
        grad = found[name]
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


def test_any_method_gets_the_same_projections(layer: AttentionLayer) -> None:
    own = {"qkv.weight": (3 * DIM, DIM), "proj.weight": (DIM, DIM), "proj.bias": (DIM,)}
    assert {name: tuple(x.shape) for name, x in layer.named_parameters() if not name.startswith("operator.")} == own


def test_any_method_can_be_compiled_whole(layer: AttentionLayer) -> None:
    if reason := UNTRACED.get(layer.method.name):
        pytest.skip(reason)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=COMPILER)
    x = tokens()
    torch.testing.assert_close(compiled(x), layer(x))
    for name, grad in grads(compiled, x).items():
        torch.testing.assert_close(grad, grads(layer, x)[name.removeprefix("_orig_mod.")], msg=lambda m, name=name: f"{name}: {m}")


def test_any_method_can_be_checkpointed(layer: AttentionLayer) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)

    for (name, got), want in zip(grads(Checkpointed(), tokens()).items(), grads(layer, tokens()).values(), strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def test_any_method_can_be_copied_saved_and_loaded(layer: AttentionLayer) -> None:
    x = tokens()
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    nn.init.zeros_(again.proj.weight)
    again.load_state_dict(pickle.loads(pickle.dumps(layer.state_dict())), strict=True)
    assert torch.equal(again(x), layer(x))


def test_layers_of_one_method_share_a_compiled_graph_and_lengths_get_their_own() -> None:
    torch._dynamo.reset()
    layers = [AttentionLayer(DIM, HEADS, "agent@eager", landmarks=4) for _ in range(10)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in layers:
            torch.compile(layer, fullgraph=True, backend=COMPILER)(tokens(16, torch.float32))
    for n in (21, 30):
        x = tokens(n, torch.float32)
        torch.testing.assert_close(torch.compile(layers[0], fullgraph=True, backend=COMPILER)(x), layers[0](x))
