"""Clocks, memory, isolation, inputs and the gate, each alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import attnbench
from attnbench import check, inputs, isolate, memory, timing
from attnbench.errors import UserError
from attnbench.method import Shape
from attnbench.protocol import Protocol
from attnbench.sample import sampled


class Scripted(timing.Clock):
    """A clock that reads out numbers instead of measuring."""

    name = "scripted"

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.taken = 0

    def sample(self, count: int) -> list[float]:
        out = [self.values[(self.taken + i) % len(self.values)] for i in range(count)]
        self.taken += count
        return out


def test_sampling_stops_when_the_noise_is_small() -> None:
    quiet = timing.measure(Scripted(1e-3), Protocol(half_width=0.01, budget_s=10.0), 0.5)
    noisy = timing.measure(Scripted(1e-3, 2e-3, 3e-3, 4e-3), Protocol(half_width=0.01, budget_s=10.0), 0.5)
    assert len(quiet.samples_s) < len(noisy.samples_s) <= 200
    assert quiet.first_call_s == 0.5


def test_sampling_keeps_to_its_budget_but_takes_three() -> None:
    assert len(timing.measure(Scripted(10.0), Protocol(budget_s=1.0), 0.0).samples_s) == 3
    assert len(timing.measure(Scripted(0.1, 0.4), Protocol(budget_s=1.0, half_width=1e-6), 0.0).samples_s) <= 6


def test_the_cpu_clock_times_the_call_alone() -> None:
    clock = timing.CpuClock(lambda: time.sleep(0.02), cold=True)
    assert all(0.02 <= s < 0.2 for s in clock.sample(3))


def test_memory_tells_output_saved_and_workspace_apart() -> None:
    x = torch.randn(64, 1024, requires_grad=True)
    unit = x.nbytes

    def forward() -> torch.Tensor:
        doubled = x * 2
        return doubled.exp()

    with torch.no_grad():
        usage = memory.measure(forward, None, 0, "cpu")
    assert (usage.output_bytes, usage.saved_bytes) == (unit, 0)
    assert usage.workspace_bytes == pytest.approx(unit, rel=0.01)
    usage = memory.measure(forward, lambda y: torch.autograd.grad(y, x, torch.ones_like(y)), 0, "cpu")
    assert usage.output_bytes == unit
    assert usage.peak_bytes >= 3 * unit


def _setup(start: int):
    state = {"n": start}

    def job(message):
        if message == "die":
            raise SystemExit(3)
        if message == "hang":
            time.sleep(60)
        state["n"] += 1
        return isolate.Reply(state["n"], reusable=message != "last")

    return job


def test_a_worker_keeps_its_state_until_it_is_replaced() -> None:
    worker = isolate.Worker(_setup, (10,))
    try:
        assert [worker.run("x", 60), worker.run("x", 60), worker.run("last", 60)] == [11, 12, 13]
        assert worker.run("x", 60) == 11
        with pytest.raises(isolate.WorkerDiedError, match="exited with 3"):
            worker.run("die", 60)
        with pytest.raises(isolate.WorkerHungError, match=r"within 0\.3 s"):
            worker.run("hang", 0.3)
        assert worker.run("x", 60) == 11
        assert worker.starts == 4
    finally:
        worker.stop()


def test_a_worker_may_be_stopped_by_any_thread() -> None:
    worker, ends, stops = isolate.Worker(_setup, (10,)), [], []
    worker.run("x", 60)

    def ask() -> None:
        try:
            worker.run("hang", 60)
        except Exception as error:
            ends.append(error)

    def stop() -> None:
        try:
            worker.stop()
        except Exception as error:
            stops.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    stopping = [threading.Thread(target=stop) for _ in range(8)]
    for thread in stopping:
        thread.start()
    for thread in (*stopping, asking):
        thread.join(20)
    assert stops == []
    (end,) = ends
    assert isinstance(end, isolate.WorkerDiedError), repr(end)
    assert worker.run("x", 60) == 11
    worker.stop()


@pytest.mark.parametrize("profile", [p for p in inputs.PROFILES if p != "file"])
def test_profiles_are_seeded_finite_and_hashed(profile: str) -> None:
    shape = Shape(2, 4, 33, 6, kv_heads=2, dim_v=5)
    a, b, c = (inputs.draw(profile, shape, seed, torch.float32, "cpu") for seed in (0, 0, 1))
    assert [tuple(x.shape) for x in a] == [(2, 4, 33, 6), (2, 2, 33, 6), (2, 2, 33, 5)]
    assert all(bool(x.isfinite().all()) for x in a)
    assert inputs.digest(a) == inputs.digest(b) != inputs.digest(c)


def test_inputs_are_drawn_once_and_the_oldest_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, draw = [], inputs.draw
    monkeypatch.setattr(inputs, "draw", lambda *a: calls.append(a) or draw(*a))
    one = 3 * 2 * 16 * 4 * 4
    drawn = inputs.Drawn(limit=2 * one)
    shape = Shape(1, 2, 16, 4)
    first, digest = drawn("randn", shape, 0, torch.float32, "cpu")
    again, same = drawn("randn", Shape(1, 2, 16, 4), 0, torch.float32, "cpu")
    assert len(calls) == 1
    assert digest == same == inputs.digest(draw("randn", shape, 0, torch.float32, "cpu"))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for seed in (1, 2, 0):  # two fit: seed 0 is the oldest when seed 2 comes
        drawn("randn", shape, seed, torch.float32, "cpu")
    assert len(calls) == 4
    none = inputs.Drawn(limit=0)
    none("randn", shape, 0, torch.float32, "cpu")
    none("randn", shape, 0, torch.float32, "cpu")
    assert len(calls) == 6


def test_profiles_have_the_structure_that_they_promise() -> None:
    shape = Shape(1, 2, 256, 32)

    def weights(profile: str) -> torch.Tensor:
        q, k, _ = inputs.draw(profile, shape, 0, torch.float64, "cpu")
        return (q @ k.transpose(-1, -2) * 32**-0.5).softmax(-1)

    assert weights("needle").amax(-1).median() > 0.8
    assert weights("randn").amax(-1).median() < 0.3
    near = torch.arange(256)[:, None].sub(torch.arange(256)).abs() <= 16
    assert (weights("local") * near).sum(-1).mean() > 2 * near.double().mean(-1).mean()
    cluster = torch.arange(256) * 16 // 256
    same = cluster[:, None] == cluster
    assert (weights("clustered") * same).sum(-1).mean() > 0.5


def test_a_file_profile_reads_slices_and_complains(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "qkv.safetensors"
    data = {name: torch.randn(1, 2, 50, 8) for name in "qkv"}
    save_file(data, path)
    q, _, v = inputs.draw(f"file:{path}", Shape(1, 2, 40, 8), 0, torch.float32, "cpu")
    assert torch.equal(q, data["q"][:, :, :40])
    assert torch.equal(v, data["v"][:, :, :40])
    with pytest.raises(UserError, match=r"needs at least \[1, 2, 51, 8\]: lower --axis n"):
        inputs.draw(f"file:{path}", Shape(1, 2, 51, 8), 0, torch.float32, "cpu")
    for wrong in (torch.full((1, 2, 50, 8), torch.nan), torch.ones(1, 2, 50, 8, dtype=torch.int64)):
        save_file(data | {"v": wrong}, path)
        with pytest.raises(UserError, match="v holds numbers that are not finite, or whole ones"):
            inputs.draw(f"file:{path}", Shape(1, 2, 40, 8), 0, torch.float32, "cpu")
    save_file(data | {"k": data["k"][0]}, path)
    with pytest.raises(UserError, match=r"save it as \[B, H, N, D\]"):
        inputs.draw(f"file:{path}", Shape(1, 2, 40, 8), 0, torch.float32, "cpu")
    save_file({"q": data["q"]}, path)
    with pytest.raises(UserError, match="holds no tensor 'k'"):
        inputs.draw(f"file:{path}", Shape(1, 2, 40, 8), 0, torch.float32, "cpu")
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot read"):
        inputs.draw(f"file:{path}", Shape(1, 2, 40, 8), 0, torch.float32, "cpu")
    with pytest.raises(UserError, match="needs a path"):
        inputs.draw("file", Shape(1, 2, 40, 8), 0, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", attnbench.methods())
def test_the_gate_passes_every_implementation_that_runs_here(name: str, dtype: torch.dtype) -> None:
    method = attnbench.get(name)
    shape = Shape(2, 4, 300, 16, kv_heads=2)
    params = method.params().fitted(shape)
    tensors = inputs.draw("randn", shape, 0, dtype, "cpu")
    for implementation in method.all_implementations():
        if not method.reasons(implementation, shape, dtype, "cpu", params, backward=True):
            verdict = check.gate(method, implementation, params, tensors, backward=True, rows=64)
            assert verdict.passed, (implementation.name, verdict.errors, verdict.bounds)


def test_the_gate_holds_sampled_gradients_exactly() -> None:
    """A wrong dk at one key, far from any bound, is caught although only a few queries are compared."""
    from dataclasses import replace

    from attnbench.method import Implementation

    method = attnbench.get("softmax")
    shape = Shape(1, 2, 200, 8)
    tensors = inputs.draw("randn", shape, 0, torch.float32, "cpu")
    good = check.gate(method, Implementation("x", f"{__name__}:right"), method.params(), tensors, backward=True, rows=16)
    bad = check.gate(method, Implementation("x", f"{__name__}:crooked"), method.params(), tensors, backward=True, rows=16)
    assert good.passed
    assert not bad.passed
    assert {k for k in bad.errors if bad.errors[k] > bad.bounds[k]} == {"dk rms", "dk max"}
    assert replace(good, operator="") == good


@pytest.mark.parametrize(
    ("name", "n", "heads", "rows"),
    [
        ("softmax", 1 << 18, 2, 256),
        ("softmax", 1 << 20, 2, 64),
        ("vit3", 1 << 15, 16, 256),
        ("vit3", 1 << 18, 16, 32),
        ("vit3", 1 << 20, 16, 16),
    ],
)
def test_the_gate_compares_fewer_queries_where_all_of_them_would_not_fit(name: str, n: int, heads: int, rows: int) -> None:
    x = torch.empty(1, 1, 1, 1).expand(1, 16, n, 64)  # no memory behind it
    sample = sampled(attnbench.get(name), x, x, 256)
    assert sample.rows is not None
    assert (len(sample.heads), len(sample.rows)) == (heads, rows)
    assert {int(sample.rows[0]), int(sample.rows[-1])} == {0, n - 1}


def right(q, k, v, params):
    return attnbench.get("softmax").reference(q, k, v, params)


class _Crooked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        return k.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[:, :, 123] *= 1.2
        return grad


def crooked(q, k, v, params):
    return right(q, _Crooked.apply(k), v, params)
