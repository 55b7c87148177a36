"""The five dimensions: the paper's rows, and declared coordinates held against measured ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cli_support import call
from torch import Tensor

import attnbench
from attnbench import registry, taxonomy
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Method, Params
from attnbench.observation import LENGTHS
from attnbench.taxonomy import DIMENSIONS, Construction, Coordinates, Count, Expert, Family, Scaling, Topology
from attnbench.verify import verify

PAPER = {  # the figure's rows of methods that are here, transcribed
    "linear": ("compression", "linear layer", "one shared", "kernelization", "all-to-one"),
    "mhla": ("compression", "linear layer", "m", "local prior & kernelization", "m times N/m-to-one"),
    "linformer": ("compression", "MLP", "one shared", "learnable projection", "all-to-one"),
    "pvt": ("compression", "MLP", "one shared", "learnable projection", "all-to-one"),
    "agent": ("compression", "MLP", "one shared", "landmark probing", "all-to-one"),
    "ttt": ("compression", "module", "one shared", "test-time training", "all-to-one"),
    "vit3": ("compression", "module", "one shared", "test-time training", "all-to-one"),
    "bra": ("routing", "MLP", "N/n", "locality prior", "N/n-to-N/n"),
    "moba": ("routing", "MLP", "N/n", "locality prior", "N-to-N/n"),
    "nsa": ("compression & routing", "MLP", "N/n", "locality prior", "N-to-N/n"),
    "spark": ("routing", "MLP", "N", "light-weight skim", "N times one-to-one"),
    "dsa": ("routing", "MLP", "N", "light-weight skim", "N times one-to-one"),
    "mita": ("compression & routing", "MLP", "m", "landmark probing", "N-to-m"),
    "deformable": ("routing", "MLP", "N", "offset predicting", "N times one-to-one"),
    "dat": ("routing", "MLP", "one shared", "offset predicting", "N-to-one"),
}


@pytest.mark.parametrize("name", PAPER)
def test_declared_coordinates_are_the_papers(name: str) -> None:
    assert tuple(attnbench.get(name).coordinates.as_dict().values()) == PAPER[name]


@pytest.mark.parametrize("name", attnbench.methods())
def test_measured_coordinates_agree_with_declared_ones(name: str) -> None:
    rows = verify(attnbench.get(name))
    assert [r.dimension for r in rows] == list(DIMENSIONS)
    assert not [r.as_dict() for r in rows if r.conflict]
    assert all(r.measured or r.why for r in rows)


@pytest.mark.parametrize("name", ["softmax", "linear", "mita", "moba", "topk", "sliding_window"])
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_a_wrong_declaration_is_found_out(name: str, dimension: str) -> None:
    method = attnbench.get(name)
    measured = next(r for r in verify(method) if r.dimension == dimension).measured
    wrong = [value for value in DIMENSIONS[dimension] if str(value) not in measured]
    assert wrong
    for value in wrong:
        liar = replace(method, coordinates=replace(method.coordinates, **{dimension: value}))
        assert [r.dimension for r in verify(liar) if r.conflict] == [dimension]


Build = Callable[[Tensor, Tensor, Tensor, Params], FastWeights]


def method(experts: Build, *coordinates: object) -> Method:
    return replace(attnbench.get("softmax"), name="made", experts=experts, coordinates=Coordinates(*coordinates))  # type: ignore[arg-type]


def shared_projection(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    mix = torch.rand(7, k.shape[2], generator=torch.Generator().manual_seed(0), dtype=k.dtype)
    return FastWeights((Bank(w1=(mix @ k).unsqueeze(2), w2=(mix @ v).unsqueeze(2)),))


def gathered(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    index = (q.sum(-1) * 100).long().remainder(k.shape[2])[:, :, None, :5]
    return FastWeights((Bank(k, v, index),))


def blocks(k: Tensor, size: int = 9) -> Tensor:
    return torch.arange(k.shape[2]).view(-1, size).expand(*k.shape[:2], -1, -1)


def blocks_together(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    means = q.unflatten(2, (-1, 9)).mean(3)
    chosen = (means @ k.unflatten(2, (-1, 9)).mean(3).transpose(-1, -2)).topk(2, -1).indices
    return FastWeights((Bank(k, v, blocks(k), routes=chosen.repeat_interleave(9, 2)),))


def segments(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    parts = 4
    w1, w2 = (x.unflatten(2, (parts, -1)) for x in (k, v))
    routes = torch.arange(parts).repeat_interleave(q.shape[2] // parts).expand(*q.shape[:2], -1).unsqueeze(-1)
    return FastWeights((Bank(w1=w1, w2=w2, routes=routes, activation="linear"),), combine="linear")


def tiles(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    side, place = int(q.shape[2] ** 0.5), torch.arange(q.shape[2])
    owner = place // side * 2 // side * 2 + place % side * 2 // side
    w1, w2 = (torch.stack([x[:, :, owner == e] for e in range(4)], 2) for x in (k, v))
    routes = owner.expand(*q.shape[:2], -1).unsqueeze(-1)
    return FastWeights((Bank(w1=w1, w2=w2, routes=routes, activation="linear"),), combine="linear")


def hashed(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    w1, w2 = (x.unflatten(2, (4, -1)).mean(3, keepdim=True) for x in (k, v))
    return FastWeights((Bank(w1=w1, w2=w2, routes=(q @ w1.squeeze(3).mT).argmax(-1, keepdim=True)),))


def cheap_skim(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    index = (q[..., :2] @ k[..., :2].transpose(-1, -2)).topk(9, -1).indices
    routes = torch.arange(q.shape[2]).expand(*q.shape[:2], -1).unsqueeze(-1)
    return FastWeights((Bank(k, v, index, routes=routes),))


@pytest.mark.parametrize(
    ("experts", "coordinates"),
    [
        (shared_projection, (Scaling.COMPRESSION, Expert.MLP, Count.SHARED, Construction.LEARNABLE_PROJECTION, Topology.ALL_TO_ONE)),
        (gathered, (Scaling.ROUTING, Expert.MLP, Count.SHARED, Construction.OFFSET_PREDICTING, Topology.N_TO_ONE)),
        (blocks_together, (Scaling.ROUTING, Expert.MLP, Count.BLOCKS, Construction.LOCALITY_PRIOR, Topology.BLOCKS_TO_BLOCKS)),
        (segments, (Scaling.COMPRESSION, Expert.LINEAR, Count.LANDMARKS, Construction.LOCAL_KERNELIZATION, Topology.BLOCK_TO_ONE)),
        (tiles, (Scaling.COMPRESSION, Expert.LINEAR, Count.LANDMARKS, Construction.LOCAL_KERNELIZATION, Topology.BLOCK_TO_ONE)),
        (hashed, (Scaling.BOTH, Expert.MLP, Count.LANDMARKS, Construction.LEARNABLE_PROJECTION, Topology.N_TO_M)),
        (cheap_skim, (Scaling.ROUTING, Expert.MLP, Count.TOKENS, Construction.SKIM, Topology.ONE_TO_ONE)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_shapes_of_attention_that_no_method_here_has_are_told_apart(experts: Build, coordinates: tuple[object, ...]) -> None:
    assert not [r.as_dict() for r in verify(method(experts, *coordinates)) if r.conflict]
    for dimension, value in zip(DIMENSIONS, coordinates, strict=True):
        measured = next(r for r in verify(method(experts, *coordinates)) if r.dimension == dimension).measured
        assert str(value) in measured
        assert len(measured) <= 2


def test_a_route_to_every_expert_is_no_routing() -> None:
    def everywhere(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
        index = blocks(k)
        return FastWeights((Bank(k, v, index, routes=torch.arange(index.shape[2]).expand(*q.shape[:3], -1)),))

    coordinates = (Scaling.NONE, Expert.MLP, Count.SHARED, Construction.IDENTITY, Topology.ALL_TO_ONE)
    assert not [r.as_dict() for r in verify(method(everywhere, *coordinates)) if r.conflict]


def test_what_cannot_be_measured_says_why() -> None:
    silent = replace(attnbench.get("softmax"), experts=None, no_experts="its experts are learned while it runs")
    rows = verify(silent)
    assert {(r.measured, r.conflict, r.why) for r in rows} == {((), False, "no fast weights: its experts are learned while it runs")}
    assert {r.as_dict()["verdict"] for r in rows} == {"not measurable"}


def _raises(*_: object) -> FastWeights:
    raise ValueError("of its own making\nand more")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"experts": None}, "neither experts nor no_experts: give experts(q, k, v, params), or say in no_experts why there are none"),
        ({"experts": _raises}, "ValueError: of its own making"),
        ({"experts": lambda *_: FastWeights((Bank(),))}, "ValueError: a bank needs w1 and w2, or index, keys and values"),
    ],
)
def test_what_cannot_be_measured_through_a_fault_says_which_and_fails(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], why: str
) -> None:
    monkeypatch.setitem(registry.registry().found, "softmax", replace(attnbench.get("softmax"), **changed))
    result = call("taxonomy", "--verify", "--scaling", "none", "--construction", "identity", "--format", "json")
    assert result.exit_code == 1
    rows = [row for row in json.loads(result.stdout) if row["method"] == "softmax"]
    assert [(row["verdict"], row["why"]) for row in rows] == [("failed", why)] * len(DIMENSIONS)
    assert f"softmax: {why}" in result.stderr


def test_a_number_of_experts_that_fits_nothing_says_so() -> None:
    def root(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
        index = blocks(k, int(k.shape[2] ** 0.5))
        return FastWeights((Bank(k, v, index, routes=torch.zeros(*q.shape[:3], 1, dtype=torch.long)),))

    row = next(r for r in verify(method(root, *attnbench.get("moba").coordinates.as_dict().values())) if r.dimension == "count")
    assert (row.measured, row.why) == ((), "E = 12 at N = 144, 24 at N = 576, neither constant nor in proportion to N")


def test_the_measuring_lengths_suit_every_method() -> None:
    assert all(n == int(n**0.5) ** 2 for n in LENGTHS), "grids need squares"


@pytest.mark.parametrize(
    ("dimension", "text", "member"),
    [
        ("scaling", "Routing", Scaling.ROUTING),
        ("scaling", "both", Scaling.BOTH),
        ("count", " N/n ", Count.BLOCKS),
        ("topology", "n-TO-m", Topology.N_TO_M),
    ],
)
def test_values_are_read_by_name_or_text(dimension: str, text: str, member: object) -> None:
    assert taxonomy.parse(dimension, text) is member


def test_unknown_values_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown scaling 'rout': choose from 'none', 'routing'"):
        taxonomy.parse("scaling", "rout")
    with pytest.raises(ValueError, match="unknown dimension 'size'"):
        taxonomy.parse("size", "big")


def test_selection_and_table() -> None:
    everything = [attnbench.get(name) for name in attnbench.methods()]
    routed = taxonomy.select(everything, scaling=Scaling.ROUTING)
    assert {"moba", "topk", "sliding_window"} <= {m.name for m in routed} <= {m.name for m in everything} - {"softmax", "mita"}
    rows = taxonomy.rows(everything)
    assert [r["scaling"] for r in rows] == sorted((r["scaling"] for r in rows), key=[str(s) for s in Scaling].index)
    assert set(rows[0]) == {"method", "name", *DIMENSIONS, "source"}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("softmax", Family.DENSE),
        ("linear", Family.LINEAR),
        ("agent", Family.COMPRESSED),
        ("topk", Family.PER_QUERY),
        ("moba", Family.MOE),
        ("mita", Family.COMPRESS_ROUTE),
    ],
)
def test_families(name: str, family: Family) -> None:
    assert attnbench.get(name).family is family
