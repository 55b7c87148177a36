"""Holds repeated launches of MiTA's kernels against those of Triton, without a GPU: nothing is compiled and nothing runs.

Triton's own analysis of arguments chooses a kernel; in place of compiling it, a number stands for that choice. What reaches the driver
is written down: the choice, the grid, the arguments. Run as a script, with TRITON_INTERPRET unset; prints a line a case: launches of the
forward pass and of both passes, and its name.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager, nullcontext
from itertools import combinations
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton.compiler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG: list[tuple[Any, ...]] = []
"""what reached the driver: stream, choice, grid, (options, whether it may begin early), arguments; tensors as (address, bytes)"""
MAIN, SIDE, MARK = 7, 8, 0
"""streams, and what stands for one where the second is forked or joined"""
CHOICES: dict[tuple[str, ...], int] = {}
NAMES: dict[int, str] = {}
SIZES: dict[tuple[int, ...], int] = {}
FILLING = "probe_grad_kernel"
"""writes dk and dv, which are else zeroed beforehand"""


class Launcher:
    """Stands for Triton's launcher: the object and the function in C."""

    launch_cooperative_grid, global_scratch_size, profile_scratch_size = False, 0, 0

    def __init__(self, launch_pdl: bool) -> None:
        self.launch_pdl = launch_pdl

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        """As Triton calls it."""
        self.launch(x, y, z, stream, function, False, self.launch_pdl, None, None, *rest)

    def launch(self, *every: Any) -> None:
        """Write a launch down."""
        x, y, z, stream, function, cooperative, dependent, scratch, profile, packed, metadata, enter, leave, *args = every
        assert (cooperative, scratch, profile) == (False, None, None)
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)
        spans = [(a.data_ptr(), a.nbytes) if isinstance(a, Tensor) else a for a in args]
        for place in self.zeroed(NAMES[function]):
            size = SIZES.setdefault((place, function, x), args[place].nbytes if isinstance(args[place], Tensor) else 0)
            assert not any(ctypes.string_at(address(spans[place]), size)), f"{NAMES[function]} is given what is not zero"
        LOG.append((stream, function, (x, y, z), (packed, dependent), spans))

    def zeroed(self, name: str) -> tuple[int, ...]:
        """Places of arguments that must point to zeros."""
        filled = any(NAMES[x[1]] == FILLING for x in LOG if x[0] != MARK)
        return (2,) if name == "mark_kernel" else (5, 6) if name == "scatter_kernel" and not filled else ()


class Choice:
    """Stands for a compiled kernel."""

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        key = (source.fn.__name__, *(str(x) for x in (source.signature, source.constants, source.attrs, sorted(options.items(), key=str))))
        self.function = CHOICES.setdefault(key, len(CHOICES))
        NAMES[self.function] = source.fn.__name__
        self.packed_metadata, self.run = (options["num_warps"], 1, 0), Launcher(options["launch_pdl"])

    def launch_metadata(self, *_: Any) -> None:
        """Nothing for a profiler."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        return lambda *args: self.run(*grid, MAIN, self.function, self.packed_metadata, None, *hooks, *args)


class Side:
    """Stands for a second stream."""

    handle = SIDE

    def fork(self) -> None:
        """Write it down."""
        LOG.append((MARK, "fork"))

    def join(self) -> None:
        """Write it down."""
        LOG.append((MARK, "join"))


def address(x: Any) -> int:
    """Of a tensor that was written down, or of a pointer."""
    return int(x[0] if isinstance(x, tuple) else x)


@contextmanager
def logged() -> Iterator[list[Any]]:
    """Yields a list that gets what reaches the driver; meanwhile no memory is freed, so that an address is one buffer."""
    LOG.clear()
    log: list[Any] = []
    kept, made = [], {name: getattr(torch, name) for name in ("empty", "zeros")}

    def keeping(make: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Tensor:
            kept.append(make(*args, **options))
            return kept[-1]

        return wrapped

    for name, make in made.items():
        setattr(torch, name, keeping(make))
    yield log
    for name, make in made.items():
        setattr(torch, name, make)
    log += LOG


def compare(first: list[Any], again: list[Any], before: list[int], after: list[int], *, one: bool) -> None:
    """Fails where `again` is not `first` but for addresses, of which the caller's are `before` and `after`, unless all are `one`.

    Buffers may lie elsewhere, and one over another where all launches that take one come after all that take the other.
    """
    assert all(x[0] == MAIN for x in first)
    ancestors = preceding(again)
    again = in_turn(again)
    assert [x[1:4] for x in first] == [x[1:4] for x in again], "another kernel, grid or number of warps"
    place: dict[int, int] = {} if one else dict(zip(before, after, strict=True))
    sizes: dict[int, int] = {}
    uses: dict[int, set[int]] = {x: set(range(len(again))) for x in place}
    for i, ((*_, mine), (*_, other)) in enumerate(zip(first, again, strict=True)):
        for a, b in zip(mine, other, strict=True):
            if not isinstance(a, tuple):
                assert (type(a), a) == (type(b), b), f"{b} in place of {a}"
            elif a[1]:  # nothing is read from what holds nothing
                assert place.setdefault(a[0], address(b)) == address(b), "another buffer"
                assert (a[0] - address(b)) % 16 == 0, "aligned otherwise"
                sizes[a[0]] = max(a[1], sizes.get(a[0], 0))
                uses.setdefault(a[0], set()).add(i)
    given = set(before)
    landmarks = {x[4][1][0] for x in first if NAMES[x[1]] == "gate_kernel"}  # read alone
    for a in uses.keys() - given - landmarks:
        assert all(i in ancestors[j] for i, j in combinations(sorted(uses[a]), 2)), "a buffer is used on both streams"
    for a, b in combinations(sorted(sizes, key=lambda x: place[x]), 2):
        if place[a] + sizes[a] > place[b] and not {a, b} <= given:
            mine, other = uses[a], uses[b]
            turns = [all(i in ancestors[j] for i in x for j in y) for x, y in ((mine, other), (other, mine))]
            assert any(turns), "buffers that are used at the same time overlap"


def preceding(log: list[Any]) -> list[set[int]]:
    """For each launch of a log those that are over when it begins: what its stream did before, and what that has waited for."""
    known: dict[int, set[int]] = {MAIN: set(), SIDE: set()}
    found: list[set[int]] = []
    for x in log:
        if x[0] == MARK:
            known[SIDE if x[1] == "fork" else MAIN] |= known[MAIN if x[1] == "fork" else SIDE]
        else:
            found.append(set(known[x[0]]))
            known[x[0]].add(len(found) - 1)
    return found


def in_turn(log: list[Any]) -> list[Any]:
    """The launches of a log. Fails where a second stream is not used, or not joined."""
    marks = [(i, x[1]) for i, x in enumerate(log) if x[0] == MARK]
    if marks:
        (begun, fork), (done, join) = marks
        assert (fork, join) == ("fork", "join")
        assert {x[0] for x in log[begun + 1 : done]} == {MAIN, SIDE}, "nothing runs side by side"
    assert all(x[0] == MAIN for i, x in enumerate(log) if not marks or not begun <= i <= done)
    return [x for x in log if x[0] != MARK]


def tensors(case: dict[str, Any], seed: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the output's gradient as the case wants them."""
    torch.manual_seed(seed)
    b, h, n, d = case.get("shape", (1, 4, 300, 64))
    heads, dv, dtype = case.get("kv_heads", h), case.get("dv", d), case.get("dtype", torch.bfloat16)
    made = []
    for name, (count, width) in {"q": (h, d), "k": (heads, d), "v": (heads, dv), "grad": (h, dv)}.items():
        if name in case.get("strided", ()):
            x = torch.randn(b, n, count, width + 32).to(dtype)[..., :width].transpose(1, 2)
        elif name in case.get("shifted", ()):
            x = torch.randn(b * count * n * width + 1).to(dtype)[1:].view(b, count, n, width)
        elif name in case.get("expanded", ()):
            x = torch.ones((), dtype=dtype).expand(b, count, n, width)
        else:
            x = torch.randn(b, count, n, width).to(dtype)
        made.append(x)
    q, k, v, grad = made
    return [x.requires_grad_() for x in ((q, q, q) if case.get("one") else (q, k, v))], grad


CASES: dict[str, dict[str, Any]] = {
    "one tensor thrice": {"one": True},  # noted first, and repeated by the next
    "plain": {},
    "long": {"shape": (1, 2, 3000, 64), "call": {"topk": 64, "landmarks": 64}},
    "float32": {"dtype": torch.float32},
    "strided": {"strided": "qkv"},
    "q shifted": {"shifted": "q"},
    "k shifted": {"shifted": "k"},
    "v shifted": {"shifted": "v"},
    "gradient shifted": {"shifted": ("grad",)},
    "gradient strided": {"strided": ("grad",)},
    "gradient expanded": {"expanded": ("grad",)},
    "odd sizes": {"shape": (1, 1, 77, 32), "dv": 96},
    "one of everything": {"shape": (1, 1, 1, 32), "call": {"landmarks": 1, "topk": 1}},
    "sixteen": {"shape": (2, 8, 256, 64), "call": {"landmarks": 16, "topk": 16}},
    "grouped heads": {"kv_heads": 2},
    "grid": {"shape": (2, 3, 197, 64), "call": {"landmarks": (5, 5), "grid": (14, 14), "prefix": 1}},
    "many keys": {"call": {"topk": 70}},
    "many landmarks": {"call": {"landmarks": 150}},
    "three experts": {"call": {"experts_per_query": 3}},
    "landmarks alone": {"call": {"routed": False}},
    "experts alone": {"call": {"shared": False}},
    "experts alone, three": {"call": {"shared": False, "experts_per_query": 3}},
    "another scale": {"call": {"scale": 0.5}},
    "scale of one": {"call": {"scale": 1.0, "shared_scale": 1}},
}


class Watched(TorchDispatchMode):
    """A mode that changes nothing, under which calls go through the operators."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **kwargs or {})


def launched(mita: Any, case: dict[str, Any], seed: int, mode: str = "") -> tuple[list[Any], int, list[int]]:
    """(log of both passes, launches of the forward pass, addresses of the caller's tensors)."""
    qkv, grad = tensors(case, seed)
    options = {"landmarks": 6, "topk": 7, **case.get("call", {})}
    with logged() as log:
        with Watched() if mode == "watched" else nullcontext(), torch.set_grad_enabled(mode != "forward"):
            out = mita.mita_attention(*qkv, **options)
        forward = sum(x[0] != MARK for x in LOG)
        if mode != "forward":
            grads = torch.autograd.grad(out, qkv, grad)
            assert [x.shape for x in grads] == [x.shape for x in qkv]
    return log, forward, [x.data_ptr() for x in (*qkv, grad)]


def main() -> None:
    """Each case as Triton launches it, then repeated with other tensors among the others."""
    triton.compiler.compile = lambda source, target, options: Choice(source, options)
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: -1, get_current_stream=lambda _: MAIN,
    ))  # fmt: skip
    from attnbench.kernels import mita
    from attnbench.kernels.mita import _eager, _program

    _program.side_of = lambda *_: Side()  # type: ignore[assignment]
    told: list[Any] = []
    first = {}
    for name, case in CASES.items():
        _eager.forget()
        first[name] = launched(mita, case, 0)
        assert len(_eager._CALLS) == 1, "the call was not noted"
    _eager.forget()
    for case in CASES.values():
        launched(mita, case, 1)
    for name, (log, forward, pointers) in first.items():
        case = CASES[name]
        assert not any(x[3][1] for x in log), "no kernel waits by itself for the one before it"
        for mode in ("", "", "forward", "watched", "hook"):
            if mode == "hook":
                knobs.runtime.launch_enter_hook.add(told.append)
            again, _, others = launched(mita, case, 2, mode)
            knobs.runtime.launch_enter_hook.remove(told.append)
            compare(log[:forward] if mode == "forward" else log, again, pointers, others, one="one" in case)
        print(forward, len(log), name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        log, *_ = launched(mita, CASES["plain"], 3)
    assert all(x[0] == MAIN for x in log), "kernels that run side by side have no time of their own"
    assert {"attnbench::mita_forward", "attnbench::mita_backward"} <= {e.key for e in seen.key_averages()}
    assert len(told) == sum(len(x[0]) for x in first.values()), "hooks were not told of every launch"


if __name__ == "__main__":
    main()
