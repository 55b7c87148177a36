import pytest
import torch
from attnbench.methods._landmarks import LandmarkParams, bins, landmarks, pool, pool_flops
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

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
