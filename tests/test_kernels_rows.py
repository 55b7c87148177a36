"""Weighted sums of rows: in Triton's interpreter where there is no GPU, else on the GPU, against float64 autograd of the sum itself."""

import pytest
import torch
from triton_support import DEVICE, interpreter  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
import attnbench
from attnbench.kernels.rows import mix_rows
from attnbench.method import Shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 9, 9, 4, 16), (1, 31, 5, 7, 24), (2, 1, 1, 1, 8), (1, 40, 150, 3, 200)])
def test_sums_and_their_gradients(sizes, dtype):
    kv_heads, n, r, u, d = sizes
    g = torch.Generator().manual_seed(0)
    v = torch.randn(2, kv_heads, n, d, generator=g).to(DEVICE, dtype).requires_grad_()
    index = torch.randint(n, (2, 2, r, u), generator=g).to(DEVICE)
    weights = torch.randn(2, 2, r, u, generator=g).masked_fill(torch.rand(2, 2, r, u, generator=g) < 0.3, 0).to(DEVICE).requires_grad_()
    out = mix_rows(v, index, weights)
    grad = torch.randn(out.shape, generator=g).to(DEVICE, dtype)
    exact_v, exact_w = v.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    heads = torch.arange(2, device=DEVICE)[:, None, None] // (2 // kv_heads)
    want = (exact_w.unsqueeze(-1) * exact_v[torch.arange(2, device=DEVICE)[:, None, None, None], heads, index]).sum(-2)
    unit = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    got = out, *torch.autograd.grad(out, (v, weights), grad)
    exact = want, *torch.autograd.grad(want, (exact_v, exact_w), grad.double())
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).abs().max() <= 4 * unit * b.abs().max()


def test_the_fused_implementation_is_the_definition():
    from attnbench.methods._deformable import fused

    method, shape, g = attnbench.get("deformable"), Shape(1, 2, 35, 16), torch.Generator().manual_seed(1)
    params = method.parse({"points": 3, "grid": "5x7"})
    qkv = [torch.randn(1, 2, 35, 16, generator=g).to(DEVICE).requires_grad_() for _ in range(3)]
    drawn = method.initial(shape, params, torch.empty(0))
    own = {name: (x + 0.2 * torch.randn(x.shape, generator=g)).to(DEVICE).requires_grad_() for name, x in drawn.items()}
    results = []
    for run, dtype in ((fused, torch.float32), (method.reference, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*qkv, *own.values())]
        out = run(*leaves[:3], params, weights=dict(zip(own, leaves[3:], strict=True)))
        grads = torch.autograd.grad(out.square().sum(), [leaves[0], *leaves[2:]])
        results.append([out.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
