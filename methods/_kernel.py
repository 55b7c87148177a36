"""What a kernelised method tells its chunked implementation: feature maps in the dtype of the inputs, and their derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple

from ._chunks import rows_per_chunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ._kernelised import Normaliser

_COPIES = 8
"""tensors of the size of half-precision features that are alive at once in a part"""


class Part(NamedTuple):
    """Queries or keys that are computed together, of `[B, Hkv, G, N, D]`, where G query heads share a key head; of keys G is 1."""

    side: Literal["query", "key"]
    batch: slice
    heads: slice
    tokens: slice
    share: float
    """factor that gradients of its features lack: 1 of queries, 1 / M of keys, which would leave the range of float16"""
    whole: bool
    """whether this is all there is"""

    def of(self, x: Tensor) -> Tensor:
        """A view of `x: [B, Hkv, G, N, D]`."""
        return x if self.whole else x[self.batch, self.heads, :, self.tokens]

    def states(self, x: Tensor) -> Tensor:
        """`[b h, R, C]` of `x: [B, Hkv, R, C]`."""
        return (x if self.whole else x[self.batch, self.heads]).flatten(0, 1)


class Kernel(ABC):
    """The feature maps of a method, and how the weights of a query are normalised."""

    width: int
    """R"""
    norm: Normaliser
    weights: tuple[Tensor, ...] = ()
    """learned parameters"""
    couples_heads = False
    """whether features need all heads of a token at once; else a map is given all tokens of a head at once"""
    projects = False
    """whether features are products, a stage of their own"""
    dominated = False
    """whether one key may make up most of a feature's sum, so that its gradient is a difference of nearly equal parts"""
    vanishes = False
    """whether all features of a token may be zero"""
    reads = 1
    """denominators of a query: the values are cut in as many groups of channels"""

    @abstractmethod
    def features(self, x: Tensor, part: Part) -> Tensor:
        """`phi(x)`, contiguous: `[b, h, g, n, D]` -> `[b, h, g, n, R]` in the dtype of `x`."""

    @abstractmethod
    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> Sequence[Tensor]:
        """Write the gradient of `x` to `out`, where that of its `features` is `part.share` times `grad`, and return those of `weights`.

        `grad`, in at least float32, and `features` may be overwritten.
        """

    def spread(self, state: Tensor) -> Tensor:
        """What queries multiply, from the state `[B, H, R, C]`, S and z first: values and then `reads` denominators. Linear."""
        return state

    def gather(self, grad: Tensor) -> Tensor:
        """The transpose of `spread`."""
        return grad

    def columns(self, width: int) -> list[slice]:
        """Value channels of each denominator."""
        size = -(-width // self.reads)
        return [slice(i * size, min((i + 1) * size, width)) for i in range(self.reads)]

    def parts(self, side: Literal["query", "key"], x: Tensor, width: int) -> Iterator[Part]:
        """Parts of `x: [B, Hkv, G, N, D]`: all tokens of some heads, or some tokens of all heads where heads are coupled."""
        b, h, g, n, _ = x.shape
        share = 1 / n if side == "key" else 1.0
        row_bytes = _COPIES * g * (self.width + width) // 2 * x.element_size()
        if self.couples_heads:
            rows, heads = rows_per_chunk(x, row_bytes * h), h
            tokens, batch = min(rows, n), max(1, rows // n)
        else:
            pairs, tokens = rows_per_chunk(x, row_bytes * n), n
            heads, batch = min(pairs, h), max(1, pairs // h)
        whole = batch >= b and heads >= h and tokens >= n
        for i in range(0, b, batch):
            for j in range(0, h, heads):
                for start in range(0, n, tokens):
                    yield Part(side, slice(i, i + batch), slice(j, j + heads), slice(start, start + tokens), share, whole)
