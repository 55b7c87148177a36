"""Backends of scaled_dot_product_attention: cuDNN's is not trained with where its backward pass may give NaN."""

import math
import re
from importlib.resources import files

import pytest
import torch
from attnbench.methods import _sdpa
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import attnbench
from attnbench.method import Shape


@pytest.fixture
def cudnn(monkeypatch):
    """Whether cuDNN was allowed, call by call; nothing is computed."""
    allowed = []

    def noted(q, *_, **__):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(_sdpa, "scaled_dot_product_attention", noted)
    return allowed


@pytest.mark.parametrize(
    ("queries", "keys", "learns", "allowed"),
    [(256, 64, True, False), (64, 256, True, False), (49, 49, True, False), (256, 128, True, True), (256, 64, False, True)],
)
def test_cudnn_learns_from_whole_tiles_alone(cudnn, queries, keys, learns, allowed):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode():
        q = torch.empty(1, 1, queries, 64, device="cuda", requires_grad=learns)
        k = torch.empty(1, 1, keys, 64, device="cuda")
        _sdpa.attention(q, k, k)
        with torch.no_grad():
            _sdpa.attention(q, k, k)
    assert cudnn == [allowed, True]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_bias_that_learns_counts_too(cudnn):
    with FakeTensorMode():
        q, bias = torch.empty(1, 1, 64, 64, device="cuda"), torch.empty(64, 64, device="cuda", requires_grad=True)
        _sdpa.attention(q, q, q, bias)
    assert cudnn == [False]


@pytest.mark.parametrize("causal", [False, True])
def test_heads_and_masks_are_those_of_torch(causal):
    q, k, v = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert torch.equal(_sdpa.attention(q, k, v, causal=causal), wanted)
    mask = torch.randn(24, 24)
    assert torch.equal(_sdpa.attention(q, k, v, mask), scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))


def test_every_method_asks_for_backends_here():
    """All but the template, which is a file that users copy."""
    found = [f.name for f in files("attnbench.methods").iterdir() if f.name.endswith(".py")]
    calls = {name for name in found if re.search(r"scaled_dot_product_attention\(", (files("attnbench.methods") / name).read_text())}
    assert calls == {"_sdpa.py", "_template.py"}


def test_it_compiles_whole_where_a_backend_is_kept_out(monkeypatch):
    monkeypatch.setattr(_sdpa, "_sound", lambda *_: _sdpa.sdpa_kernel(_sdpa._SOUND))
    q = torch.randn(1, 2, 16, 8)
    whole = torch.compile(_sdpa.attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(q, q, q), scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    ("name", "tokens", "backward", "chosen"),
    [("", 3136, True, "flash"), ("", 3136, False, "cudnn"), ("", 4096, True, "cudnn"), ("@cudnn", 3136, True, "cudnn")],
)
def test_softmax_learns_by_cudnn_from_whole_tiles_unless_pinned(name, tokens, backward, chosen):
    method = attnbench.get(f"softmax{name}")
    found, _ = method.choose(Shape(1, 2, tokens, 64), torch.bfloat16, "cuda", method.parse({}), backward=backward)
    assert found is method.implementation(chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [_sdpa.attention, attnbench.get("nystromformer@sdpa")])
@pytest.mark.parametrize("tokens", [704, 3136])
def test_gradients_are_finite_where_scores_are_small(run, tokens):
    """Scores of about -120 against 64 keys more than fill whole tiles, where cuDNN's gradient of q is NaN."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (x * torch.randn(2, 2, tokens, 64, device="cuda", generator=generator) for x in (0.1, 0.1, 1.0))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(run(*inputs).float().sum(), inputs)
    assert all(bool(x.isfinite().all()) for x in gradients)
