"""Launches noted down once and repeated: the pointers of a call are filled in, everything else stands.

A program is what one call of an operator did: the tensors that it was given, those that it made, and its launches in order. It is
repeated with other tensors that are alike in shape, stride, dtype and alignment, which is all that Triton specialises a kernel for. So
each launch takes the compiled kernel and the arguments that Triton would choose, and neither is looked for again. Buffers are pieces of
one allocation or of a result that is written later (`_layout.py`); kernels get them as numbers, which spares a tensor each, and Triton the
question whether the GPU can read it.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

from ._layout import Piece, Step, apart, shared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_C_LAUNCHER = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")


class Buffer(NamedTuple):
    """A tensor that a program makes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def on(self, device: torch.device) -> Tensor:
        """A tensor of its own."""
        return (torch.zeros if self.zeroed else torch.empty)(self.shape, dtype=self.dtype, device=device)


class Launch(NamedTuple):
    """One launch, without its pointers."""

    compiled: Any
    """what Triton compiled"""
    programs: int
    places: tuple[int, ...]
    """which tensors it takes; in every kernel they come first"""
    rest: tuple[object, ...]
    """its other arguments"""
    aside: bool
    """whether it may run beside the launches that follow, until one that waits"""
    waits: bool
    """whether it needs what was launched aside"""


class Side:
    """A second stream of a device, for what may run beside the launches on the current one, and goes first where both are ready."""

    def __init__(self, index: int) -> None:
        self.index, self.stream = index, torch.cuda.Stream(index, priority=-1)
        self.handle: int = self.stream.cuda_stream
        self.begun, self.done = torch.cuda.Event(), torch.cuda.Event()

    def fork(self) -> None:
        """What follows here waits for what was launched on the current stream."""
        self.begun.record(torch.cuda.current_stream(self.index))
        self.stream.wait_event(self.begun)

    def join(self) -> None:
        """What follows on the current stream waits for what was launched here."""
        self.done.record(self.stream)
        torch.cuda.current_stream(self.index).wait_event(self.done)


@lru_cache(maxsize=64)
def side_of(index: int, stream: int) -> Side:
    """The second stream of a stream: one each, so that calls on different streams do not wait for each other."""
    return Side(index)


class Program:
    """The launches of one call, with places for pointers: first of the inputs, then of results, last of what only the launches need.

    `results` are places of what the call returns: inputs and all of `made`. Of those the first `own` are always tensors of their own.
    """

    def __init__(
        self,
        device: torch.device,
        inputs: int,
        made: Sequence[Buffer],
        scratch: Sequence[Buffer],
        launches: Sequence[Launch],
        results: Sequence[int],
        own: int,
    ) -> None:
        assert not any(x.zeroed for x in made[own:]), "what is packed is not zeroed"
        self.device, self.made, self.results, self.own = device, made, results, own
        self.index = -1 if device.index is None else device.index
        self.zeroed = [x for x in scratch if x.zeroed]
        pieces = [
            Piece(x.bytes, frozenset(j for j, launch in enumerate(launches) if i in launch.places))
            for i, x in enumerate([*made, *scratch], inputs)
        ]
        pieces, hosts = pieces[own : len(pieces) - len(self.zeroed)], [] if any(x.zeroed for x in made[:own]) else pieces[:own]
        steps, kept = [Step(x.aside, x.waits) for x in launches], len(made) - own
        packed = apart(pieces[:kept])
        self.packed, self.packed_bytes = [at for _, at in packed.places], packed.bytes
        self.scratch = shared(pieces[kept:], hosts, steps)
        """of what only the launches need"""
        self.spare = shared(pieces, hosts, steps)
        """the same where only the `own` results are kept, with the other results"""
        self.workspace = self.spare.bytes + sum(x.bytes for x in self.zeroed)
        """bytes beyond inputs and output of a call without gradients"""
        self.launches = launches
        self.calls = [(*_entry(x.compiled), x.programs, _taker(x.places), x.rest) for x in launches]
        asides = [x.aside for x in launches]
        self.fork = asides.index(True) if True in asides else len(asides)
        """the first launch aside"""

    def tensors(self, *inputs: Tensor) -> list[Tensor]:
        """Run; every result is a tensor of its own."""
        every, scratch = [*inputs, *(x.on(self.device) for x in self.made)], self._bytes(self.scratch.bytes)
        pointers = [x.data_ptr() for x in every]
        bases = [*pointers[len(inputs) : len(inputs) + self.own], scratch.data_ptr()]
        self._launch(pointers + [bases[host] + at for host, at in self.scratch.places])
        return [every[i] for i in self.results]

    def packed_results(self, pointers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Run on inputs at `pointers`: the `own` results, and the others in one buffer, which `unpack` takes apart."""
        own, pack, scratch = self._own(), self._bytes(self.packed_bytes), self._bytes(self.scratch.bytes)
        base, bases = pack.data_ptr(), [*[x.data_ptr() for x in own], scratch.data_ptr()]
        packed, places = [base + at for at in self.packed], self.scratch.places
        self._launch([*pointers, *bases[:-1], *packed, *[bases[host] + at for host, at in places]])
        return own, pack

    def own_results(self, pointers: Sequence[int]) -> list[Tensor]:
        """Run on inputs at `pointers`; the `own` results alone are kept."""
        own, buffer = self._own(), self._bytes(self.spare.bytes)
        bases = [*[x.data_ptr() for x in own], buffer.data_ptr()]
        self._launch([*pointers, *bases[:-1], *[bases[host] + at for host, at in self.spare.places]])
        return own

    def unpack(self, pack: Tensor) -> list[Tensor]:
        """The results in the buffer of `packed_results`, as tensors."""
        items = zip(self.packed, self.made[self.own :], strict=True)
        return [pack[start : start + x.bytes].view(x.dtype).view(x.shape) for start, x in items]

    def _own(self) -> list[Tensor]:
        return [x.on(self.device) for x in self.made[: self.own]]

    def _bytes(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _launch(self, pointers: list[int]) -> None:
        zeroed = [x.on(self.device) for x in self.zeroed]  # alive until all is launched
        pointers += [x.data_ptr() for x in zeroed]
        if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            for x in self.launches:  # a profiler wants to be told what Triton tells
                x.compiled[(x.programs, 1, 1)](*[pointers[i] for i in x.places], *x.rest)
            return
        stream = driver.active.get_current_stream(self.index)
        # what a profiler sees is to be each kernel's own time
        calls = self.calls if torch._C._autograd._profiler_enabled() else self.calls[: self.fork]
        for call, head, programs, take, rest in calls:
            call(programs, 1, 1, stream, *head, *take(pointers), *rest)
        if len(calls) < len(self.calls):
            self._forked(pointers, stream, side_of(self.index, stream))

    def _forked(self, pointers: list[int], stream: int, side: Side) -> None:
        """The launches from the first that is aside."""
        side.fork()
        for x, (call, head, programs, take, rest) in zip(self.launches[self.fork :], self.calls[self.fork :], strict=True):
            if x.waits:
                side.join()
            call(programs, 1, 1, side.handle if x.aside else stream, *head, *take(pointers), *rest)


def _taker(places: tuple[int, ...]) -> Callable[[list[int]], tuple[int, ...]]:
    """Picks those places of a list."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1))


def _entry(compiled: Any) -> tuple[Any, tuple[object, ...]]:
    """(function, its arguments between the stream and those of the kernel): Triton's launcher, or what it would call."""
    run, nothing = compiled.run, (None, None, None)
    if all(hasattr(run, name) for name in _C_LAUNCHER) and not run.global_scratch_size and not run.profile_scratch_size:
        head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, *nothing)
        return run.launch, head
    return run, (compiled.function, compiled.packed_metadata, *nothing)
