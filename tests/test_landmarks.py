import math

import pytest
import torch
from attnbench.methods._landmarks import LandmarkParams, bins, landmarks, pool, pool_flops
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.errors import UserError
from attnbench.fastweights import apply
from attnbench.method import Shape


@pytest.mark.parametrize(("n", "count"), [(14, 5), (14, 7), (32, 7), (17, 17), (100, 1), (9, 8), (3, 5)])
def test_bins_are_those_of_torch(n: int, count: int) -> None:
    x = torch.randn(2, 3, n, 4, dtype=torch.float64)
    want = adaptive_avg_pool1d(x.transpose(2, 3).flatten(0, 1), count).unflatten(0, (2, 3)).transpose(2, 3)
    torch.testing.assert_close(pool(x, count, 2), want)
    by_hand = torch.stack([x[:, :, a:b].mean(2) for a, b in bins(n, count)], 2)
    torch.testing.assert_close(by_hand, want)


@pytest.mark.parametrize(("grid", "height", "width", "side"), [("square", 14, 14, 5), ("6x9", 6, 9, 4), ("8x8", 8, 8, 2)])
def test_grid_is_pooled_as_torch_pools_it_and_leaves_the_prefix_out(grid: str, height: int, width: int, side: int) -> None:
    q = torch.randn(1, 2, 3 + height * width, 4, dtype=torch.float64)
    maps = q[:, :, 3:].transpose(2, 3).reshape(1, 8, height, width)
    want = adaptive_avg_pool2d(maps, side).view(1, 2, 4, side * side).transpose(2, 3)
    torch.testing.assert_close(landmarks(q, LandmarkParams(landmarks=side**2, grid=grid, prefix=3)), want)


def test_legacy_shift_starts_the_grid_at_the_class_token() -> None:
    q = torch.randn(1, 1, 17, 2, dtype=torch.float64)
    got = landmarks(q, LandmarkParams(landmarks=4, grid="square", prefix=1, legacy_cls_shift=True))
    torch.testing.assert_close(got[0, 0, 0], q[0, 0, [0, 1, 4, 5]].mean(0))
    torch.testing.assert_close(got[0, 0, 3], q[0, 0, [10, 11, 14, 15]].mean(0))


def test_sums_are_wide_and_results_keep_the_dtype() -> None:
    q = (torch.randn(1, 1, 4097, 8) + 3).bfloat16()
    got = landmarks(q, LandmarkParams(landmarks=5))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, landmarks(q.double(), LandmarkParams(landmarks=5)).bfloat16())


def test_pooling_is_differentiable() -> None:
    q = torch.randn(1, 1, 11, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: landmarks(x, LandmarkParams(landmarks=4)), (q,))


@pytest.mark.parametrize(
    ("values", "n", "words"),
    [
        ({"landmarks": 9, "grid": "square"}, 15, "square number"),
        ({"landmarks": 9, "grid": "4x5"}, 16, "4 x 5 = 20"),
        ({"landmarks": 8, "grid": "square"}, 16, "landmarks = 8 is not a square"),
        ({"landmarks": 4, "grid": "hexagons"}, 16, "none, square or HxW"),
        ({"landmarks": 17}, 16, "exceeds N"),
        ({"landmarks": 16, "prefix": 1}, 16, "15 tokens after the prefix"),
        ({"landmarks": 4, "prefix": 16}, 16, "leaves none"),
        ({"landmarks": 4, "legacy_cls_shift": True}, 16, "shifts a grid"),
        ({"landmarks": 0}, 16, "least value"),
    ],
)
def test_values_that_do_not_fit_are_named(values: dict[str, object], n: int, words: str) -> None:
    problems = LandmarkParams.parse(values).problems(Shape(1, 1, n, 8))
    assert len(problems) == 1
    assert words in problems[0]
    assert "\n" not in problems[0]


@pytest.mark.parametrize("values", [{}, {"prefix": 3}, {"grid": "square", "prefix": 1}])
@pytest.mark.parametrize("n", [5, 10, 17])
def test_fitted_values_fit(values: dict[str, object], n: int) -> None:
    fitted = LandmarkParams.parse(values).fitted(Shape(1, 1, n, 8))
    assert fitted.problems(Shape(1, 1, n, 8)) == []


def test_additions_are_counted_by_bin() -> None:
    shape = Shape(2, 3, 15, 4)
    assert pool_flops(shape, LandmarkParams(landmarks=4, prefix=1)) == 2 * 3 * 4 * sum(b - a for a, b in bins(14, 4))
    assert pool_flops(Shape(1, 1, 16, 1), LandmarkParams(landmarks=4, grid="square")) == 4 * 4 + 2 * 4


def tensors(n: int, heads: int = 2, dim: int = 8, dim_v: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(2, heads, n, w, generator=generator, dtype=torch.float64).requires_grad_() for w in (dim, dim, dim_v)]


def segment_means(x: torch.Tensor, count: int) -> torch.Tensor:
    n = x.shape[2]
    return torch.stack([x[:, :, i * n // count : math.ceil((i + 1) * n / count)].mean(2) for i in range(count)], 2)


def rows_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]), -1)


def agent_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    agents = segment_means(q, 5)
    return rows_of(q, agents) @ rows_of(agents, k) @ v


def nystrom_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    a, b = segment_means(q, 5), segment_means(k, 5)
    matrices = rows_of(a, b)
    inverses = []
    for x in matrices.flatten(0, 1):
        z, eye = x.T / (x.abs().sum(0).max() * x.abs().sum(1).max()), torch.eye(5, dtype=x.dtype)
        for _ in range(6):
            z = 0.25 * z @ (13 * eye - x @ z @ (15 * eye - x @ z @ (7 * eye - x @ z)))
        inverses.append(z)
    return rows_of(q, b) @ torch.stack(inverses).view_as(matrices) @ rows_of(a, k) @ v


BY_HAND = {"agent": agent_by_hand, "nystromformer": nystrom_by_hand}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("n", [5, 20, 23])
def test_output_and_gradients_are_those_of_the_formulas(name: str, implementation: str, n: int) -> None:
    q, k, v = tensors(n)
    got, want = attnbench.get(f"{name}@{implementation}")(q, k, v, landmarks=5), BY_HAND[name](q, k, v)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(v)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BY_HAND)
def test_fast_weights_rows_and_fewer_key_heads_agree(name: str) -> None:
    (q, _, _), (_, k, v) = tensors(21, heads=4), tensors(21)
    method = attnbench.get(name)
    params = method.parse({"landmarks": 5})
    want = BY_HAND[name](q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    assert method.experts is not None
    torch.testing.assert_close(apply(method.experts(q, k, v, params), q), want)
    rows = torch.tensor([20, 3])
    torch.testing.assert_close(method.reference(q, k, v, params, rows), want[:, :, rows])
    torch.testing.assert_close(attnbench.get(f"{name}@sdpa")(q, k, v, landmarks=5), want)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("n", [20, 23])
def test_cost_counts_the_products_of_the_definition(name: str, n: int) -> None:
    q, k, v = (x.detach() for x in tensors(n))
    method = attnbench.get(name)
    params = method.parse({"landmarks": 5})
    with FlopCounterMode(display=False) as counter:
        method.reference(q, k, v, params)
    cost = method.cost(Shape.of(q, k, v), params)
    assert cost.total() - cost.flops["pool"] == counter.get_total_flops()


@pytest.mark.parametrize("values", [{"inverse": "exact"}, {"iterations": 40}])
def test_nystrom_with_every_token_a_landmark_is_softmax_attention(values: dict[str, object]) -> None:
    q, k, v = tensors(12)
    got = attnbench.get("nystromformer")(3 * q, 3 * k, v, landmarks=12, **values)
    torch.testing.assert_close(got, rows_of(3 * q, 3 * k) @ v, rtol=1e-6, atol=1e-6)


def test_nystrom_output_does_not_depend_on_batch_mates() -> None:
    q, k, v = tensors(20)
    method = attnbench.get("nystromformer")
    alone = method(q[:1], k[:1], v[:1], landmarks=5)
    torch.testing.assert_close(method(q, 10 * k, v, landmarks=5)[:1], method(q[:1], 10 * k[:1], v[:1], landmarks=5))
    torch.testing.assert_close(method(q, k, v, landmarks=5)[:1], alone)


def test_nystrom_module_adds_a_convolution_along_the_sequence() -> None:
    q, k, v = tensors(20)
    method = attnbench.get("nystromformer")
    module = method.build(Shape.of(q, k, v), landmarks=5, conv=3).double()
    kernel = next(module.parameters())
    assert kernel.shape == (2, 1, 3, 1)
    out = module(q, k, v)
    padded = torch.nn.functional.pad(v, (0, 0, 1, 1))
    local = sum(kernel[:, 0, t, 0].view(1, 2, 1, 1) * padded[:, :, t : t + 20] for t in range(3))
    torch.testing.assert_close(out, method(q, k, v, landmarks=5) + local)
    assert list(method.build(Shape.of(q, k, v), landmarks=5).parameters()) == []
    with pytest.raises(UserError, match="conv = 4 is even"):
        method(q, k, v, landmarks=5, conv=4)


@pytest.mark.parametrize("name", BY_HAND)
def test_there_is_no_causal_form(name: str) -> None:
    q, k, v = tensors(20)
    with pytest.raises(UserError, match="no causal form"):
        attnbench.get(name)(q, k, v, landmarks=5, causal=True)
