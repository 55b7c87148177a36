"""The attention function of the transformers drop-in by itself: masks are honoured or refused, and nothing is ignored."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnbench
import attnbench.integrations.transformers as hub
from attnbench.errors import UserError
from attnbench.integrations._masks import is_causal_mask
from attnbench.integrations.transformers import AttentionFunction, register

if TYPE_CHECKING:
    from collections.abc import Callable


class Layer(nn.Module):
    """What an attention function is told of its layer."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.is_causal = causal


def function(label: str = "softmax", **params: object) -> AttentionFunction:
    method = attnbench.get(label)
    return AttentionFunction(f"attnbench/{label}", method, method.parse(params))


def qkv(n: int = 8, m: int = 8, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, x, 4, generator=generator, dtype=torch.float64) for h, x in ((4, n), (kv_heads, m), (kv_heads, m)))  # type: ignore[return-value]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.5, 1.25])
def test_softmax_is_scaled_dot_product_attention(causal: bool, scaling: float | None) -> None:
    q, k, v = qkv()
    out, weights = function()(Layer(causal), q, k, v, None, scaling=scaling)
    assert weights is None
    want = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_a_method_whose_parameters_have_nothing_to_learn_needs_no_preparing() -> None:
    q, k, v = qkv(kv_heads=4)
    layer = Layer(causal=False)
    out, _ = function("nystromformer", landmarks=4, conv=0)(layer, q, k, v, None)
    assert torch.equal(out, attnbench.get("nystromformer")(q, k, v, landmarks=4, conv=0).transpose(1, 2))
    assert not layer._modules
    with pytest.raises(UserError, match="prepare"):
        function("nystromformer", landmarks=4, conv=3)(layer, q, k, v, None)


def test_the_last_query_reads_all_cached_keys() -> None:
    q, k, v = qkv(n=1)
    out, _ = function()(Layer(causal=True), q, k, v, None)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2))


def test_heads_are_repeated_for_methods_that_share_none() -> None:
    q, k, v = qkv()
    layer, method = Layer(causal=True), function("focused_linear")
    assert not method.method.limits.gqa
    token = hub._preparing.set([])
    grouped = method(layer, q, k, v, None)[0]
    hub._preparing.reset(token)
    whole = method(layer, q, *(x.repeat_interleave(2, 1) for x in (k, v)), None)[0]
    assert torch.equal(grouped, whole)


@pytest.mark.parametrize(("label", "message"), [("linear", "use_cache=False"), ("mita", "has no causal form")])
def test_a_mask_that_hides_nothing_makes_no_cache_readable(label: str, message: str) -> None:
    q, k, v = qkv(n=1)
    with pytest.raises(UserError, match=message):
        function(label)(Layer(causal=True), q, k, v, torch.ones(2, 1, 1, 8, dtype=torch.bool))


HALF = torch.ones(8, 8, dtype=torch.bool).triu(1).logical_not()
PADDED = torch.ones(2, 1, 1, 8, dtype=torch.bool).index_fill(3, torch.tensor([7]), value=False)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda mask: mask, additive])
def test_masks_are_read_for_what_they_hide(form: Callable[[Tensor], Tensor]) -> None:
    assert is_causal_mask(form(HALF.expand(2, 1, 8, 8)), 8, 8, "x")
    assert not is_causal_mask(form(torch.ones(2, 1, 8, 8, dtype=torch.bool)), 8, 8, "x")
    window = HALF & HALF.T.roll(3, 0)
    for mask in (PADDED, PADDED & HALF, window.expand(1, 1, 8, 8), HALF[:, :6].expand(1, 1, 8, 6), HALF[4:].expand(1, 1, 4, 8)):
        with pytest.raises(UserError, match="cannot honour this attention mask"):
            is_causal_mask(form(mask), *mask.expand(1, 1, mask.shape[2], -1).shape[2:] if mask.shape[0] == 1 else (8, 8), "x")
    with pytest.raises(UserError, match="cannot add a bias"):
        is_causal_mask(torch.randn(1, 1, 8, 8), 8, 8, "x")
    mixed = torch.stack([HALF, torch.ones_like(HALF)])[:, None]  # another for each example
    lengths = HALF  # of eight examples of up to eight tokens, not of queries and keys
    for mask in (mixed, lengths):
        with pytest.raises(UserError, match="cannot honour this attention mask"):
            is_causal_mask(form(mask), 8, 8, "x")


def test_a_mask_says_more_than_the_layer() -> None:
    q, k, v = qkv()
    for causal in (False, True):
        layer, mask = Layer(not causal), HALF if causal else torch.ones_like(HALF)
        out, _ = function()(layer, q, k, v, mask.expand(2, 1, 8, 8))
        torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2))


@pytest.mark.parametrize(
    ("label", "causal", "n", "options", "message"),
    [
        ("softmax", False, 8, {"dropout": 0.1}, "cannot drop attention weights"),
        ("softmax", False, 8, {"softcap": 30.0}, "cannot honour softcap"),
        ("softmax", False, 8, {"position_bias": torch.zeros(1)}, "cannot honour position_bias"),
        ("softmax", False, 8, {"something_new": torch.zeros(1)}, "cannot honour something_new"),
        ("softmax", False, 8, {"output_attentions": True}, "cannot honour output_attentions"),
        ("softmax", True, 8, {"sliding_window": 4}, "window of 4 keys"),
        ("softmax", True, 4, {}, "pass use_cache=False"),
        ("linear", True, 1, {}, "pass use_cache=False"),
        ("mita", True, 8, {}, "has no causal form"),
        ("mita", False, 8, {}, "exceeds N = 8: lower landmarks"),
        ("linformer", False, 8, {}, "rank = 256 exceeds M"),
        ("focused_linear", False, 8, {}, "prepare"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(label: str, causal: bool, n: int, options: dict[str, Any], message: str) -> None:
    q, k, v = qkv(n)
    with pytest.raises(UserError, match=message) as caught:
        function(label)(Layer(causal), q, k, v, None, **options)
    assert "\n" not in str(caught.value)


def test_harmless_options_are_let_through() -> None:
    q, k, v = qkv()
    positions = torch.arange(8)[None]
    out, _ = function()(
        Layer(causal=True), q, k, v, None, position_ids=positions, sliding_window=8, output_attentions=False, use_cache=True
    )
    assert torch.equal(out, function()(Layer(causal=True), q, k, v, None)[0])


def test_register_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'attnbench\[transformers\]'"):
        register()


def fake_library(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The three places that `register` writes to."""
    functions: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    models = SimpleNamespace(AttentionInterface=SimpleNamespace(register=functions.__setitem__), is_kernel=lambda name: "/" in (name or ""))
    masking = SimpleNamespace(AttentionMaskInterface=SimpleNamespace(register=masks.__setitem__), sdpa_mask="sdpa")
    monkeypatch.setattr(hub, "_library", lambda: (models, masking))
    return functions, masks, models


def test_register_offers_every_method_with_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    functions, masks, models = fake_library(monkeypatch)
    names = register(mita={"landmarks": 16}, **{"mita@eager": {"topk": 2}, "mita:small": {"landmarks": 4}})
    assert set(names) == set(functions) == set(masks)
    assert {f"attnbench/{name}" for name in attnbench.methods() if "flash" not in name} <= set(names)
    assert not [name for name in names if "flash" in name]
    found = {
        name: (f.method.label, f.params.landmarks, f.params.topk) for name, f in functions.items() if name.startswith("attnbench/mita")
    }
    assert found["attnbench/mita"] == ("mita", 16, 25)
    assert found["attnbench/mita@varlen"] == ("mita@varlen", 16, 25)
    assert found["attnbench/mita@eager"] == ("mita@eager", 25, 2)
    assert found["attnbench/mita@eager:small"] == ("mita@eager", 4, 25)
    register()
    assert functions["attnbench/mita"].params.landmarks == 25
    assert [models.is_kernel(name) for name in ("attnbench/mita", "somebody/mita", None)] == [False, True, False]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mitta": {}}, "did you mean mita"),
        ({"mita": {"landmark": 4}}, "unknown parameter"),
        ({"mita": {"causal": True}}, "leave it out"),
        ({"softmax@flash": {}}, "for its own flash attention"),
    ],
)
def test_register_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], message: str) -> None:
    functions, _, _ = fake_library(monkeypatch)
    with pytest.raises(UserError, match=message):
        register(**params)
    assert not functions
