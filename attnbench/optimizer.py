"""The optimiser of every training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from attnbench.recipe import Recipe

_UNDECAYED = ("places", "class_token", "pos_embed", "cls_token")
"""parameters that are vectors of places, of our models and of timm's"""


def optimizer(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.AdamW:
    """AdamW that decays matrices alone, not positions; on a GPU its rate is a tensor, which a CUDA graph reads anew in each step."""
    decays = {name: x.ndim >= 2 and name.rpartition(".")[2] not in _UNDECAYED for name, x in model.named_parameters()}
    matrices, others = ([x for name, x in model.named_parameters() if decays[name] is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    gpu = device != "cpu"
    rate = torch.full((), recipe.rate, device=device) if gpu else recipe.rate
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=recipe.betas, fused=gpu, capturable=gpu)
