"""Methods as attention implementations of transformers models.

`register()` makes every method a value of `attn_implementation`: `attnbench/softmax`, `attnbench/softmax@math`, and whatever else the
registry holds. Plain causal and bidirectional attention is run; every mask, bias or dropout that a method cannot honour is a `UserError`.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from attnbench.integrations.transformers import prepare, register
>>> names = register(moba={"block": 8, "topk": 2}, dsa={"topk": 8})
>>> sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
>>> model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="attnbench/moba")
>>> tokens = torch.arange(32)[None]
>>> model(tokens).logits.shape
torch.Size([1, 32, 99])
>>> model.set_attn_implementation("attnbench/dsa")  # has learned parameters: `prepare` gives each layer its own
>>> prepare(model, tokens)
2
>>> model(tokens, labels=tokens).loss.backward()
"""

from __future__ import annotations

import importlib
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import isclose
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import attnbench
from attnbench.eager import expand_heads
from attnbench.errors import UserError
from attnbench.integrations._masks import is_causal_mask
from attnbench.method import Params, Shape
from attnbench.nn._operator import mix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from attnbench.method import Method

__all__ = ["PREFIX", "AttentionFunction", "prepare", "register"]

PREFIX = "attnbench/"
"""What every registered name begins with."""

_OWN = "attnbench"
"""Name of the submodule that holds learned parameters in a layer of the model."""

_MEANINGFUL = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")
"""Options of transformers' attention functions that change the result or ask for more of it."""

_HARMLESS = ("position_ids", "cache_position", "num_items_in_batch", "token_type_ids", "mm_token_type_ids")
"""Tensors among the options that attention functions do not read."""

_preparing: ContextVar[list[nn.Module] | None] = ContextVar("preparing", default=None)


def register(**params: Mapping[str, object]) -> list[str]:
    """Make every method a value of `attn_implementation` in transformers; returns the names.

    `register(mita={"landmarks": 16})` sets parameters of `attnbench/mita` and its implementations; with a suffix,
    `register(**{"mita:small": {"landmarks": 4}})` adds `attnbench/mita:small` beside it. Registering again replaces.

    transformers takes names of the form `a/b` for repositories of kernels on its hub: its `is_kernel` is told that these are not. It takes
    every name with `flash` in it for its own flash attention, so methods and implementations called so are left out.

    Raises `UserError` where transformers cannot be imported, and for unknown methods or parameters.
    """
    models, masks = _library()
    for key in params:
        if "flash" in key:
            raise UserError(f"transformers takes {PREFIX}{key} for its own flash attention, as every name with 'flash': use another method")
    functions = {f.name: f for key in dict.fromkeys([*attnbench.methods(), *params]) for f in _functions(key, params.get(key, {}))}
    for name, function in functions.items():
        models.AttentionInterface.register(name, function)
        masks.AttentionMaskInterface.register(name, masks.sdpa_mask)
    _keep_from_hub(models)
    return sorted(functions)


def _functions(key: str, values: Mapping[str, object]) -> list[AttentionFunction]:
    """The functions of `method[@implementation][:suffix]`."""
    label, colon, suffix = key.partition(":")
    method = attnbench.get(label)
    if "causal" in values:
        raise UserError(f"causal of {key} follows from the model: leave it out")
    pins = [""] if method.pinned else ["", *(f"@{i.name}" for i in method.all_implementations())]
    parsed = method.parse(values)
    names = {f"{label}{pin}{colon}{suffix}": f"{label}{pin}" for pin in pins}
    return [AttentionFunction(PREFIX + name, attnbench.get(pinned), parsed) for name, pinned in names.items() if "flash" not in name]


def _library() -> tuple[ModuleType, ModuleType]:
    """transformers' modules of models and of masks."""
    try:
        models, masks = (importlib.import_module(f"transformers.{name}") for name in ("modeling_utils", "masking_utils"))
    except ImportError as error:
        raise UserError(f"transformers cannot be imported ({error}): pip install 'attnbench[transformers]'") from None
    return models, masks


def _keep_from_hub(models: ModuleType) -> None:
    """Let transformers look for our names nowhere else."""
    theirs = getattr(models, "is_kernel", None)
    if theirs is None or getattr(theirs, _OWN, False):
        return

    def is_kernel(name: str | None) -> bool:
        return not (name or "").startswith(PREFIX) and bool(theirs(name))

    setattr(is_kernel, _OWN, True)
    models.is_kernel = is_kernel  # type: ignore[attr-defined]


def prepare(model: nn.Module, *args: Any, **inputs: Any) -> int:
    """Give each attention layer of a model the learned parameters of its method; returns the number of layers.

    Runs `model(*args, **inputs)` once, without gradients, to see the heads and the number of tokens. An attention function owns nothing, so
    methods with learned parameters are refused until then; they are submodules `attnbench` of the layers, in `parameters()` and in
    `state_dict()`. Do this before the optimiser is made, and before weights are loaded that hold them.
    """
    layers: list[nn.Module] = []
    token = _preparing.set(layers)
    try:
        with torch.no_grad():
            model(*args, **inputs)
    finally:
        _preparing.reset(token)
    return len(layers)


class _Owner(nn.Module):
    """Learned parameters of one layer."""

    def __init__(self, name: str, params: Params, operator: nn.Module) -> None:
        super().__init__()
        self.name, self.params, self.operator = name, params, operator


@dataclass(frozen=True)
class AttentionFunction:
    """One method in transformers' calling convention."""

    name: str
    """as `attn_implementation` has it"""
    method: Method
    params: Params

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """`query: [B, H, N, D]`, `key, value: [B, Hkv, M, D]` -> `[B, N, H, D]`, and no attention weights.

        Where `scaling` is not `D^-1/2`, queries are multiplied so that `q.k D^-1/2` is what the model means. Raises `UserError`.
        """
        self._refuse(dropout, options)
        if sliding_window is not None and key.shape[2] > sliding_window:
            raise UserError(f"{self.name} cannot honour this model's window of {sliding_window} keys: give at most so many tokens")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        params = replace(self.params, causal=self._causal(query, key, attention_mask, causal=bool(causal)))
        factor = 1.0 if scaling is None else scaling * query.shape[3] ** 0.5
        q, k = (x.to(value.dtype) for x in (query if isclose(factor, 1.0) else query * factor, key))
        k, v = (k, value) if self.method.limits.gqa else expand_heads(q, k, value)
        return self._run(module, q, k, v, params).transpose(1, 2).contiguous(), None

    def _refuse(self, dropout: float, options: Mapping[str, Any]) -> None:
        """What no method can honour."""
        if dropout:
            raise UserError(f"{self.name} cannot drop attention weights: set the model's attention dropout to 0, not {dropout}")
        asked = [name for name in _MEANINGFUL if options.get(name) is not None and options[name] is not False]
        asked += [name for name, x in options.items() if isinstance(x, Tensor) and name not in (*_MEANINGFUL, *_HARMLESS)]
        if asked:
            raise UserError(f"{self.name} cannot honour {', '.join(asked)} of this model: use attn_implementation='eager' for it")

    def _causal(self, q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool) -> bool:
        """Whether a query reads only what is before it, by the mask where there is one."""
        if mask is not None:
            causal = is_causal_mask(mask, q.shape[2], k.shape[2], self.name) or (causal and q.shape[2] == 1)
        if not causal:
            return False
        if self.method.limits.no_causal:
            raise UserError(f"{self.name} has no causal form, which this model needs: {self.method.limits.no_causal}")
        if q.shape[2] == k.shape[2]:
            return True
        if q.shape[2] > 1 or not self.method.exact:
            raise UserError(f"{self.name} cannot read {k.shape[2]} cached keys with {q.shape[2]} queries: pass use_cache=False")
        return False  # the one last query reads all keys

    def _run(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
        if not (self.method.weights or self.method.builder):
            return mix(lambda q, k, v: self.method.dispatch(q, k, v, params), q, k, v)
        layers, own = _preparing.get(), module._modules.get(_OWN)
        if layers is not None and all(module is not layer for layer in layers):
            own = self._owner(q, k, v, params)
            module.add_module(_OWN, own)
            layers.append(module)
        elif not isinstance(own, _Owner) or (own.name, own.params) != (self.name, params):
            own = self._owner(q, k, v, params)
            if own.state_dict():
                raise UserError(
                    f"{self.name} has learned parameters: call attnbench.integrations.transformers.prepare(model, inputs...) first"
                )
        return mix(own.operator, q, k, v)

    def _owner(self, q: Tensor, k: Tensor, v: Tensor, params: Params) -> _Owner:
        shape = Shape.of(q, k, v)
        if problems := params.problems(shape):
            raise UserError(f"{self.name}: {'; '.join(problems)}")
        return _Owner(self.name, params, self.method.build(shape, **params.as_dict()).to(q))
