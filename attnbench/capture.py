"""The q, k, v that the attention layers of a model see, written to files that the input profile `file:PATH` reads.

A layer is seen in one of two ways: an `AttentionLayer` by what its operator is given, which is what any method would get in its place; any
other module by its calls of `torch.nn.functional.scaled_dot_product_attention`, as transformers (`sdpa`) and timm make them. Where such
a call has a scale s other than `D^(-1/2)`, queries are multiplied by `s D^(1/2)`, so that softmax attention of the file is the model's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from attnbench import files
from attnbench.errors import UserError
from attnbench.nn import AttentionLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn


@dataclass(frozen=True)
class Captured:
    """What one call of attention was given."""

    layer: str
    """dotted name of the module, with `#2` and so on where it was called again"""
    q: Tensor
    """`[B, H, N, D]`"""
    k: Tensor
    """`[B, Hkv, M, D]`"""
    v: Tensor
    """`[B, Hkv, M, Dv]`"""
    causal: bool
    """whether queries read only keys at or before their place"""
    masked: bool
    """whether the model added a mask or a bias of another form, which the file does not hold"""

    def facts(self) -> dict[str, Any]:
        """Sizes and flags, in JSON types."""
        return {
            "layer": self.layer, "batch": self.q.shape[0], "heads": self.q.shape[1], "kv_heads": self.k.shape[1], "n": self.q.shape[2],
            "keys": self.k.shape[2], "dim": self.q.shape[3], "dim_v": self.v.shape[3], "causal": self.causal, "masked": self.masked,
        }  # fmt: skip


def capture(model: nn.Module, run: Callable[[], object]) -> list[Captured]:
    """What every attention layer of `model` is given while `run()` runs it, in the order of the calls, on the CPU.

    Raises `UserError` where nothing that could be seen was called.
    """
    with Recorder(model) as recorder, torch.no_grad():
        run()
    if not recorder.found:
        raise UserError("the model called no attention that can be captured: it must use scaled_dot_product_attention or AttentionLayer")
    return recorder.found


class Recorder(TorchFunctionMode):
    """Records while it is entered; knows by hooks which module runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found: list[Captured] = []
        self._running: list[str] = []
        self._inside = 0
        self._calls: Counter[str] = Counter()
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            if isinstance(module, AttentionLayer):
                self._hooks.append(module.operator.register_forward_pre_hook(self._operator(name, module)))
                self._hooks.append(module.operator.register_forward_hook(self._leave, always_call=True))
            self._hooks.append(module.register_forward_pre_hook(self._begin(name)))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a call of scaled dot-product attention, and make it."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and not self._inside:
            self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _begin(self, name: str) -> Callable[..., None]:
        return lambda *_: self._running.append(name)

    def _end(self, *_: object) -> None:
        self._running.pop()

    def _operator(self, name: str, layer: AttentionLayer) -> Callable[..., None]:
        def enter(_: nn.Module, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
            self._inside += 1
            self._keep(name, *qkv, causal=layer.causal, masked=False)

        return enter

    def _leave(self, *_: object) -> None:
        self._inside -= 1

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *rest: object,
        is_causal: bool = False,
        scale: float | None = None,
        **_: object,
    ) -> None:
        """`rest` are positional arguments behind the mask: the dropout and `is_causal`."""
        is_causal = is_causal or (len(rest) > 1 and bool(rest[1]))
        if query.ndim != 4:
            raise UserError(f"attention of {list(query.shape)} has no place for batch and heads: only [B, H, N, D] can be captured")
        lower = attn_mask is not None and _is_causal(attn_mask, query.shape[2], key.shape[2])
        if scale is not None:
            query = query * (scale * query.shape[3] ** 0.5)
        whole = attn_mask is None or lower or bool((attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0).all())
        self._keep(self._running[-1] if self._running else "", query, key, value, causal=is_causal or lower, masked=not whole)

    def _keep(self, name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, masked: bool) -> None:
        self._calls[name] += 1
        number = self._calls[name]
        q, k, v = (x.detach().to("cpu", copy=True).contiguous() for x in (q, k, v))
        self.found.append(Captured(name if number == 1 else f"{name}#{number}", q, k, v, causal=causal, masked=masked))


def _is_causal(mask: Tensor, queries: int, keys: int) -> bool:
    """Whether a boolean or additive mask is the causal one, in all batches and heads."""
    read = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    lower = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    whole = mask.dtype == torch.bool or bool(((mask == 0) | ~read).all())
    return queries == keys and mask.shape[-2:] == lower.shape and whole and bool((read == lower).all())


def save(layers: Sequence[Captured], folder: Path, model: str) -> list[Path]:
    """Write `NN-LAYER.safetensors` for each layer, with `q`, `k` and `v`, and its facts as metadata. Returns the paths.

    Raises `UserError` where the package safetensors is missing or a file cannot be written; files before it stay.
    """
    try:
        from safetensors.torch import save as pack
    except ImportError:
        raise UserError("captured activations are written by the package safetensors: pip install 'attnbench[files]'") from None
    paths = []
    digits = len(str(len(layers) - 1))
    for number, layer in enumerate(layers):
        path = folder / f"{number:0{digits}d}-{layer.layer or 'model'}.safetensors"
        about = {"model": model, **{name: str(value) for name, value in layer.facts().items()}}
        files.write(path, pack({"q": layer.q, "k": layer.k, "v": layer.v}, about))
        paths.append(path)
    return paths
