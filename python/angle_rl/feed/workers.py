"""What became of the environments of a vector when one raised or its process died, and how to close the rest."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

_PATIENCE = 10.0  # seconds that a worker has to say why it failed, or to close


class VectorEnvironmentError(RuntimeError):
    """One environment of a vector raised, or its process died; all of them have been closed.

    ``index``: which one. What it raised is in the message, and is the cause where it was raised in this process.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class ErrorQueue:
    """An AsyncVectorEnv's queue of errors that remembers what was taken from it, and does not wait for ever: an
    exception that cannot be pickled never arrives, and another cannot be put together again from its message.
    """

    def __init__(self, errors: Any) -> None:
        self._errors = errors
        self.taken: list[tuple[int, type[BaseException], Any]] = []
        self.lost = False  # whether one did not arrive whole

    def get(self) -> Any:
        """The next error: environment, exception type, exception, traceback's text. Raises queue.Empty after 10 s,
        and what unpickling it raises.
        """
        try:
            index, kind, value, trace = self._errors.get(timeout=_PATIENCE)
        except Exception:
            self.lost = True
            raise
        self.taken.append((index, kind, value))
        return index, kind, value, trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._errors, name)


def watch(environment: VectorEnv[Any, Any, Any]) -> None:
    """Prepare a vector environment for `failure`."""
    inner: Any = environment.unwrapped
    if isinstance(inner, AsyncVectorEnv) and not isinstance(inner.error_queue, ErrorQueue):
        errors: Any = ErrorQueue(inner.error_queue)
        inner.error_queue = errors


def failure(environment: VectorEnv[Any, Any, Any], name: str, error: BaseException) -> VectorEnvironmentError | None:
    """What ``error``, raised by a call of a watched ``environment``, says of one of its environments, and the
    others closed; None, and nothing closed, where it is about none of them.
    """
    inner: Any = environment.unwrapped
    found: tuple[int, str] | None = None
    if isinstance(inner, AsyncVectorEnv):
        found = _raised_in_worker(inner) or _died(inner, error)
    elif isinstance(inner, SyncVectorEnv) and isinstance(error, Exception):
        index = _raised_here(inner, error)
        found = None if index is None else (index, _raised(type(error), error))
    if found is None:
        return None
    close(environment)
    return VectorEnvironmentError(f"environment {found[0]} of {name} {found[1]}; all of them were closed", found[0])


def close(environment: VectorEnv[Any, Any, Any]) -> None:
    """Close a vector environment so that no process is left, whatever state its workers are in."""
    inner: Any = environment.unwrapped
    if not isinstance(inner, AsyncVectorEnv):
        environment.close()
        return
    if not inner.closed:
        _end_workers(inner)
        inner.closed = True
    environment.close()


def in_worker(make: Callable[[], Any]) -> Callable[[], Any]:
    """``make`` for an AsyncVectorEnv: in its process Ctrl-C is left to the parent, which ends the run in order."""

    def made() -> Any:
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return make()

    return made


def _raised(kind: type[BaseException], value: Any) -> str:
    return f"raised {kind.__name__}: {value}"


def _raised_in_worker(inner: Any) -> tuple[int, str] | None:
    taken = inner.error_queue.taken
    if not taken:
        return None
    (index, kind, value), others = taken[0], [str(entry[0]) for entry in taken[1:]]
    return index, _raised(kind, value) + (f" (and so did {', '.join(others)})" if others else "")


def _died(inner: Any, error: BaseException) -> tuple[int, str] | None:
    """The first worker whose process has ended. It may take a moment from the broken pipe to the end."""
    lost = inner.error_queue.lost
    if not lost and not isinstance(error, (EOFError, OSError)):
        return None
    deadline = time.monotonic() + _PATIENCE
    while not (ended := [(i, p.exitcode) for i, p in enumerate(inner.processes) if p.exitcode is not None]):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    index, code = ended[0]
    if lost:
        return index, "raised an error that cannot be sent between processes"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return index, f"died: its process {how}"


def _raised_here(inner: Any, error: Exception) -> int | None:
    """The environment in whose method the error arose, found by the frames that it passed."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        first = trace.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        for index, environment in enumerate(inner.envs):
            if first is environment:
                return index
        trace = trace.tb_next
    return None


def _end_workers(inner: Any) -> None:
    """Ask the workers to close, read what they still send, and end those that do not."""
    deadline = time.monotonic() + _PATIENCE

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    pipes = [pipe for pipe in inner.parent_pipes if pipe is not None and not pipe.closed]
    for pipe in pipes:
        with suppress(OSError):
            pipe.send(("close", None))
    for pipe in pipes:
        with suppress(Exception):  # the pipe of one that died
            while pipe.poll(left()):
                pipe.recv()
        pipe.close()
    for process in inner.processes:
        for end in (process.terminate, process.kill):
            process.join(left())
            if process.is_alive():
                end()
                deadline = time.monotonic() + 1.0
        process.join()
