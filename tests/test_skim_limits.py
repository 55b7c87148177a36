"""What Spark attention and DeepSeek sparse attention cost, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from skim_support import make
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UserError
from attnbench.method import Shape


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_costs_count_pairs_once(causal, kv_heads):
    shape, heads = Shape(2, 4, 37, 8, kv_heads=kv_heads, dim_v=5), 8
    pairs = 37 * 38 // 2 if causal else 37 * 37
    read = sum(min(6, i + 1) if causal else 6 for i in range(37))
    spark, dsa = attnbench.get("spark"), attnbench.get("dsa")
    found = spark.cost(shape, spark.parse({"topk": 6, "predictor": 3, "causal": causal}))
    assert found.flops == {"score": heads * pairs * 2 * 3, "select": heads * pairs * 3, "attend": heads * read * 2 * (8 + 5)}
    assert found.total("forward+backward") - found.total() == 5 * found.flops["attend"] // 2
    params = dsa.parse({"topk": 6, "index_heads": 3, "index_dim": 7, "causal": causal})
    found = dsa.cost(shape, params)
    assert found.flops["score"] == 2 * pairs * 2 * 3 * (7 + 1)
    assert found.flops["attend"] == heads * read * 2 * (8 + 5)
    assert found.total("forward+backward") - found.total() == 5 * found.flops["attend"] // 2
    learned = sum(x.numel() for x in dsa.initial(shape, params, torch.empty(0)).values())
    io = 2 * 37 * (4 * (8 + 5) + kv_heads * (8 + 5))
    assert found.elements == io + heads * read * (8 + 5) + learned + 2 * 37 * (3 * (7 + 1) + 7)
    assert found.index_bytes == 4 * 2 * 37 * 6


def test_what_torch_counts_of_a_whole_dsa_call_is_what_the_cost_says():
    method, qkv = attnbench.get("dsa"), make(37, 2)
    params = method.parse({"topk": 6, "index_heads": 3, "index_dim": 7})
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params)
    flops = method.cost(Shape.of(*qkv), params).flops
    weighting = 2 * 2 * 37 * 37 * 3  # the weighted sum over the indexer's heads, which is no matrix product
    assert counter.get_total_flops() == sum(flops.values()) - weighting


@pytest.mark.parametrize(
    ("name", "setting", "line"),
    [
        ("spark", {"topk": 41}, r"topk = 41 exceeds M \(keys\) = 40: lower topk"),
        ("spark", {"topk": 0}, "topk = 0 is below its least value 1"),
        ("spark", {"topk": 4, "predictor": 8}, "predictor = 8 leaves nothing of D = 8: lower predictor"),
        ("spark", {"topk": 4, "scale": "all"}, "unknown value of spark.scale 'all'"),
        ("dsa", {}, r"topk = 2048 exceeds M \(keys\) = 40: lower topk"),
        ("dsa", {"topk": 4, "index_heads": 0}, "index_heads = 0 is below its least value 1"),
        ("dsa", {"topk": 4, "index_dim": 0}, "index_dim = 0 is below its least value 1"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(name, setting, line):
    with pytest.raises(UserError, match=line) as raised:
        attnbench.get(name)(*make(40), **setting)
    assert "\n" not in str(raised.value)


def test_a_head_of_one_dimension_cannot_be_split():
    with pytest.raises(UserError, match="D = 1 cannot be split in two"):
        attnbench.get("spark")(*make(40, dim=1), topk=4)
