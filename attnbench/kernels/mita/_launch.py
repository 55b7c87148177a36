"""Launches without Triton's per-call argument analysis, which at short lengths takes longer than the kernels.

The first call of an operator with some key goes through Triton and is noted down, as a `Program`; later ones repeat it. Nothing is noted
under the interpreter, nor with a Triton whose launchers are not known here.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import triton

from ._program import Buffer, Launch, Program

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from torch import Tensor

_KNOWN = triton.__version__.startswith("3.6.")
_PROGRAMS: dict[Hashable, Program] = {}
MOST = 4096
"""programs kept; each holds references to kernels that Triton keeps anyway"""
_ALIGNMENT = 16
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def signature(*tensors: Tensor) -> Hashable:
    """What Triton's specialisation may see of a call's tensors; those allocated by the operator are always aligned."""
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() % _ALIGNMENT, x.device) for x in tensors])


def find(key: Hashable) -> Program | None:
    """The program noted under `key`, which holds the `signature` of the inputs and all else that the launches depend on."""
    return _PROGRAMS.get(key)


def forget() -> None:
    """Drop all programs."""
    _PROGRAMS.clear()


class Recorder:
    """Runs the launches of a call through Triton and notes them. Tensors are those in `inputs` or made by `empty` and `zeros`."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = tuple(x.detach() for x in inputs)
        """the same tensors, each an object of its own even where the caller gave one twice"""
        self.buffers: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, int, list[Tensor], tuple[object, ...], bool, bool]] = []
        self.complete, self.is_aside, self.waits = _KNOWN, False, False

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor that the call makes."""
        return self._made(torch.empty(shape, dtype=dtype, device=self.inputs[0].device), zeroed=False)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same, zeroed before the first launch."""
        return self._made(torch.zeros(shape, dtype=dtype, device=self.inputs[0].device), zeroed=True)

    def _made(self, x: Tensor, *, zeroed: bool) -> Tensor:
        self.buffers.append((x, zeroed))
        return x

    @contextmanager
    def aside(self, wanted: bool) -> Iterator[None]:
        """Launches within may run beside those that follow, until `join`. The first time they run in turn."""
        self.is_aside = wanted
        yield
        self.is_aside = False

    def join(self) -> None:
        """The next launch needs those aside."""
        self.waits = any(x[4] for x in self.launches)

    def __call__(self, kernel: Any, programs: int, *args: Any, **constants: object) -> None:
        """Launch `programs` programs of a Triton kernel; tensors come first, `constants` are compile-time arguments and options."""
        compiled = self.run(kernel, programs, args, constants)
        if not hasattr(compiled, "packed_metadata"):  # the interpreter compiles nothing
            self.complete = False
            return
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        assert all(x is y for x, y in zip(tensors, args, strict=False)), "tensors come first"
        rest = (*args[len(tensors) :], *(constants[name] for name in kernel.arg_names[len(args) :] if name not in _OPTIONS))
        self.launches.append((compiled, programs, tensors, rest, self.is_aside, self.waits))
        self.waits = False

    def run(self, kernel: Any, programs: int, args: Sequence[Any], constants: Mapping[str, object]) -> Any:
        """Launch through Triton; what it compiled."""
        return kernel[(programs,)](*args, **constants)

    def note(self, key: Hashable, results: Sequence[Tensor], own: int) -> None:
        """Keep what was launched as the program of `key`; see `Program` for `results` and `own`."""
        if not self.complete:
            return
        if len(_PROGRAMS) >= MOST:
            _PROGRAMS.clear()
        of = {id(x): zeroed for x, zeroed in self.buffers}
        made = [x for x in results if id(x) in of]
        scratch = sorted((x for x, _ in self.buffers if not any(x is y for y in made)), key=lambda x: of[id(x)])
        place = {id(x): i for i, x in enumerate([*self.inputs, *made, *scratch])}
        launches = [Launch(x, programs, tuple(place[id(t)] for t in tensors), *rest) for x, programs, tensors, *rest in self.launches]
        buffers = [[Buffer(tuple(x.shape), x.dtype, of[id(x)]) for x in group] for group in (made, scratch)]
        _PROGRAMS[key] = Program(self.inputs[0].device, len(self.inputs), *buffers, launches, [place[id(x)] for x in results], own)
