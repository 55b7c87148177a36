"""A softmax attention that is not: implementations that are wrong, greedy, slow, broken or deadly, to test how a sweep survives them."""

import os
import time

import torch

from attnbench.eager import attend, expand_heads, take
from attnbench.method import Citation, Cost, Implementation, Method, Params
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology


def reference(q, k, v, params, rows=None):
    k, v = expand_heads(q, k, v)
    return attend(take(q, rows), k, v, q.shape[-1] ** -0.5)


def biased(q, k, v, params):
    return reference(q, k, v, params) + 0.01


def unwritten(q, k, v, params):
    out = reference(q, k, v, params)
    out[:, :, -1] = float("nan")
    return out


def narrow(q, k, v, params):
    return reference(q, k, v, params)[..., :-1]


def greedy(q, k, v, params):
    if q.shape[2] >= 64:
        torch.empty(1 << 46, dtype=torch.uint8)
    return reference(q, k, v, params)


def hangs(q, k, v, params):
    if q.shape[2] >= 64:
        time.sleep(600)
    return reference(q, k, v, params)


def raises(q, k, v, params):
    raise RuntimeError("a kernel that cannot\nsecond line")


def dies(q, k, v, params):
    os._exit(7)


def cost(shape, params):
    return Cost.of(shape, {"score": shape.batch * shape.heads * shape.n * shape.keys})


NAMES = ("biased", "unwritten", "narrow", "greedy", "hangs", "raises", "dies")
METHOD = Method(
    name="wrong",
    title="Wrong",
    coordinates=Coordinates(Scaling.NONE, Expert.MLP, Count.SHARED, Construction.IDENTITY, Topology.ALL_TO_ONE),
    citation=Citation("Nobody", 2026, "How Not To", "https://example.org"),
    params=Params,
    reference=reference,
    no_experts="made for tests",
    cost=cost,
    implementations=(
        *(Implementation(name, f"{__name__}:{name}") for name in NAMES),
        Implementation("fallback", f"{__name__}:reference", operators=("aten::_scaled_dot_product_flash_attention_for_cpu",)),
        Implementation("absent", f"{__name__}:reference", requires=("a_package_nobody_has",)),
    ),
)
