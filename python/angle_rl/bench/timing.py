"""How operations are timed: chunks of calls, round robin over the libraries, medians over the rounds."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

Clock = Callable[[int], float]
"""Runs an operation that many times and returns the seconds taken."""


@contextmanager
def one_setting(threads: int) -> Iterator[None]:
    """No garbage collection, torch on ``threads`` threads and cores; all put back afterwards."""
    collecting, torch_threads = gc.isenabled(), torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    gc.collect()
    gc.disable()
    torch.set_num_threads(threads)
    if cores is not None:
        os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(torch_threads)
        if collecting:
            gc.enable()


def clock(call: Callable[[], object]) -> Clock:
    """The clock of a Python call. Its loop adds about 0.02 us a call."""

    def run(iterations: int) -> float:
        start = time.perf_counter()
        for _ in itertools.repeat(None, iterations):
            call()
        return time.perf_counter() - start

    return run


def calibrate(run: Clock, seconds: float, multiple: int = 1) -> int:
    """Iterations, a multiple of ``multiple``, that take about ``seconds``. Warms the operation up."""
    run(multiple)
    iterations = multiple
    while True:
        taken = run(iterations)
        if taken >= seconds / 4 or iterations >= 1 << 22:
            rounds = max(1, round(iterations * seconds / max(taken, 1e-9) / multiple))
            return rounds * multiple
        iterations *= 4 if taken * 8 < seconds else 2


def round_robin(clocks: Sequence[Clock], *, repeats: int, seconds: float, multiple: int = 1) -> list[list[float]]:
    """Microseconds a call of each clock, once per round; the clocks take turns within a round.

    ``seconds`` is what one turn should take. A turn begins with a few unmeasured calls, since the library
    before it has left its own data in the caches.
    """
    iterations = [calibrate(run, seconds, multiple) for run in clocks]
    taken: list[list[float]] = [[] for _ in clocks]
    for _ in range(repeats):
        for run, count, times in zip(clocks, iterations, taken, strict=True):
            run(multiple * max(1, count // (20 * multiple)))
            times.append(run(count) / count * 1e6)
    return taken


def race(calls: Sequence[Callable[[], object]], seconds: float) -> list[npt.NDArray[np.float64]]:
    """Runs each call over and over in a thread of its own, all at the same time, for ``seconds``, at least once.

    Returns every call's microseconds, a thread's calls in order: from the end of one to the end of the next, so what
    the loop itself costs (0.1 us) and every wait for the interpreter's lock are in them. Raises what a call raised.
    """
    running = [True]
    failed = threading.Event()
    start = threading.Barrier(len(calls))
    ends: list[list[int]] = [[] for _ in calls]
    failures: list[BaseException] = []

    def drive(call: Callable[[], object], noted: list[int]) -> None:
        now, note = time.perf_counter_ns, noted.append
        try:
            start.wait()
            note(now())
            while True:
                call()
                note(now())
                if not running:  # asked last: a busy system may let a thread on only now
                    break
        except BaseException as failure:
            failures.append(failure)
            failed.set()

    threads = [threading.Thread(target=drive, args=pair) for pair in zip(calls, ends, strict=True)]
    for thread in threads:
        thread.start()
    failed.wait(seconds)
    running.clear()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [np.diff(np.array(noted, dtype=np.float64)) / 1e3 for noted in ends]
