"""The contract that every registered method keeps, whatever it computes. Methods are reached through the registry alone."""

from __future__ import annotations

import pytest
import torch

import attnbench
from attnbench import contract, promises
from attnbench.method import Method, Params, Shape
from attnbench.promises import Outcome, doubles, options, stirred

ODD = [
    Shape(1, 1, 1, 8),
    Shape(2, 2, 63, 8),
    Shape(1, 4, 100, 16, kv_heads=2),
    Shape(1, 2, 257, 8),
    Shape(1, 2, 65, 8, dim_v=12),
]
CAUSAL = [False, True]


def ids(shape: Shape) -> str:
    return f"B{shape.batch}H{shape.heads}kv{shape.kv_heads}N{shape.n}D{shape.dim}v{shape.dim_v}"


def settled(method: Method, shape: Shape, causal: bool) -> Params:
    """Parameters fitted to the shape; skips, with the method's own reason, what it does not support."""
    params, reasons = promises.settled(method, shape, causal=causal)
    if reasons:
        pytest.skip("; ".join(reasons))
    return params


def kept(outcome: Outcome) -> None:
    if outcome.verdict == "unsupported":
        pytest.skip(outcome.what)
    assert outcome.verdict == "passed", outcome


@pytest.fixture(params=attnbench.methods())
def method(request: pytest.FixtureRequest) -> Method:
    return attnbench.get(request.param)


def test_every_method_keeps_the_contract_that_check_asks(method: Method) -> None:
    found = [part.run("cpu") for part in contract.parts(method)]
    assert {f.mode.removeprefix("causal ") for f in found} == set(contract.PARTS)
    assert not [f for f in found if f.verdict == "failed"]
    assert {f.mode for f in found if f.verdict == "passed"} >= {"declaration", "reference", "heads", "cost"}


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", ODD, ids=ids)
def test_reference_is_finite_and_shaped(method: Method, shape: Shape, causal: bool) -> None:
    kept(promises.reference(method, shape, settled(method, shape, causal)))


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", ODD, ids=ids)
def test_fast_weights_equal_the_reference(method: Method, shape: Shape, causal: bool) -> None:
    kept(promises.experts(method, shape, settled(method, shape, causal)))


def test_gradients_of_the_reference(method: Method) -> None:
    if method.surrogate:
        pytest.skip(method.surrogate)
    shape = Shape(1, 1, 7, 4)
    params = settled(method, shape, False)
    weights = stirred(method, shape, params)
    leaves = [x.requires_grad_() for x in (*doubles(shape, seed=3), *weights.values())]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        return method.reference(q, k, v, params, **options(dict(zip(weights, own, strict=True))))

    assert torch.autograd.gradcheck(run, leaves, eps=1e-7, atol=1e-5)


IMPLEMENTATIONS = [f"{name}@{i.name}" for name in attnbench.methods() for i in attnbench.get(name).implementations]


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", ODD, ids=ids)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_agree_with_gradients(name: str, shape: Shape, causal: bool) -> None:
    method = attnbench.get(name)
    implementation = method.implementation(method.pinned)
    params = settled(method, shape, causal)
    for dtype in (torch.float64, torch.float32):
        if not (reasons := method.reasons(implementation, shape, dtype, "cpu", params, backward=True)):
            break
    else:
        pytest.skip("; ".join(reasons))
    weights = stirred(method, shape, params, dtype)
    leaves = [x.to(dtype).requires_grad_() for x in (*doubles(shape), *weights.values())]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    own, exactly = (dict(zip(weights, x[3:], strict=True)) for x in (leaves, exact))
    got = method.run(implementation, *leaves[:3], params, weights=own or None)
    want = method.reference(*exact[:3], params, **options(exactly))
    gradient = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tolerance = 1e-9 if dtype is torch.float64 else 2e-4
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, gradient.to(dtype), allow_unused=True),
        torch.autograd.grad(want, exact, gradient, allow_unused=True),
        strict=True,
    ):
        if mine is None or theirs is None:
            assert mine is theirs or float((theirs if mine is None else mine).abs().max()) == 0.0
            continue
        torch.testing.assert_close(mine.double(), theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_costs_are_whole_positive_and_grow(method: Method, mode: str) -> None:
    params = method.params()
    small, large = (method.cost(Shape(1, 2, n, 16), params.fitted(Shape(1, 2, n, 16))) for n in (512, 1024))
    assert all(isinstance(f, int) and f >= 0 for f in small.flops.values())
    assert 0 < small.total(mode) < large.total(mode)
    assert 0 < small.bytes(2, mode) < large.bytes(2, mode)


def test_modules_own_the_learned_parameters(method: Method) -> None:
    shape = Shape(2, 2, 64, 8)
    params = settled(method, shape, False)
    q, k, v = (x.float() for x in doubles(shape))
    torch.manual_seed(0)
    module = method.build(shape, **params.as_dict())
    if method.weights is None or method.builder is not None:
        if not method.library:
            assert module(q, k, v).shape == q.shape
        return
    drawn = method.initial(shape, params, q)
    assert {name: x.shape for name, x in module.weights.items()} == {name: x.shape for name, x in drawn.items()}
    if not drawn:  # a learned extra that these parameters leave out
        assert module(q, k, v).shape == q.shape
        return
    module(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in module.weights.values())
    torch.manual_seed(1)
    again = method.build(shape, **params.as_dict())
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(q, k, v), module(q, k, v))


def test_calls_reject_what_makes_no_sense(method: Method) -> None:
    from attnbench.errors import UserError

    q, k, v = doubles(Shape(1, 2, 16, 8))
    with pytest.raises(UserError, match="unknown parameter 'colour'"):
        method(q, k, v, colour=1)
    with pytest.raises(UserError, match="do not fit"):
        method(q, k[:, :, :, :4], v)
