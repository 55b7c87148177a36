"""Input profiles: a case's q, k, v, seeded, drawn the same on every device, and hashed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnbench.errors import UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor

    from attnbench.method import Shape

Inputs = tuple["Tensor", "Tensor", "Tensor"]


def _normal(shape: Shape, g: Generator) -> Inputs:
    """Independent standard normal entries: nothing to find, the hardest case for any selection."""
    kv = (shape.batch, shape.kv_heads, shape.keys)
    return (
        torch.randn(shape.batch, shape.heads, shape.n, shape.dim, generator=g),
        torch.randn(*kv, shape.dim, generator=g),
        torch.randn(*kv, shape.dim_v, generator=g),
    )


def _clustered(shape: Shape, g: Generator) -> Inputs:
    """Queries and keys around shared centres, a cluster being a contiguous run of about sqrt(N) tokens; values follow the cluster."""
    q, k, v = _normal(shape, g)
    clusters = max(1, round(shape.keys**0.5))
    centres = torch.randn(shape.batch, shape.kv_heads, clusters, shape.dim, generator=g)
    meanings = torch.randn(shape.batch, shape.kv_heads, clusters, shape.dim_v, generator=g)
    of_key = torch.arange(shape.keys) * clusters // shape.keys
    of_query = torch.arange(shape.n) * clusters // shape.n
    groups = shape.heads // shape.kv_heads
    spread, pull = 0.5, 1.5
    k, v = spread * k + pull * centres[:, :, of_key], spread * v + meanings[:, :, of_key]
    return spread * q + pull * centres.repeat_interleave(groups, 1)[:, :, of_query], k, v


def _needle(shape: Shape, g: Generator) -> Inputs:
    """Each query has one key, anywhere, that carries nearly all of its softmax mass."""
    q, k, v = _normal(shape, g)
    match = torch.randint(shape.keys, (shape.n,), generator=g)
    unit = torch.nn.functional.normalize(k, dim=-1).repeat_interleave(shape.heads // shape.kv_heads, 1)
    # the needle's logit exceeds the rest, of unit variance, by about 2 log M: its weight is then near 1
    strength = shape.dim**0.5 * 2 * torch.tensor(float(max(2, shape.keys))).log()
    norms = k.norm(dim=-1, keepdim=True).repeat_interleave(shape.heads // shape.kv_heads, 1)
    return 0.1 * q + strength / norms[:, :, match] * unit[:, :, match], k, v


def _local(shape: Shape, g: Generator) -> Inputs:
    """Rotary-like locality: logits fall off with distance, since q and k share slowly turning phases."""
    q, k, v = _normal(shape, g)
    half = shape.dim // 2
    frequency = 10000.0 ** (-torch.arange(half) / max(1, half))

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * frequency
        x = 0.5 * x
        x[..., :half] += 1.5 * angle.cos()
        x[..., half : 2 * half] += 1.5 * angle.sin()
        return x

    return turned(q), turned(k), v


_TOPICS = 64
"""directions of routed profiles, fewer where there are fewer tokens"""


def _routed(shape: Shape, g: Generator, weight: Callable[[Tensor], Tensor], slope: float) -> Inputs:
    """Queries and keys that each point along one of up to 64 random directions, by contiguous runs; values are noise.

    The keys' runs are equally long; the queries' follow `weight` of the direction's rank, from 1. Vectors are `4 D^(1/4)` long, which
    makes a logit of 16 along a common direction, times `1 + slope` at the first token, falling to 1 at the last: among experts of one
    direction the first wins.
    """
    q, k, v = _normal(shape, g)
    topics = min(_TOPICS, shape.keys, shape.n)
    centres = torch.nn.functional.normalize(torch.randn(shape.batch, shape.kv_heads, topics, shape.dim, generator=g), dim=-1)
    share = weight(torch.arange(1, topics + 1, dtype=torch.float64))
    ends = (share.cumsum(0) / share.sum()).contiguous()
    of_key = torch.arange(shape.keys) * topics // shape.keys
    of_query = torch.searchsorted(ends, (torch.arange(shape.n, dtype=torch.float64) + 0.5) / shape.n).clamp(max=topics - 1)
    own = centres.repeat_interleave(shape.heads // shape.kv_heads, 1)
    return _pointed(q, own[:, :, of_query], slope), _pointed(k, centres[:, :, of_key], slope), v


def _pointed(noise: Tensor, directions: Tensor, slope: float) -> Tensor:
    n, dim = noise.shape[2:]
    length = 4 * dim**0.25 * (1 + slope * (1 - torch.arange(n) / max(1, n - 1)))
    pointed: Tensor = 0.1 * noise + length[:, None] * directions
    return pointed


def _balanced(shape: Shape, g: Generator) -> Inputs:
    """Every expert is the nearest of about as many queries: 64 directions, each of as many queries as keys."""
    return _routed(shape, g, torch.ones_like, 0.0)


def _skewed(shape: Shape, g: Generator) -> Inputs:
    """Queries follow Zipf's law: the direction of rank r is that of a share of them in proportion to 1 / r."""
    return _routed(shape, g, torch.reciprocal, 1.0)


def _adversarial(shape: Shape, g: Generator) -> Inputs:
    """All queries are nearest to the same expert: one direction, along which the first keys and landmarks reach furthest."""
    q, k, v = _normal(shape, g)
    centre = torch.nn.functional.normalize(torch.randn(shape.batch, shape.kv_heads, 1, shape.dim, generator=g), dim=-1)
    return _pointed(q, centre.repeat_interleave(shape.heads // shape.kv_heads, 1), 1.0), _pointed(k, centre, 1.0), v


PROFILES: dict[str, Callable[[Shape, Generator], Inputs] | None] = {
    "randn": _normal,
    "clustered": _clustered,
    "needle": _needle,
    "local": _local,
    "balanced": _balanced,
    "skewed": _skewed,
    "adversarial": _adversarial,
    "file": None,
}
"""Profile name -> generator; `file:PATH` reads q, k, v from a .safetensors file."""


def draw(profile: str, shape: Shape, seed: int, dtype: torch.dtype, device: str) -> Inputs:
    """q, k, v of a profile on `device`. Raises `UserError` for an unknown profile or a file that does not fit."""
    name, _, path = profile.partition(":")
    if name not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    generator = PROFILES[name]
    tensors = _read(path, shape) if generator is None else generator(shape, torch.Generator().manual_seed(seed))
    q, k, v = (x.to(device=device, dtype=dtype).contiguous() for x in tensors)
    return q, k, v


@dataclass
class Drawn:
    """Inputs already drawn, with their hashes, on the host: drawing and hashing long ones takes seconds, copying them does not.

    The least recently used are dropped where all would take more than `limit` bytes; those of files are always read anew.
    """

    limit: int
    _kept: OrderedDict[tuple[object, ...], tuple[Inputs, str]] = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def beside(cls, device: str) -> Drawn:
        """8 GiB of them beside a GPU, which holds the lengths of a long suite; none on a CPU."""
        return cls(0 if device == "cpu" else 8 << 30)

    def __call__(self, profile: str, shape: Shape, seed: int, dtype: torch.dtype, device: str) -> tuple[Inputs, str]:
        """As `draw`, and the hash of the bytes."""
        key = (profile, shape, seed, dtype)
        if key not in self._kept:
            tensors = draw(profile, shape, seed, dtype, "cpu")
            self._kept[key] = tensors, digest(tensors)
        self._kept.move_to_end(key)
        (q, k, v), hashed = self._kept[key]
        if profile.startswith("file:"):
            del self._kept[key]
        while self._kept and sum(x.nbytes for tensors, _ in self._kept.values() for x in tensors) > self.limit:
            self._kept.popitem(last=False)
        return (q.to(device), k.to(device), v.to(device)), hashed


def hold(profile: str) -> None:
    """Raise `UserError` where a profile's file cannot be read or lacks q, k or v; no more than its header is read."""
    name, _, path = profile.partition(":")
    if name in PROFILES and PROFILES[name] is None:
        _sizes(path)


def _sizes(path: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a file and their sizes, q, k and v among them. Raises `UserError`."""
    if not path:
        raise UserError("profile file needs a path: write file:PATH.safetensors")
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError("profile file needs the package safetensors: pip install 'attnbench[files]'") from None
    try:
        with safe_open(Path(path), "pt") as file:
            sizes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # safetensors raises its own untyped errors
        raise UserError(f"cannot read {path}: {error}") from None
    for key in "qkv":
        if key not in sizes:
            raise UserError(f"{path} holds no tensor {key!r}: it needs q, k and v as [B, H, N, D]")
    return sizes


def _read(path: str, shape: Shape) -> Inputs:
    sizes = _sizes(path)
    from safetensors.torch import load_file

    wanted = {
        "q": (shape.batch, shape.heads, shape.n, shape.dim),
        "k": (shape.batch, shape.kv_heads, shape.keys, shape.dim),
        "v": (shape.batch, shape.kv_heads, shape.keys, shape.dim_v),
    }
    for key, size in wanted.items():
        if any(have < want for have, want in zip(sizes[key], size, strict=False)) or len(sizes[key]) != 4:
            advice = "lower --axis n, heads, dim or batch" if len(sizes[key]) == 4 else "save it as [B, H, N, D]"
            raise UserError(f"{path}: {key} is {list(sizes[key])}, the case needs at least {list(size)}: {advice}")
    data = load_file(Path(path))
    for key in wanted:
        if not data[key].is_floating_point() or not bool(data[key].isfinite().all()):
            raise UserError(f"{path}: {key} holds numbers that are not finite, or whole ones: save finite floating-point q, k and v")
    q, k, v = (data[key][tuple(slice(n) for n in size)] for key, size in wanted.items())
    return q, k, v


def digest(tensors: Inputs) -> str:
    """Hash of the bytes of q, k, v, the same on every device."""
    h = hashlib.sha256()
    for x in tensors:
        h.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]
