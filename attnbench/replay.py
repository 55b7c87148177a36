"""Work that is done again and again on a GPU, replayed from a CUDA graph where it can be: small models are bound by their launches.

The first calls run as they are, on the stream that the graph is then captured on, so that kernels compile and caches fill. One of them
runs where waiting for the device is an error: work that waits cannot be captured, and is found out before a capture could fail.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Work = Callable[[], None]

WARM = 3
"""calls before the capture; the last of them is the one that may not wait"""


class Replayed:
    """Calls of `work` on a stream of its own, captured after `WARM` of them; `note` says why not, where they are not.

    `work` reads and writes the same tensors in every call. On the CPU, and where `why_not` gives a reason, it is just called. Work `beside`
    other work takes turns with it, on its stream and in the memory of its graph; what it leaves behind is read before the other goes on.
    """

    def __init__(self, work: Work, device: str, why_not: str = "", beside: Replayed | None = None) -> None:
        self.work, self.note, self.beside = work, why_not, beside
        self.on_gpu = device != "cpu"
        self.stream: Any = beside.stream if beside else torch.cuda.Stream() if self.on_gpu else None
        self.graph: Any = None
        self.calls = 0

    @property
    def settled(self) -> bool:
        """Whether calls to come are like the last."""
        return not self.on_gpu or self.graph is not None or bool(self.note)

    def __call__(self) -> None:
        """Work once; on a GPU it is queued on the stream."""
        self.calls += 1
        if not self.on_gpu:
            self.work()
            return
        with self.on_stream():
            if self.calls == WARM and not self.note:
                self._call_without_waiting()
                return
            if self.calls == WARM + 1 and not self.note:
                self._capture()
            self.work() if self.graph is None else self.graph.replay()

    def on_stream(self) -> AbstractContextManager[Any]:
        """Queue work of others on the same stream, after all that was queued on the one that is current."""
        if not self.on_gpu:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def give_up(self, why: str) -> None:
        """Run as it is from now on."""
        self.graph, self.note = None, f"not captured in a CUDA graph: {why.strip().splitlines()[0][:200] if why.strip() else 'unknown'}"

    def wait(self) -> None:
        """Until all that is queued is done."""
        if self.on_gpu:
            self.stream.synchronize()

    def _call_without_waiting(self) -> None:
        """One call that ends where the host would wait for the device, and is then made again as it is."""
        try:
            with _waiting_is_an_error():
                self.work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.give_up(str(error))
            self.work()

    def _capture(self) -> None:
        try:
            self.graph = _captured(self.work, self.stream, self.beside.graph.pool() if self.beside and self.beside.graph else None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.give_up(str(error))


def _captured(work: Work, stream: Any, pool: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    # other threads may go on to pin memory and to copy
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


class _waiting_is_an_error(AbstractContextManager[None]):  # noqa: N801 (read as words)
    def __enter__(self) -> None:
        self.before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode(self.before)
