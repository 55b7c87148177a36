"""What the task `health` holds while it measures: counted on tensors without data, at the lengths that suites ask for."""

from __future__ import annotations

import importlib
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnbench import inputs, registry, suite_file
from attnbench.fastweights import occurrences
from attnbench.method import Shape
from attnbench.tasks import TASKS

if TYPE_CHECKING:
    from attnbench.method import Method, Params

GIB = 1 << 30
CASES = {(c.method, c.params): c for c in suite_file.load("routing").expand() if c.n == 65536 and c.replicate == 0}
SMALL = {
    "mita": {"landmarks": 8, "topk": 16},
    "moba": {"block": 64, "topk": 2},
    "nsa": {"window": 32, "topk": 4, "block": 64},
    "bra": {"region": 64, "topk": 2},
    "topk": {"topk": 16},
    "spark": {"topk": 16},
    "dsa": {"topk": 16},
    "softmax": {},
}


class Held(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were at once. Where a number is read back, it is `answer`."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer, self.now, self.peak = answer, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return float(self.answer) if args[0].dtype.is_floating_point else self.answer
        out = operator(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._known:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def held(method: Method, params: Params, shape: Shape, dtype: torch.dtype, answer: int) -> int:
    """Peak of the task beyond inputs and learned parameters, were the widest of lists that depend on data `answer` wide."""
    qkv = inputs_without_data(shape, dtype)
    weights = {name: x.to("meta", dtype) for name, x in method.initial(shape, params, torch.empty(0, dtype=dtype), 0).items()}
    with Held(answer) as mode:
        TASKS["health"](method, params, qkv, weights)
    return mode.peak


def inputs_without_data(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v on the meta device."""
    q = torch.empty(shape.batch, shape.heads, shape.n, shape.dim, dtype=dtype, device="meta")
    k, v = (torch.empty(shape.batch, shape.kv_heads, shape.keys, d, dtype=dtype, device="meta") for d in (shape.dim, shape.dim_v))
    return q, k, v


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.label)
def test_health_of_the_longest_sequences_fits_16_gib(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks four times as large as a GPU's, so that there are few of them; Spark's widest list has 2048 keys on these inputs."""
    monkeypatch.setitem(_budget(), "meta", 4 * GIB)
    method, params = case.resolve()
    assert held(method, params, case.shape, getattr(torch, case.dtype), 2048) < 16 * GIB


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_health_holds_at_most_in_proportion_to_length(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = registry.get(name)
    if causal and method.limits.no_causal:
        pytest.skip(method.limits.no_causal)
    monkeypatch.setitem(_budget(), "meta", 4 << 20)
    monkeypatch.setattr("attnbench.fastweights._CHUNK_ELEMENTS", 1 << 16)
    params = method.parse(SMALL[name] | ({"causal": True} if causal else {}))
    sizes = [held(method, params, Shape(1, 2, n, 16), torch.bfloat16, 32) for n in (1024, 2048, 4096)]
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[2] <= 2 * sizes[1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["moba", "nsa", "topk", "spark", "dsa"])
def test_health_in_chunks_is_health_of_the_whole(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = registry.get(name)
    params = method.parse(SMALL[name] | {"causal": causal})
    qkv = inputs.draw("skewed", Shape(2, 4, 300, 16, 2), 0, torch.float64, "cpu")
    own = method.initial(Shape.of(*qkv), params, qkv[0], 0)
    whole = TASKS["health"](method, params, qkv, own)
    monkeypatch.setitem(_budget(), "cpu", 1 << 19)
    assert TASKS["health"](method, params, qkv, own) == whole
    assert len(whole) == 5


@pytest.mark.parametrize("elements", [1, 50, 1 << 24])
def test_occurrences_are_what_counting_gives_however_ids_are_shared(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.fastweights._CHUNK_ELEMENTS", elements)
    ids = torch.randint(-1, 7, (2, 3, 11, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for one in (ids, ids[:1].expand(2, -1, -1, -1), ids[:, :1].expand(-1, 3, -1, -1), ids[0, 0].expand(2, 3, -1, -1), ids.transpose(2, 3)):
        want = torch.stack([torch.stack([(one == i).flatten(2).sum(-1)]) for i in range(7)], -1)[0]
        assert torch.equal(occurrences(one, 7), want)
    assert not occurrences(ids[:, :, :0], 7).any()


def _budget() -> dict[str, int]:
    """Bytes of a chunk, by device."""
    found: dict[str, int] = importlib.import_module("attnbench.methods._chunks")._BUDGET_BYTES
    return found
