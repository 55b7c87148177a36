"""Tensors that are made once for a shape: the same where they may be kept, made anew where something watches."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

constants = importlib.import_module("attnbench.methods._constants")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(constants, "_KNOWN", {})


def make():
    return torch.arange(4) * 2.0


def test_it_is_made_once_for_a_key():
    first = constants.constant(make, CPU, "a", 4)
    assert constants.constant(make, CPU, "a", 4) is first
    assert constants.constant(make, CPU, "b", 4) is not first


def test_what_is_made_without_gradients_serves_those_who_want_them():
    with torch.inference_mode():
        constants.constant(make, CPU, "a")
    x = torch.ones(4, requires_grad=True)
    (x * constants.constant(make, CPU, "a")).sum().backward()
    assert torch.equal(x.grad, make())


def test_nothing_is_kept_of_what_traces():
    with FakeTensorMode():
        constants.constant(make, CPU, "a")
    assert not constants._KNOWN
    compiled = torch.compile(lambda x: x * constants.constant(make, CPU, "a"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(4)), make())
    assert not constants._KNOWN


def test_few_are_kept():
    for n in range(40):
        constants.constant(make, CPU, n)
    assert len(constants._KNOWN) <= constants._MOST
