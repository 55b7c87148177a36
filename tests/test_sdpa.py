"""Backends of scaled_dot_product_attention: cuDNN's is not trained with where its backward pass may give NaN."""

import math
import re
from importlib.resources import files

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

import attnbench
from attnbench import sdpa
from attnbench.method import Shape

CUDNN = SDPBackend.CUDNN_ATTENTION
ALLOWED = {
    CUDNN: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
"""backend -> whether torch may choose it now"""


@pytest.fixture
def allowed(monkeypatch):
    """Backends that torch could choose among, call by call; nothing is computed."""
    found = []

    def noted(q, *_, **__):
        found.append({backend for backend, enabled in ALLOWED.items() if enabled()})
        return q

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", noted)
    return found


def drawn(queries, keys, device="cuda"):
    with FakeTensorMode():
        return [torch.empty(1, 1, n, 64, device=device) for n in (queries, keys, keys)]


@pytest.mark.parametrize(
    ("queries", "keys", "without"), [(256, 64, {CUDNN}), (64, 256, {CUDNN}), (49, 49, {CUDNN}), (256, 128, set()), (4096, 4096, set())]
)
@pytest.mark.parametrize("learns", range(3), ids="qkv")
def test_cudnn_trains_on_whole_tiles_alone(allowed, queries, keys, without, learns):
    before, qkv = torch.backends.cuda.cudnn_sdp_enabled(), drawn(queries, keys)
    sdpa.attention(*qkv)
    qkv[learns].requires_grad_()
    sdpa.attention(*qkv)
    with torch.no_grad():
        sdpa.attention(*qkv)
    assert allowed == [set(ALLOWED), set(ALLOWED) - without, set(ALLOWED)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_bias_that_learns_counts_too(allowed):
    with FakeTensorMode():
        bias = torch.empty(64, 64, device="cuda", requires_grad=True)
    sdpa.attention(*drawn(64, 64), bias)
    assert allowed == [set(ALLOWED) - {CUDNN}]


def test_nothing_is_left_out_on_a_cpu(allowed):
    q, k, v = drawn(64, 64, "cpu")
    sdpa.attention(q.requires_grad_(), k, v)
    assert allowed == [set(ALLOWED)]


@pytest.mark.parametrize("causal", [False, True])
def test_heads_and_masks_are_those_of_torch(causal):
    q, k, v = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.equal(sdpa.attention(q, k, v, causal=causal), wanted)
    mask = torch.randn(24, 24)
    assert torch.equal(sdpa.attention(q, k, v, mask), scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))


def test_methods_call_torch_only_where_they_force_a_backend():
    found = [f.name for f in files("attnbench.methods").iterdir() if f.name.endswith(".py")]
    calls = {name for name in found if re.search(r"scaled_dot_product_attention\(", (files("attnbench.methods") / name).read_text())}
    assert calls == {"_sdpa.py"}


def test_it_compiles_whole_where_a_backend_is_kept_out(monkeypatch):
    monkeypatch.setattr(sdpa, "_backends", lambda *_: sdpa.sdpa_kernel(sdpa._OTHERS))
    q = torch.randn(1, 2, 16, 8)
    whole = torch.compile(sdpa.attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(q, q, q), scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    ("name", "tokens", "keys", "backward", "chosen"),
    [
        ("", 3136, 3136, True, "flash"),
        ("", 4096, 64, True, "flash"),
        ("", 3136, 3136, False, "cudnn"),
        ("", 4096, 4096, True, "cudnn"),
        ("@cudnn", 3136, 3136, True, "cudnn"),
    ],
)
def test_softmax_trains_by_cudnn_on_whole_tiles_unless_pinned(name, tokens, keys, backward, chosen):
    method = attnbench.get(f"softmax{name}")
    found, _ = method.choose(Shape(1, 2, tokens, 64, keys=keys), torch.bfloat16, "cuda", method.parse({}), backward=backward)
    assert found is method.implementation(chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [sdpa.attention, attnbench.get("nystromformer@sdpa")])
@pytest.mark.parametrize("tokens", [704, 3136])
def test_gradients_are_finite_where_scores_are_small(run, tokens):
    """Scores of about -120 against 64 keys more than fill whole tiles, where cuDNN's gradient of q is NaN."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (x * torch.randn(2, 2, tokens, 64, device="cuda", generator=generator) for x in (0.1, 0.1, 1.0))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(run(*inputs).float().sum(), inputs)
    assert all(bool(x.isfinite().all()) for x in gradients)
