"""The contract that every registered method keeps, whatever it computes. Methods are reached through the registry alone."""

from __future__ import annotations

import inspect

import pytest
import torch

import attnbench
from attnbench import fastweights
from attnbench.inputs import draw
from attnbench.method import EAGER, Method, Params, Shape
from attnbench.taxonomy import DIMENSIONS

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
    params = method.parse({"causal": causal}).fitted(shape)
    if reasons := method.limits.reasons(shape, torch.float64, "cpu", params) + params.problems(shape):
        pytest.skip("; ".join(reasons))
    return params


def stirred(method: Method, shape: Shape, params: Params, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Learned parameters moved off their initial values, where zeros and symmetries would hide mistakes."""
    g = torch.Generator().manual_seed(7)
    drawn = method.initial(shape, params, torch.empty(0, dtype=torch.float64))
    return {name: (x + 0.1 * torch.randn(x.shape, generator=g, dtype=x.dtype)).to(dtype) for name, x in drawn.items()}


def options(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": weights} if weights else {}


def doubles(shape: Shape, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw("randn", shape, seed, torch.float64, "cpu")


@pytest.fixture(params=attnbench.methods())
def method(request: pytest.FixtureRequest) -> Method:
    return attnbench.get(request.param)


def test_exports_are_complete(method: Method) -> None:
    assert method.title
    assert method.citation.url.startswith("https://")
    assert all(isinstance(getattr(method.coordinates, name), kind) for name, kind in DIMENSIONS.items())
    assert (method.experts is None) == bool(method.no_experts), "either experts, or why there are none"
    names = [i.name for i in method.implementations]
    assert len(set(names)) == len(names)
    assert EAGER not in names
    assert inspect.getdoc(inspect.getmodule(method.reference)), "a method's module says what it is"
    for name, field in method.params.__dataclass_fields__.items():
        assert field.metadata.get("doc"), f"parameter {name} has no description"


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", ODD, ids=ids)
def test_reference_is_finite_and_shaped(method: Method, shape: Shape, causal: bool) -> None:
    params = settled(method, shape, causal)
    out = method.reference(*doubles(shape), params)
    assert out.shape == (shape.batch, shape.heads, shape.n, shape.dim_v)
    assert out.dtype == torch.float64
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", ODD, ids=ids)
def test_fast_weights_equal_the_reference(method: Method, shape: Shape, causal: bool) -> None:
    if method.experts is None:
        pytest.skip(method.no_experts)
    params = settled(method, shape, causal)
    q, k, v = doubles(shape)
    for own in ({}, options(stirred(method, shape, params))):
        want = method.reference(q, k, v, params, **own)
        got = fastweights.apply(method.experts(q, k, v, params, **own), q)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", CAUSAL)
def test_rows_are_rows_of_the_whole(method: Method, causal: bool) -> None:
    if not method.takes_rows:
        pytest.skip("the reference cannot be sampled")
    shape = Shape(2, 2, 63, 8)
    params = settled(method, shape, causal)
    rows = torch.tensor([0, 3, 17, 62])
    q, k, v = doubles(shape)
    whole = method.reference(q, k, v, params)
    torch.testing.assert_close(method.reference(q, k, v, params, rows=rows), whole[:, :, rows])


def test_a_batch_element_does_not_see_the_others(method: Method) -> None:
    shape = Shape(3, 2, 40, 8)
    params = settled(method, shape, False)
    q, k, v = doubles(shape)
    whole = method.reference(q, k, v, params)
    torch.testing.assert_close(method.reference(q[1:2], k[1:2], v[1:2], params), whole[1:2], rtol=1e-9, atol=1e-11)


def test_heads_are_coupled_only_where_declared(method: Method) -> None:
    shape = Shape(1, 3, 400, 8)  # long enough that regions are left out
    params = settled(method, shape, False)
    q, k, v = doubles(shape)
    own = options(stirred(method, shape, params))
    before = method.reference(q, k, v, params, **own)
    for x in (q, k, v):
        x[:, 1] += torch.randn(x[:, 1].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    after = method.reference(q, k, v, params, **own)
    assert torch.allclose(after[:, [0, 2]], before[:, [0, 2]], rtol=1e-9, atol=1e-11) != method.couples_heads
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_causal_form_ignores_the_future(method: Method) -> None:
    shape = Shape(1, 2, 80, 8)
    params = settled(method, shape, True)
    q, k, v = doubles(shape)
    before = method.reference(q, k, v, params)
    for x in (q, k, v):
        x[:, :, 50:] += 1.0
    after = method.reference(q, k, v, params)
    torch.testing.assert_close(after[:, :, :50], before[:, :, :50], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(after[:, :, 50:], before[:, :, 50:])


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


@pytest.mark.parametrize("shape", [Shape(1, 2, 48, 8), Shape(1, 4, 129, 16, kv_heads=2)], ids=ids)
def test_exact_methods_are_softmax_attention(method: Method, shape: Shape) -> None:
    if not method.exact:
        pytest.skip("an approximation")
    q, k, v = doubles(shape)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(method.reference(q, k, v, method.params()), want)


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
