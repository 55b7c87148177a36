"""The parts around the attention layer: examples that run, stochastic depth, biases, and checkpoints of older models."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attnbench.nn
from attnbench.errors import UserError
from attnbench.nn import Architecture, Block, TinyTransformer, built
from attnbench.nn._conv import ShortConvolution
from attnbench.nn.block import DropPath

SIZES = {"vocabulary": 32, "tokens": 16, "dim": 16, "heads": 2, "depth": 3}
PUBLIC = [name for name in attnbench.nn.__all__ if isinstance(getattr(attnbench.nn, name), type) and name != "Architecture"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_layer_has_an_example(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(attnbench.nn, name), name)
    assert found
    assert len(found[0].examples) >= 6


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(attnbench.nn.__path__)])
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"attnbench.nn.{name}")).failed == 0


def test_stochastic_depth_skips_whole_examples_in_training_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(20_000, 2, 3)
    out = layer(x)
    skipped = out[:, 0, 0] == 0
    assert torch.equal(out, torch.where(skipped[:, None, None], 0.0, x / 0.75))
    assert float(skipped.double().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / len(x)) ** 0.5)  # four standard deviations
    assert layer.eval()(x) is x
    for rate in (-0.1, 1.0):
        with pytest.raises(UserError, match="must be at least 0 and below 1"):
            DropPath(rate)


def test_depths_are_skipped_in_proportion_and_none_draws_nothing() -> None:
    model = TinyTransformer(Architecture(**SIZES, drop_path=0.2))
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.1, 0.2]
    for rate, draws in ((0.0, False), (0.1, True)):
        block = Block(16, 2, drop_path=rate)
        state = torch.get_rng_state()
        block.train()(torch.zeros(1, 4, 16))
        assert torch.equal(state, torch.get_rng_state()) != draws


def test_a_bias_of_the_projection_is_asked_for_and_starts_at_zero() -> None:
    plain, biased = (TinyTransformer(Architecture(**SIZES, qkv_bias=bias)) for bias in (False, True))
    assert biased.parameter_count - plain.parameter_count == 3 * 3 * 16
    assert all(not block.attention.qkv.bias.any() for block in biased.blocks)


def test_checkpoints_without_newer_fields_are_of_the_plain_model() -> None:
    own = Architecture(**SIZES)
    older = {k: v for k, v in own.as_dict().items() if k not in {"short_conv", "qkv_bias", "drop_path", "library"}}
    assert own.differences(older) == []
    assert Architecture(**SIZES, drop_path=0.1).differences(older) == ["drop_path = 0.0 there, 0.1 here"]


@pytest.mark.parametrize(("grid", "causal"), [(None, False), (None, True), ((3, 5), False)])
def test_a_short_convolution_sees_neighbours_alone(grid, causal: bool) -> None:
    layer, x = ShortConvolution(4, 3, grid=grid, causal=causal).double(), torch.randn(2, 15, 4, dtype=torch.float64, requires_grad=True)
    token = 7
    layer(x)[:, token].sum().backward()
    seen = {None: {token - 1, token, token + 1}, (3, 5): {1, 2, 3, 6, 7, 8, 11, 12, 13}}[grid]
    seen = {token - 2, token - 1, token} if causal else seen
    assert set(x.grad.abs().sum((0, 2)).nonzero().flatten().tolist()) == seen
    places, weight = torch.tensor(sorted(seen)), layer.weight[:, 0].flatten(1)
    torch.testing.assert_close(layer(x)[:, token], (x[:, places] * weight.T).sum(1) + layer.bias)


@pytest.mark.parametrize(("width", "causal"), [(3, False), (5, False), (3, True), (4, True), (1, False)])
def test_a_short_convolution_along_a_row_is_that_of_torch(width: int, causal: bool) -> None:
    layer = ShortConvolution(4, width, causal=causal).double()
    x, grad = (torch.randn(2, 15, 4, dtype=torch.float64) for _ in range(2))
    margins = (width - 1, 0) if causal else (width // 2, width // 2)
    read = (x.clone().requires_grad_(), *layer.parameters())
    image = torch.nn.functional.pad(read[0].transpose(1, 2), margins)
    theirs = torch.nn.functional.conv1d(image, layer.weight.flatten(1).unsqueeze(1), layer.bias, groups=4).transpose(1, 2)
    torch.testing.assert_close(layer(read[0]), theirs)
    torch.testing.assert_close(*(torch.autograd.grad(out, read, grad) for out in (layer(read[0]), theirs)))


def test_a_short_convolution_is_added_to_the_embedding() -> None:
    sizes = {"vocabulary": 9, "classes": 9, "tokens": 12, "dim": 16, "per_token": True, "positions": "none", "method": "softmax"}
    own = TinyTransformer(Architecture(**sizes, short_conv=3, causal=True))
    plain = TinyTransformer(Architecture(**sizes, causal=True))
    assert own.parameter_count - plain.parameter_count == 16 * (3 + 1)
    inputs = torch.randint(9, (2, 12))
    torch.nn.init.zeros_(own.short_conv.weight)
    torch.nn.init.zeros_(own.short_conv.bias)
    plain.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith("short_conv.")})
    torch.testing.assert_close(own(inputs), plain(inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"short_conv": 4}, "set an odd width"), ({"short_conv": 3, "causal": True, "grid": (2, 6)}, "set short_conv = 0")],
)
def test_a_short_convolution_that_makes_no_sense_is_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TinyTransformer(Architecture(vocabulary=9, tokens=12, dim=16, **changes))


def test_a_library_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.models.vision_transformer", None)
    sizes = {"features": 768, "tokens": 4, "grid": (2, 2), "dim": 16, "positions": "learned", "library": "timm"}
    with pytest.raises(UserError, match=r"pip install 'attnbench\[timm\]', or take model = vit"):
        built(Architecture(**sizes))
    for change, words in (
        ({"grid": None}, "reads square images"),
        ({"features": 5}, "reads square images"),
        ({"positions": "none"}, "set positions"),
        ({"short_conv": 3}, "set short_conv to 0"),
    ):
        with pytest.raises(UserError, match=words):
            built(Architecture(**{**sizes, **change}))


def test_the_layers_that_readme_shows_are_made_as_it_says() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [part for part in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) if "from attnbench.nn import" in part]
    made = {"block": SimpleNamespace(attn=None)}
    exec(compile(code, "README.md", "exec"), made)
    x = torch.randn(1, 197, 384)
    layers = [y for y in (*made.values(), made["block"].attn) if isinstance(y, torch.nn.Module)]
    assert len(layers) == 2
    assert all(layer(x).shape == x.shape for layer in layers)
