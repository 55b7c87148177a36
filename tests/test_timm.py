"""Methods inside models of timm: weights stay, the class token and the grid are told, and restore gives the same modules."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from integration_support import NO_TIMM, library
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from training_support import recipe, task

import attnbench.integrations.timm as drop_in
from attnbench.errors import UserError
from attnbench.integrations.timm import PRESETS, SwappedAttention, preset, restore, swap_attention
from attnbench.nn import Architecture, built
from attnbench.tasks.images import patches
from attnbench.tasks.trained import Batch
from attnbench.train import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable


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
