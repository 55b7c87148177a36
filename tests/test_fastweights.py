"""The generic oracle against hand-made experts, and what is measured from them."""

from __future__ import annotations

import torch

from attnbench.fastweights import Bank, FastWeights, apply, kept, load, recall, width_per_query


def _tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    return q, k, v


def _routed(k: torch.Tensor, v: torch.Tensor) -> Bank:
    """Experts {0, 1}, {2} and {3, 4}; queries 0-1 use the first, 2-3 the second, 4 the first and third, 5 none."""
    index = torch.tensor([[0, 1], [2, -1], [3, 4]]).view(1, 1, 3, 2)
    routes = torch.tensor([[0, -1], [0, -1], [1, -1], [1, -1], [0, 2], [-1, -1]]).view(1, 1, 6, 2)
    return Bank(k, v, index, routes=routes, scale=0.5)


def test_a_query_mixes_the_tokens_of_its_experts_in_one_softmax() -> None:
    q, k, v = _tokens()
    out = apply(FastWeights((_routed(k, v),)), q)
    for row, tokens in {0: [0, 1], 2: [2], 4: [0, 1, 3, 4]}.items():
        weights = (0.5 * k[0, 0, tokens] @ q[0, 0, row]).softmax(0)
        torch.testing.assert_close(out[0, 0, row], weights @ v[0, 0, tokens])
    assert not out[0, 0, 5].any()


def test_a_shared_compressed_bank_joins_the_same_softmax() -> None:
    q, k, v = _tokens()
    shared = Bank(w1=k[:, :, None, :2].neg(), w2=v[:, :, None, :2].neg(), scale=2.0)
    out = apply(FastWeights((shared, _routed(k, v))), q)
    logits = torch.cat([-2.0 * k[0, 0, :2] @ q[0, 0, 2], 0.5 * k[0, 0, 2:3] @ q[0, 0, 2]])
    torch.testing.assert_close(out[0, 0, 2], logits.softmax(0) @ torch.cat([-v[0, 0, :2], v[0, 0, 2:3]]))


def test_gated_banks_are_normalised_apart() -> None:
    q, k, v = _tokens()
    bank = _routed(k, v)
    gates = (torch.full((1, 1, 6), 2.0, dtype=torch.float64), torch.full((1, 1, 6), 3.0, dtype=torch.float64))
    both = apply(FastWeights((bank, bank), "gated", gates), q)
    torch.testing.assert_close(both, 5.0 * apply(FastWeights((bank,)), q))


def test_linear_hidden_units_are_divided_by_their_sum() -> None:
    q, k, v = (x.abs() for x in _tokens())
    index = torch.arange(6).view(1, 1, 1, 6)
    out = apply(FastWeights((Bank(k, v, index, activation="linear", causal=True),), "linear", eps=0.1), q)
    weights = (q @ k.mT).tril()
    torch.testing.assert_close(out, weights @ v / (weights.sum(-1, keepdim=True) + 0.1))


def test_what_is_no_expert_is_added_beside_them() -> None:
    q, k, v = _tokens()
    rows, banks = torch.tensor([4, 0]), (_routed(k, v),)
    out = apply(FastWeights(banks, beside=lambda at: v.roll(1, 2)[:, :, at]), q, rows)
    torch.testing.assert_close(out, apply(FastWeights(banks), q, rows) + v[:, :, [3, 5]])


def test_health_of_a_routing() -> None:
    q, k, v = _tokens()
    weights = FastWeights((_routed(k, v),))
    assert load(weights.banks[0]).tolist() == [[[3, 2, 1]]]
    assert kept(weights, 6).tolist() == [[[True, True, True, True, True, False]]]
    assert width_per_query(weights) == (2 + 2 + 1 + 1 + 4 + 0) / 6
    mass, top = recall(weights, q, k)
    full = (q @ k.mT * 4**-0.5).softmax(-1)
    torch.testing.assert_close(mass[0, 0, 4], full[0, 0, 4, [0, 1, 3, 4]].sum())
    assert top[0, 0, 2] == (full[0, 0, 2].argmax() == 2)
    assert mass[0, 0, 5] == 0


def test_rows_and_chunks_do_not_change_the_result(monkeypatch) -> None:
    q, k, v = _tokens()
    weights = FastWeights((_routed(k, v),))
    whole = apply(weights, q)
    monkeypatch.setattr("attnbench.fastweights._CHUNK_ELEMENTS", 1)
    assert torch.equal(apply(weights, q), whole)
    assert torch.equal(apply(weights, q, torch.tensor([4, 1])), whole[:, :, [4, 1]])
