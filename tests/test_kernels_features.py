"""Feature maps in Triton: in its interpreter where there is no GPU, else on the GPU, against torch and against definitions in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_support import DEVICE, interpreter  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
from attnbench.methods import _fused_features as fused
from attnbench.methods._kernel import Part

import attnbench
from attnbench.method import Shape

METHODS = [
    ("linear", {}),
    ("cosformer", {}),
    ("performer", {}),
    ("performer", {"features": 62}),  # the two features beside them in two tiles
    ("performer", {"features": 64, "eps": 0.01}),
    ("performer", {"kernel": "relu", "features": 100}),
    ("focused_linear", {"power": 3.5}),
    ("polaformer", {"alpha": 3.0}),
]


@pytest.fixture(params=["roomy", "tight"])
def budget(request, monkeypatch):
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 15, "cuda": 1 << 15})


def case(name, setting, *, n=70, keys=90, dim=20, dtype=torch.float32, seed=0):
    """A method, its parameters, q, k, v and weights off their initial values, and names of the weights."""
    method, g = attnbench.get(name), torch.Generator().manual_seed(seed)
    kv_heads = 2 if method.limits.gqa else 4
    qkv = [torch.randn(2, h, size, d, generator=g) for h, size, d in ((4, n, dim), (kv_heads, keys, dim), (kv_heads, keys, 12))]
    params = method.parse(setting)
    own = {w: x + 0.3 * torch.randn(x.shape, generator=g) for w, x in method.initial(Shape.of(*qkv), params, torch.empty(0)).items()}
    return method, params, [x.to(DEVICE, dtype) for x in (*qkv, *own.values())], list(own)


def run(function, params, tensors, names, dtype):
    """Output and gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    weights = {"weights": dict(zip(names, leaves[3:], strict=True))} if names else {}
    out = function(*leaves[:3], params, **weights)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("name", "setting"), METHODS, ids=str)
@pytest.mark.usefixtures("budget")
def test_methods_are_their_definitions(name, setting):
    method, params, tensors, names = case(name, setting)
    got = run(getattr(fused, name), params, tensors, names, torch.float32)
    for a, b in zip(got, run(method.reference, params, tensors, names, torch.float64), strict=True):
        assert (a.double() - b).abs().max() <= 2e-4 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "setting"), METHODS, ids=str)
def test_half_precision_is_as_good_as_in_torch(name, setting, dtype):
    """Errors are those of the implementation in torch, to half as much again; the interpreter cuts numbers off where bfloat16 ends."""
    factor = 3.0 if (DEVICE, dtype) == ("cpu", torch.bfloat16) else 1.5
    method, params, tensors, names = case(name, setting, n=130, keys=130, dim=32, dtype=dtype)
    if method.reasons(method.implementation("chunked"), Shape(2, 4, 130, 32), dtype, "cpu", params):
        pytest.skip("not in this dtype")
    exact = run(method.reference, params, tensors, names, torch.float64)
    ours, theirs = (run(f, params, tensors, names, dtype) for f in (getattr(fused, name), method.implementation("chunked").load()))
    for a, b, x in zip(ours, theirs, exact, strict=True):
        errors = [float((y.double() - x).square().mean().sqrt() / x.square().mean().sqrt()) for y in (a, b)]
        assert errors[0] <= factor * errors[1] + torch.finfo(dtype).eps / 4, errors


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_kernels_compile_for_an_h100(tmp_path):
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_compile_features.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [line.split() for line in done.stdout.splitlines()]
    maps = ("elu", "cosine", "powers", "powers_backward", "focus", "focus_backward", "largest", "features", "features_backward")
    assert {name for name, _ in shared} == {f"{name}_kernel" for name in maps}
    assert all(int(size) <= 227 << 10 for _, size in shared), "more shared memory than a multiprocessor has"


def kernels(name):
    """A class in torch and the one in Triton, made alike."""
    _, params, tensors, names = case(name, {})
    q, k, v = tensors[:3]
    weights = dict(zip(names, tensors[3:], strict=True))
    arguments = {
        "linear": (20,), "cosformer": (q, k), "performer": (q, params), "focused_linear": (weights.get("scale"), 3.0),
        "polaformer": (v, params, weights),
    }[name]  # fmt: skip
    classes = {"linear": "Elu", "cosformer": "Cosine", "performer": "Favor", "focused_linear": "Focused", "polaformer": "Polarised"}
    return getattr(fused, classes[name])(*arguments), getattr(fused, f"Fused{classes[name]}")(*arguments)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("name", ["linear", "cosformer", "performer", "focused_linear", "polaformer"])
def test_parts_of_strided_inputs(name, side):
    """Features and gradients of a part that is no contiguous block, with a zero, negative numbers alone, and large ones in it."""
    plain, quick = kernels(name)
    x = torch.randn(2, 4, 1, 70, 20, generator=torch.Generator().manual_seed(3))
    x[:, :, :, 5], x[:, :, :, 6], x[:, :, :, 7, 3] = 6 * x[:, :, :, 5], -x[:, :, :, 6].abs(), 0.0
    x = x.to(DEVICE)
    if name == "focused_linear":
        part = Part(side, slice(1, 2), slice(0, 4), slice(10, 70), 0.5, whole=False)
    else:
        part = Part(side, slice(1, 2), slice(1, 3), slice(0, 70), 0.5, whole=False)
    own = part.of(x)
    want, got = (kernel.features(own, part) for kernel in (plain, quick))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    grad, results = torch.randn(want.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE), []
    for kernel in (plain, quick):
        out = torch.full_like(x, float("nan"))
        sums = kernel.backward(grad.clone(), want.clone(), own, part, part.of(out))
        assert int(out.isnan().sum()) == x.numel() - own.numel(), "writes its part and no more"
        results.append([part.of(out), *sums])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
