"""A small transformer in which only the mixing differs between methods."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attnbench.errors import UserError, differences

from . import _rotary
from ._conv import ShortConvolution
from .block import Block

if TYPE_CHECKING:
    from collections.abc import Mapping

Places = Literal["learned", "rotary", "none"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a `TinyTransformer` is made of; two models whose architectures are equal share their weights."""

    method: str = "softmax"
    """name in the registry, or `name@implementation`"""
    params: Mapping[str, Any] = field(default_factory=dict)
    """parameters of the method"""
    vocabulary: int = 0
    """token ids; 0 where tokens are vectors"""
    features: int = 0
    """numbers a token; 0 where tokens are ids"""
    classes: int = 2
    tokens: int = 256
    """N, without the class token"""
    grid: tuple[int, int] | None = None
    """(height, width) of the tokens, row by row; None for a sequence"""
    dim: int = 128
    """channels C"""
    heads: int = 2
    depth: int = 2
    """blocks"""
    positions: Places = "rotary"
    """`rotary` turns queries and keys, along the sequence or over the grid; `learned` adds a vector to each token"""
    short_conv: int = 0
    """width of a depthwise convolution over neighbours, on a grid of a square of them, that is added to the embedding; 0 for none"""
    causal: bool = False
    class_token: bool = False
    """classify a token of its own, rather than the mean of all"""
    per_token: bool = False
    """a class for each token, rather than one an example"""
    qkv_bias: bool = False
    """whether the fused projection of queries, keys and values has a bias"""
    drop_path: float = 0.0
    """how often the last block is skipped for an example in training; the first never is, those between in proportion"""
    library: Literal["", "timm"] = ""
    """whose modules the model is made of: ours, or timm's"""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"params": dict(self.params), "grid": list(self.grid) if self.grid else None}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which the JSON form of another architecture differs, each with both values."""
        return differences({**_DEFAULTS, **other}, self.as_dict())

    @property
    def own_params(self) -> dict[str, Any]:
        """Parameters of the method without what a layer tells it by itself."""
        return {k: v for k, v in self.params.items() if k not in {"causal", "prefix"}}


_DEFAULTS = {"short_conv": 0, "qkv_bias": False, "drop_path": 0.0, "library": ""}
"""fields that older checkpoints lack"""


class TinyTransformer(nn.Module):
    """Embedding, blocks, norm and a linear head: `[B, N]` token ids or `[B, N, F]` numbers to class scores.

    >>> import torch
    >>> from attnbench.nn import Architecture, TinyTransformer
    >>> model = TinyTransformer(Architecture(vocabulary=16, classes=10, tokens=64, dim=32, method="mita", params={"topk": 8}))
    >>> model(torch.zeros(2, 64, dtype=torch.long)).shape
    torch.Size([2, 10])
    >>> sizes = {"features": 768, "tokens": 16, "grid": (4, 4), "dim": 48, "heads": 3, "positions": "learned", "class_token": True}
    >>> vit = TinyTransformer(Architecture(**sizes, classes=5, method="agent", params={"landmarks": 4}))
    >>> scores = vit(torch.randn(2, 16, 768))  # patches, as `attnbench.tasks.images.patches` cuts them
    >>> torch.nn.functional.cross_entropy(scores, torch.tensor([1, 4])).backward()
    >>> vit.parameter_count - vit.mixing_count == TinyTransformer(Architecture(**sizes, classes=5)).parameter_count
    True
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        if (a.vocabulary > 0) == (a.features > 0):
            raise UserError("a model reads token ids or numbers: set vocabulary or features, not both")
        if a.class_token and a.per_token:
            raise UserError("a class token classifies the whole example: leave out class_token, or per_token")
        self.embed: nn.Module = nn.Embedding(a.vocabulary, a.dim) if a.vocabulary else nn.Linear(a.features, a.dim)
        self.short_conv = ShortConvolution(a.dim, a.short_conv, grid=a.grid, causal=a.causal) if a.short_conv else None
        self.places = nn.Parameter(torch.empty(a.tokens, a.dim)) if a.positions == "learned" else None
        self.class_token = nn.Parameter(torch.empty(1, 1, a.dim)) if a.class_token else None
        rates = [a.drop_path * i / max(1, a.depth - 1) for i in range(a.depth)]
        self.blocks = nn.ModuleList(Block(a.dim, a.heads, a.method, drop_path=rate, **self._layer()) for rate in rates)
        self.norm, self.head = nn.LayerNorm(a.dim), nn.Linear(a.dim, a.classes)
        if a.per_token and a.classes == a.vocabulary:
            self.head.weight = self.embed.weight  # as language models have it: answers are tokens
        self._initialise()

    def _layer(self) -> dict[str, Any]:
        """Arguments of each attention layer. What the layer tells a method by itself is left to it."""
        a = self.architecture
        own = a.own_params
        grid: dict[str, Any] = {"grid": a.grid} if a.grid else {}
        if "grid" in own:
            grid = {"grid": own.pop("grid")}
        turned = "rotary-2d" if a.grid else "rotary"
        return {
            **own,
            **grid,
            "tokens": a.tokens + int(a.class_token),
            "prefix": int(a.class_token),
            "causal": a.causal,
            "positions": turned if a.positions == "rotary" else "none",
            "qkv_bias": a.qkv_bias,
        }

    def _initialise(self) -> None:
        """Normal weights of deviation `fan_in^-0.5`, for ends of residual branches over sqrt(2 depth), and zero biases.

        At widths this small GPT-2's 0.02 leaves attention uniform, and recall then takes many times as long to learn. What a method owns
        stays as it was drawn.
        """
        owned = {id(x) for operator in self.operators for x in operator.modules()}
        ends = {id(x) for block in self.blocks if isinstance(block, Block) for x in (block.attention.proj, block.mlp[2])}
        for module in self.modules():
            if id(module) in owned:
                continue
            if isinstance(module, nn.Linear):
                scale = (2 * self.architecture.depth) ** -0.5 if id(module) in ends else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for x in (self.class_token, self.embed.weight if isinstance(self.embed, nn.Embedding) else None):
            if x is not None:
                nn.init.normal_(x, std=self.architecture.dim**-0.5)
        if self.places is not None:
            with torch.no_grad():
                self.places.copy_(waves(self.architecture) * (2 / self.architecture.dim) ** 0.5)

    @property
    def operators(self) -> list[nn.Module]:
        """The method's module in each block."""
        return [block.attention.operator for block in self.blocks if isinstance(block, Block)]

    @property
    def parameter_count(self) -> int:
        """Learned numbers in all."""
        return sum(x.numel() for x in self.parameters())

    @property
    def mixing_count(self) -> int:
        """Learned numbers that belong to the method alone."""
        return sum(x.numel() for operator in self.operators for x in operator.parameters())

    def forward(self, inputs: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Class scores: `[B, classes]`, the mean over tokens where `mask [B, N]` is set; or a row for each token.

        Args:
            inputs: `[B, N]` long or `[B, N, F]` float.
            positions: places in the flattened `[B * N]` tokens that a per-token model scores, all where absent.
            mask: tokens that are no padding, for the mean.
        """
        return self.end(self._mixed(inputs), positions, mask)

    def features(self, inputs: Tensor) -> Tensor:
        """`[B, N, C]` after the last norm, or `[B, 1 + N, C]` with a class token."""
        out: Tensor = self.norm(self._mixed(inputs))
        return out

    def _mixed(self, inputs: Tensor) -> Tensor:
        x = self.begin(inputs)
        for block in self.blocks:
            x = block(x)
        return x

    def begin(self, inputs: Tensor) -> Tensor:
        """`[B, N, C]` that the first block reads, or `[B, 1 + N, C]` with a class token."""
        x: Tensor = self.embed(inputs)
        if self.short_conv is not None:
            x = x + self.short_conv(x)
        if self.places is not None:
            x = x + self.places[: x.shape[1]]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return x

    def end(self, x: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Class scores of what the last block leaves."""
        x = self.norm(x)
        if self.architecture.per_token:
            rows = x.flatten(0, 1)
            scores: Tensor = self.head(rows if positions is None else rows.index_select(0, positions))
            return scores
        if self.architecture.class_token:
            pooled = x[:, 0]
        elif mask is None:
            pooled = x.mean(1)
        else:
            weight = mask.to(x.dtype).unsqueeze(-1)
            pooled = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
        out: Tensor = self.head(pooled)
        return out


def built(architecture: Architecture) -> TinyTransformer:
    """The model of an architecture, freshly initialised. Raises `UserError` for one that makes no sense, or whose library is missing."""
    if architecture.library == "timm":
        from attnbench.integrations.timm_trained import TimmTransformer

        return TimmTransformer(architecture)
    return TinyTransformer(architecture)


def waves(architecture: Architecture) -> Tensor:
    """Where learned positions start: sines and cosines `[N, C]` of the position, on a grid half of them of the row and half of the column.

    A shift by one token is then a rotation, the same everywhere. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; but their base of
    10000 is N here, so that the longest wave is 2 pi N: longer ones tell no token from the next, and recall was learned later or, without
    a causal mask, not at all.
    """
    sizes = architecture.grid or (architecture.tokens,)
    turns = _rotary.angles(sizes, architecture.dim, float(max(2, *sizes)), 0, torch.device("cpu"))
    both = torch.cat([turns.sin(), turns.cos()], 1).float()
    return pad(both, (0, architecture.dim - both.shape[1]))
