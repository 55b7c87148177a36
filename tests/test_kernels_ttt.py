"""The fused TTT kernels: in Triton's interpreter where there is no GPU, else on the GPU, against float64 autograd of the definition."""

import pytest
import torch
from triton_support import DEVICE, interpreter  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
import attnbench
from attnbench.kernels import ttt as kernels
from attnbench.method import Shape


def case(n, minibatch, *, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    """q, k, v, then weights moved off their initial values, all requiring gradients, and parameters."""
    method, g = attnbench.get("ttt"), torch.Generator().manual_seed(seed)
    shape, params = Shape(2, 2, n, dim, kv_heads), method.parse({"causal": True, "minibatch": minibatch})
    qkv = [torch.randn(2, heads, n, dim, generator=g) for heads in (2, kv_heads, kv_heads)]
    drawn = method.initial(shape, params, torch.empty(0))
    moved = {name: x + 0.2 * torch.randn(x.shape, generator=g) for name, x in drawn.items()}
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (*qkv, *moved.values())]
    return method, params, leaves, list(moved)


def both(method, params, leaves, names):
    """Output and gradients of the kernels, of the definition in float64, and of the definition in the inputs' dtype."""
    from attnbench.methods._ttt import fused

    found = []
    for run, dtype in ((fused, leaves[0].dtype), (method.reference, torch.float64), (method.reference, leaves[0].dtype)):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = run(*own[:3], params, weights=dict(zip(names, own[3:], strict=True)))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, leaves[0].dtype).to(dtype)
        found.append([out.detach(), *torch.autograd.grad(out, own, grad)])
    return found


@pytest.mark.parametrize(
    ("n", "minibatch", "kv_heads", "dim"),
    [(64, 16, 2, 16), (50, 16, 1, 24), (5, 16, 2, 16), (41, 5, 2, 8), (1, 4, 1, 16), (70, 20, 2, 16), (47, 1, 2, 16)],
)
def test_output_and_gradients_are_the_definitions(monkeypatch, n, minibatch, kv_heads, dim):
    monkeypatch.setattr(kernels, "EVERY", 2)
    got, want, _ = both(*case(n, minibatch, kv_heads=kv_heads, dim=dim))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4 * float(b.abs().max()))


def test_the_number_of_kept_states_changes_nothing(monkeypatch):
    results = []
    for every in (1, 3, 32):
        monkeypatch.setattr(kernels, "EVERY", every)
        results.append(both(*case(100, 8))[0])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_half_precision_is_as_good_as_the_definition_in_it(monkeypatch):
    monkeypatch.setattr(kernels, "EVERY", 4)
    got, want, eager = both(*case(96, 16, dim=32, dtype=torch.bfloat16))
    for i, (a, e, x) in enumerate(zip(got, eager, want, strict=True)):
        unit = torch.finfo(torch.bfloat16).eps / 2 * x.square().mean().sqrt()
        assert (a.double() - x).square().mean().sqrt() <= (3 if i else 2) * (e.double() - x).square().mean().sqrt() + unit


def test_nothing_is_kept_without_gradients():
    method, params, leaves, names = case(40, 16)
    from attnbench.methods._ttt import fused

    with torch.no_grad():
        out = fused(*leaves[:3], params, weights=dict(zip(names, leaves[3:], strict=True)))
    torch.testing.assert_close(
        out, method.reference(*leaves[:3], params, weights=dict(zip(names, leaves[3:], strict=True))), rtol=1e-4, atol=1e-4
    )
