"""MHLA by block: half-precision features, products summed in float32, an analytic backward pass.

As in linear attention a state has a further column for z, and both are divided by N so that they fit float16; z, and the gradient of a
denominator, are two half-precision numbers each (see `_kernelised_chunked`). Features are made in the
order of blocks and gradients are written back in that of tokens, so that tiles of a grid cost a copy of v and of its gradient alone. Kept
for the backward pass are inputs, states and denominators. Heads are taken together as a budget of bytes allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attnbench.eager import wide
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._products import outer_sum, wide_bmm
from .mhla import EPS, local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from ._tiles import Tiles
    from .mhla import MhlaParams

_COPIES = 8
"""tensors of the size of q that are alive at once in a step"""


def blocked(q: Tensor, k: Tensor, v: Tensor, params: MhlaParams, *, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Features are rounded to the dtype of q; sums are in at least float32."""
    form = _Form(params.tiles(q.shape[2]), params.normalizer, q.shape[1] // k.shape[1], v.shape[3])
    flat = [x.contiguous().flatten(0, 1) for x in (q, k, v)]
    out: Tensor = _Mhla.apply(form, weights["mix"], *flat)  # type: ignore[no-untyped-call]
    out = out.view(*q.shape[:3], v.shape[3])
    if not params.conv:
        return out
    with stage("project"):
        return out + local(q, v, params, weights)


class _Form(NamedTuple):
    """What is the same for all heads. By block, m blocks of T tokens, means `[X m, T, .]`; by tile, `[X, rows, columns, T', T'', .]`."""

    tiles: Tiles
    normalizer: str
    group: int
    """query heads of a key head"""
    width: int
    """Dv, and the column of a state that holds z"""

    def steps(self, q: Tensor, v: Tensor) -> Iterator[tuple[slice, slice]]:
        """Key heads to take together, and their query heads."""
        width = self.group * (q.shape[2] + v.shape[2]) // 2
        step = rows_per_chunk(q, _COPIES * q.shape[1] * width * q.element_size())
        for start in range(0, len(v), step):
            stop = min(start + step, len(v))
            yield slice(start, stop), slice(start * self.group, stop * self.group)

    def share(self, n: int) -> float:
        """What states are multiplied by; without a denominator it would not cancel."""
        return 1.0 if self.normalizer == "none" else 1 / n

    def by_block(self, x: Tensor) -> Tensor:
        """Tokens `[X, N, .]` by block, or what is by tile."""
        x = self.tiles.cut(x) if x.ndim == 3 else x
        return x.reshape(len(x) * self.tiles.count, -1, x.shape[-1])

    def by_tile(self, x: Tensor) -> Tensor:
        """A view by tile of what is by block."""
        return x.view(-1, self.tiles.rows, self.tiles.columns, *self.tiles.size, x.shape[-1])

    def features(self, x: Tensor, *, keys: bool = False) -> Tensor:
        """`phi(x)` by block of tokens `x: [X, N, D]`; of keys, zero where a block is filled up."""
        cut = self.tiles.cut(x)
        out = torch.clamp(cut, min=0, out=x.new_empty(cut.shape)).add_(EPS)
        if keys and not self.tiles.even:
            out.masked_fill_(self.tiles.uneven(x.device).filling.view(1, *cut.shape[1:5], 1), 0.0)
        return self.by_block(out)

    def store(self, target: Tensor, operation: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
        """Write `operation(x, y)`, both by tile, to the tokens `target: [X, N, .]`."""
        if self.tiles.even:
            operation(x, y, out=self.tiles.cut(target))
        else:
            self.tiles.put(target, operation(x, y).to(target.dtype))

    def state(self, key: Tensor, v: Tensor) -> Tensor:
        """S, z and zero columns, as `rounded` wants them, of each block `[X, m, D, ..]`, in at least float32."""
        state = wide(v[:0]).new_zeros(*key.shape[::2], -(-(self.width + 3) // 8) * 8)
        state[..., : self.width] = outer_sum(key, self.by_block(v))
        if self.normalizer != "none":
            state[..., self.width] = key.sum(1, dtype=state.dtype)
        return (state * self.share(v.shape[1])).view(len(v), -1, *state.shape[1:])

    def mixed(self, state: Tensor, mix: Tensor) -> Tensor:
        """`sum_a mix_ba state_a`; in the authors' code z stays as it is, since the products of queries with it are mixed."""
        out = (wide(mix) @ state.flatten(2)).view_as(state)
        if self.normalizer == "repo":
            out[..., self.width] = state[..., self.width]
        return out

    def rounded(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """What the queries of each block multiply, `[Y m, D, ..]` of mixed states: values, z, what its rounding lacks, and z again."""
        exact = self.spread(state).flatten(0, 1)
        out, width = exact.to(dtype), self.width
        out[..., width + 1] = exact[..., width] - out[..., width]
        out[..., width + 2] = out[..., width]
        return out

    def spread(self, x: Tensor) -> Tensor:
        """Repeat what key heads have for their query heads."""
        return x.repeat_interleave(self.group, 0) if self.group > 1 else x

    def centred(self, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The state of half-precision values less their mean `[X, 1, Dv, 1]`: rounded gradients are then no small differences."""
        mean = torch.zeros_like(state[:, :1, :1, : self.width])
        if self.normalizer == "paper" and dtype.itemsize == 2:
            sums = state.sum((1, 2), keepdim=True)
            mean = sums[..., : self.width] / sums[..., self.width, None]
            state = torch.cat([state[..., : self.width] - state[..., self.width, None] * mean, state[..., self.width :]], -1)
        return state, mean.transpose(2, 3)

    def total(self, mixed: Tensor, mix: Tensor, eps: float) -> Tensor:
        """Denominators by block `[X m, T, 1]`, of products by block with a mixed state."""
        own = mixed[..., self.width, None] + mixed[..., self.width + 1, None]
        return (self.across(own, mix) if self.normalizer == "repo" else own) + eps

    def across(self, x: Tensor, mix: Tensor) -> Tensor:
        """`sum_a mix_ba x_a` of `x: [X m, T, 1]`, place by place."""
        return (wide(mix) @ wide(x).view(-1, len(mix), x.shape[1])).view(x.shape)


class _Mhla(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: _Form, mix: Tensor, *inputs: Tensor) -> Tensor:
        """`mix: [m, m]`; inputs `q: [Y, N, D]`, `k: [X, N, D]`, `v: [X, N, Dv]` -> `[Y, N, Dv]`."""
        q, k, v = inputs
        out, width = q.new_empty(*q.shape[:2], form.width), form.width
        states, totals = [], []
        for heads, queries in form.steps(q, v):
            with stage("state"):
                states.append(form.state(form.features(k[heads], keys=True), v[heads]))
                read = form.rounded(form.mixed(states[-1], mix), q.dtype)
            with stage("attend"):
                mixed = wide_bmm(form.features(q[queries]), read)
                if form.normalizer == "none":
                    form.tiles.put(out[queries], mixed[..., :width].to(q.dtype))
                else:
                    totals.append(form.total(mixed, mix, EPS * form.share(q.shape[1])))
                    form.store(out[queries], torch.div, form.by_tile(mixed)[..., :width], form.by_tile(totals[-1]))
        ctx.save_for_backward(mix, q, k, v, torch.cat(states), *([torch.cat(totals)] if totals else []))
        ctx.form = form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mix, q, k, v, states, *totals = ctx.saved_tensors
        form, grad = ctx.form, grad.contiguous()
        dq, dk, dv, dmix = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(wide(mix))
        columns = slice(form.width if form.normalizer == "repo" else None)
        for heads, queries in form.steps(q, v):
            state, mean = form.centred(states[heads], q.dtype)
            rows = slice(queries.start * len(mix), queries.stop * len(mix))
            dquery, dread, part = _read_backward(form, grad[queries], q[queries], totals[0][rows] if totals else None, (state, mix))
            form.store(dq[queries], _relu_backward, form.by_tile(dquery), form.tiles.cut(q[queries]))
            dmix += part + torch.einsum("ybde,yade->ba", dread[..., columns], form.spread(state)[..., columns])
            dstate = form.mixed(dread, mix.t()).unflatten(0, (-1, form.group)).sum(1)
            dkey, dvalue = _state_backward(form, dstate, mean, k[heads], v[heads])
            form.store(dk[heads], _relu_backward, form.by_tile(dkey), form.tiles.cut(k[heads]))
            form.tiles.put(dv[heads], dvalue)
        return None, dmix.to(mix.dtype), dq, dk, dv


def _read_backward(
    form: _Form, grad: Tensor, q: Tensor, total: Tensor | None, mixing: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """With `a = g / total` and `r = -a.o`, what the denominator gets: `dphi(q) = a S^T + r z^T`, `dS = phi(q)^T a`, `dz = phi(q)^T r`.

    Returns `dphi(q)` by block, the gradient of the mixed states, and what the denominators of the authors' code add to that of the mixture.
    """
    (state, mix), width, part = mixing, form.width, torch.zeros_like(wide(mixing[1]))
    read, query = form.rounded(form.mixed(state, mix), q.dtype), form.features(q)
    a = grad.new_empty(*query.shape[:2], read.shape[2])
    values = form.by_tile(a)[..., :width]
    a[..., width:] = 0
    if total is None:
        values.copy_(form.tiles.cut(grad))
    else:
        torch.div(form.tiles.cut(grad), form.by_tile(total), out=values)
        product = wide_bmm(query, read[..., :width]).mul_(a[..., :width])
        r = -product.sum(2, keepdim=True) / total
        if form.normalizer == "repo":
            own = wide_bmm(query, read[..., width : width + 2]).sum(2, keepdim=True)
            part = torch.einsum("ybt,yat->ba", *(wide(x).view(-1, len(mix), x.shape[1]) for x in (r, own)))
            r = form.across(r, mix.t())
        a[..., width, None] = a[..., width + 1, None] = r
        a[..., width + 2, None] = r - a[..., width, None]
    dread = outer_sum(query, a)
    dread[..., width] += dread[..., width + 2]
    dread[..., width + 1 :] = 0
    return wide_bmm(a, read.transpose(1, 2)), dread.view(len(q), len(mix), q.shape[2], -1), part


def _state_backward(form: _Form, dstate: Tensor, mean: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """By block, `dphi(k) = v dS^T + dz` and `dv = phi(k) dS`; taking the mean off v takes it off o and changes dz alone."""
    share, ds = form.share(k.shape[1]), dstate[..., : form.width]
    dz = (dstate[..., form.width, None] - ds @ mean).flatten(0, 1).transpose(1, 2).to(v.dtype)
    ds = ds.flatten(0, 1).to(v.dtype)
    dkey = torch.baddbmm(dz, form.by_block(v), ds.transpose(1, 2), beta=share, alpha=share)
    return dkey, torch.baddbmm(v[:1, :1], form.features(k, keys=True), ds, beta=0, alpha=share)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`grad` where x is above 0, else 0."""
    out = torch.empty_like(grad) if out is None else out
    product: Tensor = torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    return product
