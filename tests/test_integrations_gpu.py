"""Drop-ins on a GPU in bfloat16, whole models of transformers and timm: as far from the definition as the definition in bfloat16 is.

The definition is the same model on the CPU in float32 with `method@eager`. Selections may tip at near ties, which moves few tokens far: the
median and the 90th percentile over tokens are held, to twice what the same model on the CPU in bfloat16 gives.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attnbench.integrations.timm import preset, swap_attention
from attnbench.integrations.transformers import prepare, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
PLAIN = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": {**PLAIN, "vocab_size": 99, "max_position_embeddings": 256},
    "ViT": {**PLAIN, "image_size": 224, "patch_size": 16},
    "Llama": {"vocab_size": 99, "num_key_value_heads": 1, "max_position_embeddings": 256},
}
PARAMS: dict[str, dict[str, object]] = {
    "mita": {"landmarks": 25, "topk": 25}, "agent": {"landmarks": 25}, "nystromformer": {"landmarks": 25}, "linformer": {"rank": 32},
    "topk": {"topk": 32}, "moba": {"block": 32, "topk": 3}, "sliding_window": {"window": 33},
}  # fmt: skip
ENCODERS = ("softmax", "mita", "agent", "linear", "topk", "nystromformer", "linformer")
DECODERS = ("softmax", "linear", "topk", "moba", "sliding_window")


def model(kind: str) -> Any:
    """A small model of transformers, randomly initialised, always alike, in float32 on the CPU."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional package")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **MODELS[kind])
    return getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="eager").eval()


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 224, 224, generator=generator) if kind == "ViT" else torch.randint(0, 99, (2, 192), generator=generator)


def moved(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def held(own: Callable[[str], Callable[[Tensor], Tensor]], x: Tensor, method: str, made: Any) -> None:
    """`made` is the model with `method@eager` in place, in float32 on the CPU; `own(label)` puts another in a copy of it."""
    want = made(x).double()
    low = made.to(torch.bfloat16)(moved(x, "cpu", torch.bfloat16)).double()
    got = own(method)(moved(x, DEVICE, torch.bfloat16)).double().cpu()
    assert got.isfinite().all()
    errors = [(y - want).norm(dim=-1).flatten() for y in (got, low)]
    for share in (0.5, 0.9):
        mine, theirs = (float(e.quantile(share)) for e in errors)
        assert mine <= 2 * theirs, (share, mine, theirs)


class Hidden(torch.nn.Module):
    """A model of transformers that returns the tokens of its last layer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.inner(x).last_hidden_state
        return out


@pytest.mark.parametrize(("kind", "method"), [(k, m) for k in ("Bert", "ViT") for m in ENCODERS] + [("Llama", m) for m in DECODERS])
def test_models_of_transformers(kind: str, method: str) -> None:
    x, plain = inputs(kind), model(kind)
    register(**{m: p for m, p in PARAMS.items() if m == method})
    plain.set_attn_implementation(f"attnbench/{method}@eager")
    prepare(plain, x)
    definition = Hidden(plain)
    learned = {n: p for n, p in plain.state_dict().items() if ".attnbench." in n}

    def own(label: str) -> Callable[[Tensor], Tensor]:
        other = model(kind)
        other.set_attn_implementation(f"attnbench/{label}")
        if learned:
            prepare(other, x)
            other.load_state_dict({**other.state_dict(), **learned})
        return Hidden(other.to(DEVICE, torch.bfloat16))

    held(own, x, method, definition)


@pytest.mark.parametrize("method", ENCODERS)
def test_deit_of_timm(method: str) -> None:
    pytest.importorskip("timm", reason="timm is an optional package", exc_type=ImportError)
    torch.manual_seed(0)
    params = PARAMS.get(method, {})
    made = preset("deit-t", f"{method}@eager", model={"depth": 2}, **params).eval()
    other = copy.deepcopy(made)

    def own(label: str) -> Callable[[Tensor], Tensor]:
        learned = {n: p for n, p in other.state_dict().items() if ".operator." in n}
        swapped = swap_attention(other, label, **params)
        swapped.load_state_dict({**swapped.state_dict(), **learned})
        return Features(swapped.to(DEVICE, torch.bfloat16))

    held(own, inputs("ViT"), method, Features(made))


class Features(torch.nn.Module):
    """A model of timm that returns the tokens of its last layer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.inner.forward_features(x)
        return out


def test_a_model_in_training_has_finite_gradients_under_autocast() -> None:
    pytest.importorskip("timm", reason="timm is an optional package", exc_type=ImportError)
    torch.manual_seed(0)
    made = preset("deit-t", "mita", landmarks=25, topk=25, model={"depth": 2, "num_classes": 10}).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(made(inputs("ViT").to(DEVICE)).float(), torch.tensor([1, 2], device=DEVICE))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
