"""The indexer of `dsa` against DeepSeek's own class, with the same weights, on the CPU.

Their code is not part of this project: `ATTNBENCH_PEER_DSA` names a checkout of https://github.com/deepseek-ai/DeepSeek-V3.2-Exp (read
at commit 3b99a53). It needs `einops`. Their kernels are for GPUs and 8-bit numbers: stand-ins that round nothing take their place, and a
random rotation that of the Hadamard transform, since any orthogonal one leaves all products alone. Positions are not rotated.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench.method import Shape

CHECKOUT = os.environ.get("ATTNBENCH_PEER_DSA", "")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not CHECKOUT, reason="ATTNBENCH_PEER_DSA names no checkout of github.com/deepseek-ai/DeepSeek-V3.2-Exp"),
]
BATCH, HEADS, N, DIM, INDEX_HEADS, INDEX_DIM = 2, 3, 70, 8, 5, 32


def quantised(x: Tensor, _block: int, _format: object) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x[..., :1])


def index(q: Tensor, weights: Tensor, k: Tensor, k_scale: Tensor) -> Tensor:
    """As their docstring has it: products, ReLU, weights, sum over heads, scale of the key."""
    return ((q @ k.unsqueeze(1).mT).relu() * weights).sum(2) * k_scale.squeeze(-1).unsqueeze(1)


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their module `model`."""
    pytest.importorskip("einops", reason="the authors' module imports einops")
    kernel: Any = ModuleType("kernel")
    kernel.act_quant, kernel.fp8_index, kernel.fp8_gemm = quantised, index, None
    monkeypatch.setitem(sys.modules, "kernel", kernel)
    spec = importlib.util.spec_from_file_location("dsa_authors", Path(CHECKOUT) / "inference" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dsa_authors", module)
    spec.loader.exec_module(module)
    turn = torch.linalg.qr(torch.randn(INDEX_DIM, INDEX_DIM)).Q
    monkeypatch.setattr(module, "rotate_activation", lambda x: x @ turn)
    monkeypatch.setattr(module.dist, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr(module.Linear, "dtype", torch.float32)
    return module


def their_indexer(authors: Any, w: dict[str, Tensor], topk: int) -> Any:
    """Their class with our weights; its input is the q and the k of a token side by side, of which keys read k and gates q."""
    c = HEADS * DIM
    arguments = SimpleNamespace(
        dim=2 * c, index_n_heads=INDEX_HEADS, index_head_dim=INDEX_DIM, qk_rope_head_dim=8, index_topk=topk, q_lora_rank=c,
        scale_fmt=None, max_batch_size=BATCH, max_seq_len=N,
    )  # fmt: skip
    indexer = authors.Indexer(arguments)
    indexer.k_cache, indexer.k_scale_cache = torch.zeros(BATCH, N, INDEX_DIM), torch.zeros(BATCH, N, 1)
    zero = torch.zeros
    with torch.no_grad():
        indexer.wq_b.weight.copy_(w["query"].T)
        indexer.wk.weight.copy_(torch.cat([zero(c, INDEX_DIM), w["key"]]).T)
        indexer.weights_proj.weight.copy_(torch.cat([w["gate"], zero(c, INDEX_HEADS)]).T)
        indexer.k_norm.weight.copy_(w["norm_weight"])
        indexer.k_norm.bias.copy_(w["norm_bias"])
    return indexer


@pytest.mark.parametrize("causal", [False, True])
def test_the_indexer_chooses_what_theirs_does(authors: Any, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, N, DIM) for _ in range(3))
    method, topk = attnbench.get("dsa"), 12
    params = method.parse({"topk": topk, "index_heads": INDEX_HEADS, "index_dim": INDEX_DIM, "causal": causal})
    w = {name: x + 0.2 * torch.randn_like(x) for name, x in method.initial(Shape.of(q, k, v), params, q).items()}
    scores: list[Tensor] = []
    monkeypatch.setattr(authors, "fp8_index", lambda *x: scores.append(index(*x)) or scores[-1].clone())
    x, y = (t.transpose(1, 2).flatten(2) for t in (q, k))
    mask = torch.full((N, N), float("-inf")).triu_(1) if causal else None
    theirs = their_indexer(authors, w, topk)(torch.cat([x, y], -1), x, 0, torch.ones(N, 4, dtype=torch.complex64), mask)
    from attnbench.methods.dsa import index_keys, index_queries, index_scores

    own = index_scores(*index_queries(q, params, w), index_keys(k, params, w))
    print("max error of index scores", float((own[:, 0] - scores[0]).detach().abs().max() / scores[0].detach().abs().max()))
    torch.testing.assert_close(own[:, 0], scores[0], rtol=1e-4, atol=1e-5)
    ours = method.experts(q, k, v, params, weights=w).banks[0].index
    assert ours is not None
    for b in range(BATCH):
        for i in range(N):
            seen = set(range(i + 1 if causal else N))
            assert set(ours[b, 0, i].tolist()) - {-1} == set(theirs[b, i].tolist()) & seen
