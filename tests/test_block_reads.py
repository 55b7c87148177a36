"""Which tokens block windows, BRA and NSA read: supports, selections and symmetries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from block_support import IDS, PRACTICAL, SETTINGS, SMALL, close, cut, settled, tensors
from torch import Tensor

import attnbench

if TYPE_CHECKING:
    from attnbench.method import Method, Params


def read_by(method: Method, params: Params, qkv: list[Tensor], row: int) -> Tensor:
    """`[B, H, N]` tokens that a query reads as tokens."""
    weights, n = method.experts(*qkv, params), qkv[1].shape[2]  # type: ignore[misc]
    read = torch.zeros(*qkv[0].shape[:2], n + 1, dtype=torch.bool)
    for bank in weights.banks:
        if not bank.compressed:
            tokens = bank.tokens(torch.tensor([row]))[:, :, 0]
            read.scatter_(2, tokens.masked_fill((tokens < 0) | (bank.causal & (tokens > row)), n), True)
    return read[..., :n]


@pytest.mark.parametrize(("name", "values"), [x for x in SETTINGS if not x[1].get("lepe")], ids=[i for i in IDS if "lepe" not in i])
def test_values_outside_the_support_do_not_matter(name: str, values: dict[str, Any]) -> None:
    qkv = tensors(63, 4)
    method, row = attnbench.get(f"{name}@{PRACTICAL[name]}"), 40
    params = settled(method, values, qkv)
    outside = ~read_by(method, params, qkv, row)
    if name == "nsa":  # a causal query knows no compressed block of the future; otherwise all tokens are folded
        outside = outside & (torch.arange(63) > row) if params.causal else torch.zeros_like(outside)
    elif not params.causal:
        assert 0 < outside.sum() < outside.numel()
    q, k, v = qkv
    before = method(q, k, v, **values)[:, :, row]
    after = method(q, k, torch.where(outside.unsqueeze(-1), v + 3.0, v), **values)[:, :, row]
    close(after, before)
    moved = method(q, k, torch.where(outside.unsqueeze(-1), v, v + 3.0), **values)[:, :, row]
    assert (moved - before > 0.1).all()


def test_window_of_nsa_is_where_sliding_window_looks() -> None:
    method, qkv = attnbench.get("nsa"), tensors(40)
    for causal in (False, True):
        params = settled(method, SMALL | {"causal": causal}, qkv)
        ours = method.experts(*qkv, params).banks[2]  # type: ignore[misc]
        other = attnbench.get("sliding_window")
        theirs = other.experts(*qkv, other.parse({"window": 9, "causal": causal})).banks[0]  # type: ignore[misc]
        assert torch.equal(ours.tokens(torch.arange(40)), theirs.tokens(torch.arange(40)))


def test_selection_of_nsa_is_shared_in_a_group_and_holds_forced_blocks() -> None:
    method, qkv = attnbench.get("nsa"), tensors(100)
    for causal in (False, True):
        routes = method.experts(*qkv, settled(method, SMALL | {"causal": causal}, qkv)).banks[1].routes  # type: ignore[misc]
        assert routes is not None
        assert torch.equal(routes[:, 0], routes[:, 1])
        assert not torch.equal(routes[:, 1], routes[:, 2])
        own = torch.arange(100)[:, None] // 12
        assert ((routes == 0).any(-1) & (routes == own).any(-1) & ((routes == own - 1).any(-1) | (own[:, 0] == 0))).all()
        assert not causal or (routes <= own).all()
        assert (routes.sort(-1).values.diff(dim=-1) != 0).logical_or(routes.sort(-1).values[..., 1:] < 0).all()


def permuted(order: Tensor, name: str, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    qkv, method = tensors(36), attnbench.get(f"{name}@{PRACTICAL[name]}")
    return method(*(x[:, :, order] for x in qkv), **values), method(*qkv, **values)[:, :, order]


@pytest.mark.parametrize(
    ("name", "values"),
    [("block_window", {"grid": "line", "window": 6}), ("block_window", {"grid": "6x6", "window": 9}), ("bra", {"region": 9, "topk": 2}),
     ("bra", {"grid": "line", "region": 6, "topk": 2})],
)  # fmt: skip
def test_tokens_of_a_region_are_a_set_and_so_are_regions(name: str, values: dict[str, Any]) -> None:
    line = values.get("grid") == "line"
    regions = list(cut((1, 36), (1, 6)).values()) if line else list(cut((6, 6), (3, 3)).values())
    g = torch.Generator().manual_seed(1)
    inside, whole = torch.arange(36), torch.arange(36)
    for tokens, other in zip(regions, torch.randperm(len(regions), generator=g).tolist(), strict=True):
        inside[tokens] = torch.tensor(tokens)[torch.randperm(len(tokens), generator=g)]
        whole[tokens] = torch.tensor(regions[other])
    for order in (inside, whole):
        assert not torch.equal(order, torch.arange(36))
        close(*permuted(order, name, values))
    got, want = permuted(torch.randperm(36, generator=g), name, values)
    assert not torch.allclose(got, want)


def test_order_matters_to_nsa() -> None:
    got, want = permuted(torch.randperm(36, generator=torch.Generator().manual_seed(1)), "nsa", SMALL)
    assert not torch.allclose(got, want)


@pytest.mark.parametrize(("name", "values"), [("bra", {"region": 9}), ("nsa", SMALL)])
def test_selection_has_no_gradient(name: str, values: dict[str, Any]) -> None:
    """Keys that no query reads as tokens get no gradient from what chose the others."""
    q, k, v = (x.requires_grad_() for x in tensors(81, 4))
    method = attnbench.get(f"{name}@{PRACTICAL[name]}")
    params = settled(method, values, [q, k, v])
    out = method(q, k, v, **values)
    (dk,) = torch.autograd.grad(out[:, :, 40].sum(), k)
    if name == "bra":
        read = read_by(method, params, [q, k, v], 40)
        assert (dk[~read] == 0).all()
    assert dk.abs().sum() > 0
