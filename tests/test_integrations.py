"""Methods inside models of transformers and timm: nothing changes but the mixing, and what cannot be honoured is refused."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from training_support import recipe, task

import attnbench
import attnbench.integrations.timm as drop_in
import attnbench.integrations.transformers as hub
from attnbench.errors import UserError
from attnbench.integrations._masks import is_causal_mask
from attnbench.integrations.timm import PRESETS, SwappedAttention, preset, restore, swap_attention
from attnbench.integrations.transformers import AttentionFunction, prepare, register
from attnbench.nn import Architecture, built
from attnbench.tasks.images import patches
from attnbench.tasks.trained import Batch
from attnbench.train import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

NO_TRANSFORMERS = "transformers is an optional package and not installed: pip install 'attnbench[transformers]'"
NO_TIMM = "timm is an optional package and not importable here (it needs torchvision): pip install 'attnbench[timm]'"


def library(name: str, reason: str) -> Any:
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)


# --- transformers: the function itself, without the library ---


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


# --- transformers: whole models ---

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PLAIN = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def model(kind: str, implementation: str = "eager") -> Any:
    """A small model, randomly initialised, always alike."""
    transformers = library("transformers", NO_TRANSFORMERS)
    own = {
        "Bert": PLAIN,
        "ViT": {**PLAIN, "image_size": 32, "patch_size": 8},
        "Llama": {"num_key_value_heads": 2, "max_position_embeddings": 64},
        "Mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **own)
    return getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=implementation).eval()


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 32, 32, generator=generator) if kind == "ViT" else torch.randint(0, 50, (2, 12), generator=generator)


@pytest.mark.parametrize("kind", ["Bert", "ViT", "Llama"])
def test_softmax_gives_what_eager_gives(kind: str) -> None:
    eager = model(kind)
    register()
    ours = model(kind, "attnbench/softmax")
    assert ours.config._attn_implementation == "attnbench/softmax"
    x = inputs(kind)
    outs = [m(x).last_hidden_state for m in (eager, ours)]
    torch.testing.assert_close(outs[1], outs[0])
    grads = [torch.autograd.grad(out.square().sum(), [p for p in m.parameters() if p.requires_grad], allow_unused=True)
             for out, m in zip(outs, (eager, ours), strict=True)]  # fmt: skip
    torch.testing.assert_close(*reversed(grads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_padding_is_refused_and_a_full_mask_is_none(kind: str) -> None:
    ours, x = model(kind), inputs(kind)
    register()
    ours.set_attn_implementation("attnbench/softmax")
    full = torch.ones_like(x)
    torch.testing.assert_close(ours(x, attention_mask=full).last_hidden_state, ours(x).last_hidden_state)
    with pytest.raises(UserError, match="cannot honour this attention mask"):
        ours(x, attention_mask=full.index_fill(1, torch.tensor([0]), 0))


def test_masks_that_the_caller_makes_are_honoured_or_refused() -> None:
    ours, x = model("Llama"), inputs("Llama")
    register()
    ours.set_attn_implementation("attnbench/softmax")
    want, n = ours(x, use_cache=False).last_hidden_state, x.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool).tril().expand(2, 1, n, n)
    torch.testing.assert_close(ours(x, attention_mask=lower, use_cache=False).last_hidden_state, want)
    whole = ours(x, attention_mask=torch.ones_like(lower), use_cache=False).last_hidden_state
    eager = model("Llama")
    torch.testing.assert_close(whole, eager(x, attention_mask=torch.zeros(2, 1, n, n), use_cache=False).last_hidden_state)
    assert not torch.allclose(whole, want)
    holes = lower.clone()
    holes[:, :, -1, 3] = False
    left = torch.ones_like(x).index_fill(1, torch.tensor([0, 1]), 0)
    for mask in (holes, left, lower.index_fill(0, torch.tensor([1]), value=True)):
        with pytest.raises(UserError, match="cannot honour this attention mask") as caught:
            ours(x, attention_mask=mask, use_cache=False)
        assert "\n" not in str(caught.value)


def test_packed_sequences_and_windows_are_refused() -> None:
    ours = model("Llama")
    register()
    ours.set_attn_implementation("attnbench/softmax")
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    with pytest.raises(UserError, match="cannot honour this attention mask"):
        ours(inputs("Llama"), position_ids=packed, use_cache=False)
    window = model("Mistral")
    window.set_attn_implementation("attnbench/softmax")
    with pytest.raises(UserError, match="cannot honour"):
        window(inputs("Mistral"))
    short = inputs("Mistral")[:, :6]
    torch.testing.assert_close(window(short).last_hidden_state, model("Mistral")(short).last_hidden_state)


def test_a_decoder_generates_the_same_with_and_without_a_cache() -> None:
    transformers = library("transformers", NO_TRANSFORMERS)
    torch.manual_seed(0)
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)).eval()
    register(topk={"topk": 64})
    x, tokens = inputs("Llama").clamp(min=3), {}
    for implementation, cached in (("eager", True), ("attnbench/softmax", True), ("attnbench/softmax", False)):
        decoder.set_attn_implementation(implementation)
        options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached, "attention_mask": torch.ones_like(x)}
        tokens[implementation, cached] = decoder.generate(x, **options)
    first, *rest = tokens.values()
    assert all(torch.equal(first, other) for other in rest)


def test_causal_methods_do_not_look_ahead() -> None:
    decoder, x = model("Llama"), inputs("Llama")
    register(sliding_window={"window": 4})
    changed = x.clone()
    changed[:, 8:] = 7
    for name in ("linear", "sliding_window", "softmax"):
        decoder.set_attn_implementation(f"attnbench/{name}")
        a, b = (decoder(t).last_hidden_state for t in (x, changed))
        torch.testing.assert_close(a[:, :8], b[:, :8])
        assert not torch.equal(a[:, 8:], b[:, 8:])


def test_a_vision_model_runs_a_method_on_its_grid() -> None:
    ours, x = model("ViT"), inputs("ViT")
    register(mita={"landmarks": 4, "topk": 4, "grid": "4x4", "prefix": 1}, **{"mita:all": {"landmarks": 1, "topk": 17, "shared": False}})
    ours.set_attn_implementation("attnbench/mita:all")  # its one expert holds all 17 tokens
    torch.testing.assert_close(ours(x).last_hidden_state, model("ViT")(x).last_hidden_state)
    ours.set_attn_implementation("attnbench/mita")
    assert not torch.allclose(ours(x).last_hidden_state, model("ViT")(x).last_hidden_state)


def test_prepare_gives_layers_the_learned_parameters_of_their_method() -> None:
    ours, x = model("Bert"), inputs("Bert")
    register(linformer={"rank": 4})
    ours.set_attn_implementation("attnbench/linformer")
    with pytest.raises(UserError, match="prepare"):
        ours(x)
    before = set(ours.state_dict())
    assert prepare(ours, x) == 2
    learned = {name: p for name, p in ours.named_parameters() if name not in before}
    assert len(learned) >= 2
    ours(x).last_hidden_state.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned.values())
    ours.set_attn_implementation("attnbench/softmax")
    assert prepare(ours, x) == 0


def test_attention_dropout_is_refused_in_training() -> None:
    transformers = library("transformers", NO_TRANSFORMERS)
    register()
    ours = transformers.BertModel._from_config(transformers.BertConfig(**SIZES), attn_implementation="attnbench/softmax")
    with pytest.raises(UserError, match="attention dropout to 0"):
        ours.train()(inputs("Bert"))
    ours.eval()(inputs("Bert"))


# --- timm ---


class Attention(nn.Module):
    """Stands for timm's self-attention where timm is not installed: the same parts under the same names."""

    def __init__(self, dim: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Transformer(nn.Module):
    """Class and register tokens before a grid of patches, as in timm."""

    def __init__(self, attention: type[nn.Module] = Attention, **options: Any) -> None:
        super().__init__()
        self.num_prefix_tokens, self.patch_embed = 2, SimpleNamespace(grid_size=(4, 6))
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": attention(16, 2, **options)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["attn"](x)  # type: ignore[index]
        return x


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(drop_in, "_ATTENTION", (f"{Attention.__module__}.Attention",))
    torch.manual_seed(0)
    return Transformer().double()


TOKENS = torch.randn(2, 2 + 4 * 6, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def attentions(model: nn.Module) -> list[nn.Module]:
    return [block["attn"] for block in model.blocks]  # type: ignore[union-attr, index]


def test_swapping_softmax_changes_nothing_and_restore_gives_the_same_modules(vit: Transformer) -> None:
    want, modules, state = vit(TOKENS), attentions(vit), vit.state_dict()
    assert swap_attention(vit, "softmax") is vit
    assert all(isinstance(m, SwappedAttention) for m in attentions(vit))
    torch.testing.assert_close(vit(TOKENS), want)
    assert list(vit.state_dict()) == list(state)
    assert sum(p.numel() for p in vit.parameters()) == sum(x.numel() for x in state.values())
    assert restore(vit) is vit
    assert all(a is b for a, b in zip(attentions(vit), modules, strict=True))
    assert torch.equal(vit(TOKENS), want)


def test_a_method_is_told_prefix_and_grid_and_shares_the_weights(vit: Transformer) -> None:
    exact = vit(TOKENS)
    swap_attention(vit, "mita", landmarks=4, topk=4)
    attn = attentions(vit)[0]
    assert isinstance(attn, SwappedAttention)
    params = attn.operator.params
    assert (params.prefix, params.grid, params.landmarks) == (2, "4x6", 4)  # type: ignore[union-attr]
    approximate = vit(TOKENS)
    assert not torch.allclose(approximate, exact)
    vit(TOKENS).sum().backward()
    with torch.no_grad():
        for p in vit.parameters():
            p.sub_(1e-3 * p.grad)
    restore(vit)
    assert not torch.equal(vit(TOKENS), exact)  # trained while swapped


def test_a_grid_of_all_tokens_needs_a_model_without_a_class_token(vit: Transformer) -> None:
    with pytest.raises(UserError, match="class_token=False"):
        swap_attention(vit, "inline")
    with pytest.raises(UserError, match="give two whole numbers"):
        swap_attention(vit, "inline", grid=(0, 1))
    vit.num_prefix_tokens = 0
    swap_attention(vit, "inline", grid=(6, 4))
    assert attentions(vit)[0].operator.params.grid == "6x4"  # type: ignore[union-attr]
    assert vit(TOKENS[:, 2:]).shape == (2, 24, 16)


def test_swapping_again_replaces_the_method(vit: Transformer) -> None:
    modules = attentions(vit)
    swap_attention(swap_attention(vit, "mita", landmarks=4, topk=4), "linear")
    assert [m.method.name for m in attentions(vit)] == ["linear", "linear"]  # type: ignore[union-attr]
    assert all(a is b for a, b in zip(attentions(restore(vit)), modules, strict=True))


def test_learned_parameters_follow_the_model(vit: Transformer) -> None:
    before = set(vit.state_dict())
    swap_attention(vit, "linformer", rank=4)
    new = {name: p for name, p in vit.named_parameters() if name not in before}
    assert new
    assert all(".attn.operator." in name and p.dtype == torch.float64 for name, p in new.items())
    vit(TOKENS).sum().backward()
    assert all(p.grad is not None for p in new.values())
    assert set(restore(vit).state_dict()) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(vit: Transformer, copied: Callable[[nn.Module], Transformer]) -> None:
    twin = copied(swap_attention(vit, "softmax"))
    with torch.no_grad():
        twin.blocks[0]["attn"].qkv.weight.zero_()  # type: ignore[index, union-attr]
    assert not torch.allclose(twin(TOKENS), vit(TOKENS))
    assert torch.equal(restore(twin)(TOKENS), twin(TOKENS))
    assert attentions(twin)[0].qkv.weight.abs().sum() == 0  # type: ignore[union-attr, operator]


def test_a_part_replaced_while_swapped_stays_after_restore(vit: Transformer) -> None:
    swap_attention(vit, "softmax").eval()
    attentions(vit)[0].proj = nn.Identity()
    want = vit(TOKENS)
    torch.testing.assert_close(restore(vit)(TOKENS), want)
    assert not any(m.training for m in attentions(vit))


class WindowAttention(Attention):
    """A subclass, which may compute something else."""


def test_models_without_such_attention_are_one_line(vit: Transformer) -> None:
    biased = Transformer()
    for attention in attentions(biased):
        attention.register_parameter("position_bias", nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match="it has Attention, which is not plain self-attention"):
        swap_attention(biased, "softmax")
    with pytest.raises(UserError, match="no attention to swap: it has no attention at all"):
        swap_attention(nn.Sequential(nn.Linear(2, 2)), "softmax")
    with pytest.raises(UserError, match="it has WindowAttention, which is not plain self-attention"):
        swap_attention(Transformer(WindowAttention), "softmax")
    with pytest.raises(UserError, match="nothing to restore"):
        restore(vit)
    with pytest.raises(UserError, match="did you mean mita"):
        swap_attention(vit, "mitta")


def test_dropout_masks_and_bad_parameters_leave_the_model_as_it_was(vit: Transformer) -> None:
    dropping = Transformer(drop=0.1)
    with pytest.raises(UserError, match=r"attn_drop_rate=0, not 0\.1"):
        swap_attention(dropping, "softmax")
    with pytest.raises(UserError, match="exceeds"):
        swap_attention(vit, "mita", landmarks=4, topk=1000)
    assert {type(m) for m in (*attentions(dropping), *attentions(vit))} == {Attention}
    swap_attention(vit, "softmax")
    with pytest.raises(UserError, match="takes no mask"):
        attentions(vit)[0](TOKENS, attn_mask=torch.ones(26, 26))


def test_presets_are_the_models_of_timm() -> None:
    library("timm", NO_TIMM)
    for name, size in PRESETS.items():
        built = preset(name, "mita", model={"depth": 1, "num_classes": 7})
        attn = built.blocks[0].attn
        assert (built.embed_dim, attn.num_heads, built.num_prefix_tokens) == (size.dim, size.heads, size.prefix)
        assert built.patch_embed.grid_size == size.grid == (14, 14)
        assert isinstance(attn, SwappedAttention)
        assert (attn.operator.params.grid, attn.operator.params.prefix) == ("14x14", 1)
    depth = len(preset("deit-t").blocks)
    assert depth == PRESETS["deit-t"].depth


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
def test_timm_models_swap_and_restore(name: str) -> None:
    timm = library("timm", NO_TIMM)
    torch.manual_seed(0)
    real = timm.create_model(name, img_size=56, depth=2, num_classes=5).eval()
    x = torch.randn(1, 3, 56, 56)
    want, modules = real(x), [block.attn for block in real.blocks]
    torch.testing.assert_close(swap_attention(real, "softmax")(x), want)
    swap_attention(real, "mita", landmarks=4, topk=3)
    assert real.blocks[0].attn.operator.params.prefix == real.num_prefix_tokens
    assert not torch.allclose(real(x), want)
    restore(real)
    assert all(block.attn is m for block, m in zip(real.blocks, modules, strict=True))
    assert torch.equal(real(x), want)


def test_the_model_that_is_trained_is_the_preset() -> None:
    library("timm", NO_TIMM)
    for name, size in PRESETS.items():
        own = {"tokens": 196, "grid": (14, 14), "features": 768, "classes": 7, "dim": size.dim, "heads": size.heads, "depth": 1}
        trained = built(Architecture(**own, positions="learned", library="timm", method="mita", params={"prefix": 0, "causal": False}))
        wanted = preset(name, "mita", model={"depth": 1, "num_classes": 7})
        assert {k: v.shape for k, v in trained.model.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}
        assert trained.operators[0].params == wanted.blocks[0].attn.operator.params
        trained.model.load_state_dict(wanted.state_dict())
        image = torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(trained.eval()(patches(image)), wanted.eval()(image))
        assert trained.features(patches(image)).shape == (2, 197, size.dim)
        assert trained.parameter_count == sum(p.numel() for p in wanted.parameters())


def test_a_model_of_timm_learns() -> None:
    """It tells two images apart by heart."""
    library("timm", NO_TIMM)
    torch.manual_seed(0)
    own = Architecture(tokens=4, grid=(2, 2), features=768, classes=2, dim=16, heads=2, depth=1, positions="learned", library="timm",
                       method="agent", params={"landmarks": 1})  # fmt: skip
    images = patches(torch.randn(2, 3, 32, 32))

    def draw(split: str, index: int, size: int, n: int, seed: int) -> Batch:
        return Batch(images, torch.tensor([0, 1]), torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 1]))

    trainer = Trainer(built(own), task(batch=draw, vocabulary=0, features=768, classes=2), recipe(steps=30, batch=2, n=4, rate=1e-2))
    trainer.run()
    assert trainer.evaluate("test").accuracy == 1.0
    named = dict(trainer.model.named_parameters())
    plain = {id(p) for p in trainer.optimizer.param_groups[1]["params"]}
    assert {id(named["model.pos_embed"]), id(named["model.cls_token"])} <= plain


def test_other_attention_of_timm_is_refused() -> None:
    timm = library("timm", NO_TIMM)
    for name in ("swin_tiny_patch4_window7_224", "beit_base_patch16_224", "resnet18"):
        options = {"depths": (1, 1, 1, 1)} if name.startswith("swin") else {"depth": 1} if name.startswith("beit") else {}
        with pytest.raises(UserError, match="no attention to swap"):
            swap_attention(timm.create_model(name, **options), "softmax")


def test_an_unknown_preset_and_a_missing_timm_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean deit-t"):
        preset("deit-tt")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'attnbench\[timm\]'"):
        preset("deit-t")


@pytest.mark.parametrize(("name", "reason"), [("transformers", NO_TRANSFORMERS), ("timm", NO_TIMM)], ids=["transformers", "timm"])
def test_the_examples_run(name: str, reason: str) -> None:
    library(name, reason)
    found = doctest.testmod(importlib.import_module(f"attnbench.integrations.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_importing_the_drop_ins_imports_no_library() -> None:
    names = {"timm", "transformers"}
    code = f"import sys, {', '.join(f'attnbench.integrations.{n}' for n in sorted(names))}; print({names} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip() == "set()"
