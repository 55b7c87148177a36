"""Methods inside models of transformers: nothing changes but the mixing, and what cannot be honoured is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration_support import NO_TRANSFORMERS, library
from torch import Tensor

from attnbench.errors import UserError
from attnbench.integrations.transformers import prepare, register

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
