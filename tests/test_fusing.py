"""Models compiled between their operators: the same numbers, the operators called as before, nothing compiled twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training_support import N, model

from attnbench.nn import fusing

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMS: list[dict[str, Any]] = [
    {"per_token": True, "short_conv": 3},
    {"positions": "rotary", "grid": (4, 4), "class_token": True, "qkv_bias": True},
    {"positions": "rotary"},
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Graphs that are handed to the compiler, which takes them apart and writes no kernels."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(fusing.torch, "compile", lambda work, **options: compile_(work, backend=counter, **options))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["softmax", "mita"])
@pytest.mark.parametrize("form", FORMS)
def test_a_fused_model_computes_what_it_computed_before(counted, method: str, form: dict[str, Any], autocast: bool) -> None:
    plain, fused = model(method, **form), model(method, **form)
    fusing.fuse(fused)
    inputs = torch.randint(32, (3, N))
    positions = torch.arange(5) if form.get("per_token") else None
    mask = None if positions is not None else torch.arange(N)[None] < torch.tensor([[N], [9], [3]])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [own(inputs, positions, mask) for own in (plain, fused)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for (name, mine), theirs in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, msg=name)
    assert counted.frame_count == 4, "begin, before and after the operator, end: blocks share theirs"


def test_models_of_the_same_sizes_share_what_was_compiled(counted) -> None:
    inputs = torch.randint(32, (3, N))
    graphs = []
    for method in ("softmax", "mita", "softmax", "agent"):
        own = model(method)
        fusing.fuse(own)
        own(inputs)
        graphs.append(counted.frame_count)
    assert graphs == [4, 5, 5, 5], "once more for an operator that lays out its output in another way"
    own(inputs[:2])
    assert counted.frame_count == 9, "another batch size is compiled for"


def test_operators_are_called_as_before_and_weights_keep_their_names(counted) -> None:
    own = model("mita")
    names, seen = list(own.state_dict()), []
    fusing.fuse(own)
    for operator in own.operators:
        operator.register_forward_pre_hook(lambda _, arguments: seen.append([x.shape for x in arguments]))
    own(torch.randint(32, (3, N)))
    assert seen == [[(3, 2, N, 8)] * 3] * 2
    assert list(own.state_dict()) == names
