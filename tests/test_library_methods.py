"""Methods that are a library's kernel: what they say where it is missing, and how they call it where it is there."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from attnbench.methods import _optional
from torch.nn.functional import scaled_dot_product_attention

import attnbench
from attnbench.errors import UserError

EMPTY = ("flash_attn/__init__.py", "")


@pytest.fixture
def fresh(monkeypatch):
    """Forget modules whose import depends on optional packages, before and after."""

    def stale():
        targets = ("flash_attn", "flash_attn_interface", "xformers", "attnbench.methods._flash_", "attnbench.methods._xformers")
        return [name for name in sys.modules if name.startswith(targets)]

    for name in stale():
        monkeypatch.delitem(sys.modules, name)
    yield monkeypatch
    for name in stale():
        del sys.modules[name]


def package(root, monkeypatch, *files):
    """Make modules importable from `root`: paths, each holding a `flash_attn_func`, or `(path, text)`."""
    for item in files:
        name, text = (item, "flash_attn_func = None") if isinstance(item, str) else item
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(root))
    importlib.invalidate_caches()


def bnhd_attention(q, k, v, causal):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True).transpose(1, 2)


def inputs(kv_heads):
    return [torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]


def hidden_inside():
    with _optional.flash_attn_hidden():
        return importlib.util.find_spec("flash_attn") is None


def test_flash_attn_without_interface_is_hidden(fresh, tmp_path):
    package(tmp_path, fresh, EMPTY, "flash_attn/cute.py")
    assert importlib.util.find_spec("flash_attn") is not None
    assert hidden_inside()
    assert importlib.import_module("flash_attn.cute").flash_attn_func is None


def test_an_imported_flash_attn_comes_back(fresh, tmp_path):
    package(tmp_path, fresh, EMPTY, "flash_attn/cute.py")
    module = importlib.import_module("flash_attn")
    assert hidden_inside()
    assert sys.modules["flash_attn"] is module
    with pytest.raises(ZeroDivisionError), _optional.flash_attn_hidden():
        _ = 1 / 0
    assert sys.modules["flash_attn"] is module


def test_flash_attn_with_interface_stays_visible(fresh, tmp_path):
    package(tmp_path, fresh, "flash_attn/__init__.py", "flash_attn/flash_attn_interface.py")
    assert not hidden_inside()


def test_a_broken_flash_attn_is_hidden(fresh, tmp_path):
    package(tmp_path, fresh, ("flash_attn/__init__.py", "raise ImportError('undefined symbol')"), "flash_attn/flash_attn_interface.py")
    assert hidden_inside()


def test_hiding_what_is_not_there_leaves_no_trace(fresh):
    fresh.setitem(sys.modules, "flash_attn", None)  # as Python marks a package that cannot be imported
    assert hidden_inside()
    fresh.delitem(sys.modules, "flash_attn")
    if importlib.util.find_spec("flash_attn") is None:
        assert hidden_inside()
        assert "flash_attn" not in sys.modules


def test_cuda_runtime_is_loaded_by_path(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(_optional.ctypes, "CDLL", lambda path, mode: opened.append((path, mode)))
    monkeypatch.setattr(_optional.importlib.util, "find_spec", lambda _: types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert _optional.preload_cuda_runtime() is None
    library = tmp_path / "cuda_runtime" / "lib" / "libcudart.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    assert _optional.preload_cuda_runtime() == library
    assert opened == [(str(library), _optional.ctypes.RTLD_GLOBAL)]
    monkeypatch.setattr(_optional.importlib.util, "find_spec", lambda _: None)
    assert _optional.preload_cuda_runtime() is None


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_cpu_is_refused_with_reasons(name):
    q, k, v = inputs(4)
    with pytest.raises(UserError, match=f"{name}@.*runs on cuda only, not on cpu") as error:
        attnbench.get(name)(q, k, v)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(attnbench.get(f"{name}@eager")(q, k, v), attnbench.get("softmax@eager")(q, k, v))


def test_each_flash_attn_says_what_it_misses(fresh, tmp_path):
    package(tmp_path, fresh, EMPTY, "flash_attn/cute.py")
    method = attnbench.get("flash_attn")
    assert method.implementation("fa4").missing() == ""
    assert "flash_attn_func" in method.implementation("fa2").missing()


@pytest.mark.parametrize(
    ("label", "file"), [("fa4", "flash_attn/cute.py"), ("fa3", "flash_attn_interface.py"), ("fa2", "flash_attn/__init__.py")]
)
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_calls(fresh, tmp_path, label, file, causal):
    """Some versions return the output, others the output and its log-sum-exp."""
    package(tmp_path, fresh, EMPTY, file)
    method, qkv = attnbench.get("flash_attn"), inputs(2)
    implementation, params = method.implementation(label), method.parse({"causal": causal})
    module = importlib.import_module(implementation.target.partition(":")[0])
    for function in (bnhd_attention, lambda q, k, v, causal: (bnhd_attention(q, k, v, causal), None)):
        fresh.setattr(module, "flash_attn_func", function)
        torch.testing.assert_close(method.run(implementation, *qkv, params), method.reference(*qkv, params))
    assert module.witness(*qkv, params).startswith("flash-attn")


class LowerTriangularMask:
    pass


class Inputs(types.SimpleNamespace):
    def __init__(self, query, key, value, attn_bias):
        super().__init__(query=query, key=key, value=value, attn_bias=attn_bias)

    def normalize_bmhk(self):
        assert self.query.shape[1] == self.key.shape[1] == 9
        assert self.query.shape[:-1] == self.key.shape[:-1]


def fake_xformers(monkeypatch):
    """xformers as the method sees it: shared key heads come as a fifth dimension, repeated by stride 0."""

    def memory_efficient_attention(q, k, v, attn_bias):
        causal = isinstance(attn_bias, LowerTriangularMask)
        if q.ndim == 4:
            return bnhd_attention(q, k, v, causal)
        assert k.stride(3) == v.stride(3) == 0
        return bnhd_attention(*(x.flatten(2, 3) for x in (q, k, v)), causal).unflatten(2, q.shape[2:4])

    dispatch = types.SimpleNamespace(
        _dispatch_fw=lambda _, needs_gradient: types.SimpleNamespace(NAME=f"fw{int(needs_gradient)}"),
        _dispatch_bw=lambda _, varlen_lse_packed: types.SimpleNamespace(NAME="bw"),
    )
    modules = {
        "xformers": {"__spec__": importlib.machinery.ModuleSpec("xformers", None), "__path__": []},
        "xformers.ops": {"LowerTriangularMask": LowerTriangularMask, "memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {"Inputs": Inputs, "dispatch": dispatch},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_xformers_calls(fresh, causal, kv_heads):
    fake_xformers(fresh)
    method, qkv = attnbench.get("xformers"), inputs(kv_heads)
    implementation, params = method.implementation("memory_efficient"), method.parse({"causal": causal})
    assert implementation.missing() == ""
    torch.testing.assert_close(method.run(implementation, *qkv, params), method.reference(*qkv, params))
    witness = sys.modules["attnbench.methods._xformers"].witness
    assert witness(*qkv, params).endswith(": fw0, bw")
    assert witness(*(x.requires_grad_() for x in qkv), params).endswith(": fw1, bw")
