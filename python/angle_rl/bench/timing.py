"""How operations are timed: chunks of calls, round robin over the libraries, medians over the rounds."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Race:
    """What two threads did to one buffer at the same time; microseconds a call, and every call's."""

    insert_us: float
    cycle_us: float
    insert_calls_us: list[float]
    cycle_calls_us: list[float]


def race(insert: Callable[[], object], learn: Callable[[], object], seconds: float) -> Race:
    """Runs ``insert`` in one thread and ``learn`` in another for ``seconds``. Raises what either raised."""
    stop = threading.Event()
    start = threading.Barrier(2)
    inserted: list[int] = []
    learned: list[int] = []
    failures: list[BaseException] = []

    def drive(call: Callable[[], object], ends: list[int]) -> None:
        now, stopped = time.perf_counter_ns, stop.is_set
        try:
            start.wait()
            ends.append(now())
            while not stopped():
                call()
                ends.append(now())
        except BaseException as failure:
            failures.append(failure)
            stop.set()

    threads = [
        threading.Thread(target=drive, args=(insert, inserted)),
        threading.Thread(target=drive, args=(learn, learned)),
    ]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    insert_calls = [(end - begin) / 1e3 for begin, end in itertools.pairwise(inserted)]
    cycle_calls = [(end - begin) / 1e3 for begin, end in itertools.pairwise(learned)]
    if not insert_calls or not cycle_calls:
        raise RuntimeError(f"one of two threads made no call within {seconds} s; give the race more time")
    return Race(
        insert_us=sum(insert_calls) / len(insert_calls),
        cycle_us=sum(cycle_calls) / len(cycle_calls),
        insert_calls_us=insert_calls,
        cycle_calls_us=cycle_calls,
    )
