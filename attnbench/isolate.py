"""One worker process that runs cells, replaced after a fault, an out-of-memory or a hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess


_START_S = 300


class WorkerDiedError(Exception):
    """The worker process ended without an answer. The message says how, with the last line that it printed."""


class WorkerHungError(Exception):
    """The worker did not answer in time, and was killed."""


@dataclass(frozen=True)
class Progress:
    """How far a job is, told before it replies."""

    done: int
    total: int
    text: str = ""
    kept: int = 0
    """of what is done, what would outlive the process"""
    gained: bool = False
    """whether this process has added to that"""


_PARENT: list[Connection] = []
"""in a worker, the way to the process that started it"""


def report(progress: Progress) -> None:
    """Tell the parent how far the running job is; does nothing in a process that is no worker. A worker without a parent ends here."""
    for parent in _PARENT:
        try:
            parent.send(progress)
        except OSError:
            os._exit(1)


@dataclass(frozen=True)
class Reply:
    """What a job returned, and whether the worker may run another."""

    value: Any
    reusable: bool = True


@dataclass
class Worker:
    """A spawned process that runs `job(message) -> Reply` for each message; started when first needed, and again after it is lost.

    `setup(*arguments)` runs once in each new process and returns the job. Both must be importable.
    """

    setup: Callable[..., Callable[[Any], Reply]]
    arguments: tuple[Any, ...] = ()
    starts: int = 0
    """processes started so far"""
    _process: SpawnProcess | None = field(default=None, repr=False)
    _pipe: Connection | None = field(default=None, repr=False)
    _log: Path | None = field(default=None, repr=False)
    _ending: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def run(self, message: Any, timeout_s: float, hear: Callable[[Progress], None] = lambda _: None) -> Any:
        """The job's value; `hear` is called with what it reports on the way.

        Raises `WorkerHungError` after `timeout_s`, `WorkerDiedError` where the process ends. Either way the next message goes to a new
        process.
        """
        pipe = self._ensure()
        try:
            pipe.send(message)
            reply = self._answer(pipe, timeout_s, hear)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise WorkerDiedError(self._epitaph()) from None
        except OSError:
            if self._pipe is pipe:
                raise
            raise WorkerDiedError("worker stopped") from None  # by another thread, which closed the pipe
        except KeyboardInterrupt:
            self.stop()
            raise
        if not reply.reusable:
            self.stop()
        return reply.value

    def _answer(self, pipe: Connection, timeout_s: float, hear: Callable[[Progress], None]) -> Reply:
        end = time.monotonic() + timeout_s
        while pipe.poll(max(0.0, end - time.monotonic())):
            heard: Reply | Progress = pipe.recv()
            if isinstance(heard, Reply):
                return heard
            hear(heard)
        self.stop()
        raise WorkerHungError(f"no answer within {timeout_s:g} s")

    def _ensure(self) -> Connection:
        if self._pipe is None:
            with self._ending, _uninterrupted():  # who stops it meanwhile waits until there is a process to end
                pipe = self._start()
            self._await_ready(pipe)
            return pipe
        return self._pipe

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        handle, name = tempfile.mkstemp(prefix="attnbench-worker-", suffix=".log")
        os.close(handle)
        process = context.Process(target=_serve, args=(theirs, self.setup, self.arguments, name), daemon=True)
        process.start()
        theirs.close()
        self._process, self._pipe, self._log = process, pipe, Path(name)
        self.starts += 1
        return pipe

    def _await_ready(self, pipe: Connection) -> None:
        """Wait until the process has imported what it needs, so that a cell's time is its own."""
        try:
            if not pipe.poll(_START_S):
                self.stop()
                raise WorkerHungError(f"worker did not start within {_START_S} s")
            pipe.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerDiedError(self._epitaph()) from None
        except OSError:
            raise WorkerDiedError("worker stopped") from None  # by another thread, which closed the pipe

    def _epitaph(self) -> str:
        with self._ending:
            if self._process is None:
                return "worker stopped"
            self._process.join(10)
            code = self._process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()] if self._log else []
        self.stop()
        return f"worker {how}" + (f": {lines[-1].strip()[:300]}" if lines else "")

    def stop(self) -> None:
        """End the process, at once. Any thread may; one that waits for an answer then raises `WorkerDiedError`."""
        with self._ending:
            process, pipe, log = self._process, self._pipe, self._log
            self._process = self._pipe = self._log = None
        if process is not None:
            process.kill()
            process.join()
        if pipe is not None:
            pipe.close()
        if log is not None:
            log.unlink(missing_ok=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold interrupts of this thread back; a process started meanwhile inherits that, and is not interrupted while it imports."""
    ensure_running()  # else starting a process does it, which lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, setup: Callable[..., Callable[[Any], Reply]], arguments: tuple[Any, ...], log: str) -> None:
    """The worker's main loop. Its output goes to `log`; interrupts are the parent's business."""
    _PARENT.append(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Path(log).open("a") as f:
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    job = setup(*arguments)
    pipe.send(Reply("ready"))
    with contextlib.suppress(EOFError):
        while True:
            reply = job(pipe.recv())
            sys.stdout.flush()
            pipe.send(reply)
            if not reply.reusable:
                break


def limit_host_memory(share: float = 0.9) -> None:
    """Let this process take at most a share of the memory that is free, so that asking for more raises instead of killing."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) << 10
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(share * free), resource.RLIM_INFINITY))
