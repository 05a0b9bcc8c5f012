"""One shared buffer, processes that insert and processes that learn at the same time."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from angle_rl import _core
from angle_rl.bench.libraries import Angle
from angle_rl.bench.peers import in_short
from angle_rl.bench.replay_cases import Settings, inserting
from angle_rl.bench.replay_checks import fill
from angle_rl.bench.replay_race import CYCLE, INSERT, floor_rows, learning, side_row
from angle_rl.bench.report import Row
from angle_rl.bench.rows import check_rows
from angle_rl.bench.timing import one_setting, race

LOOPS = ("native", "python")  # what runs a worker's loop
PLANS: tuple[tuple[str, ...], ...] = (
    (INSERT,),
    (CYCLE,),
    (INSERT, CYCLE),
    (INSERT, INSERT, CYCLE, CYCLE),
)  # what the processes of one race do
WORKERS = max(map(len, PLANS))
START = 60.0  # seconds that a worker may take to start
LEAD = 0.1  # seconds from a command to its common start


def _operation(loop: str, work: str) -> str:
    return f"process_native_{work}" if loop == "native" else f"process_{work}"


def _native(library: Angle, work: str, number: int, batch: int, seconds: float) -> dict[str, float]:
    options = _core.RaceOptions(
        inserters=int(work == INSERT),
        learners=int(work == CYCLE),
        batch=batch,
        seconds=seconds,
        first_row=library.buffer.capacity,
        first_stream=number,
    )
    found = library.buffer._core.race(options)
    side: dict[str, float] = found["inserts" if work == INSERT else "cycles"]
    return side


def _python(library: Angle, work: str, batch: int, seconds: float) -> dict[str, float]:
    call = inserting(library, library.buffer.capacity) if work == INSERT else learning(library, batch)
    taken = race([call], seconds)[0]
    check_rows(library.arrays(library.sample(batch)), "angle in another process")
    mean = float(taken.mean())
    return {"mean_us": mean, "per_second": 1e6 / mean, "p999_us": float(np.quantile(taken, 0.999))}


def serve(buffer: Any, number: int, batch: int, pipe: Connection) -> None:
    """A worker: answers each command (loop, work, start, seconds) until it reads None. Its rows have a stream of their
    own.
    """
    library = Angle.around(buffer, stream=number)
    gc.disable()
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        loop, work, start, seconds = command
        try:
            time.sleep(max(0.0, start - time.monotonic()))
            if loop == "native":
                answer: Any = _native(library, work, number, batch, seconds)
            else:
                answer = _python(library, work, batch, seconds)
        except Exception:
            answer = traceback.format_exc()
        pipe.send(answer)


def _answer(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return "it ended without an answer"


class Workers:
    """Processes that were started on one shared buffer and wait for commands."""

    def __init__(self, buffer: Any, batch: int, count: int) -> None:
        """Starts them afresh (no fork, since torch may hold locks). RuntimeError when one does not come up."""
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(buffer, number, batch, theirs), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
            for pipe in self.pipes:
                if not pipe.poll(START) or pipe.recv() != "ready":
                    raise RuntimeError("a process did not start")
        except EOFError:
            self.close()
            raise RuntimeError("a process ended while it was starting") from None
        except BaseException:
            self.close()
            raise

    def run(self, loop: str, plan: Sequence[str], seconds: float) -> list[dict[str, float]]:
        """What the processes of a plan measured. RuntimeError with a worker's traceback when one failed."""
        start = time.monotonic() + LEAD
        for pipe, work in zip(self.pipes, plan, strict=False):
            pipe.send((loop, work, start, seconds))
        answers = [_answer(pipe) for pipe in self.pipes[: len(plan)]]
        for answer in answers:
            if not isinstance(answer, dict):
                raise RuntimeError(f"a process of the race failed: {answer}")
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.pipes:
            pipe.close()


def _together(sides: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "mean_us": float(np.mean([side["mean_us"] for side in sides])),
        "per_second": sum(side["per_second"] for side in sides),
        "p999_us": max(side["p999_us"] for side in sides),
    }


def process_rows(settings: Settings) -> tuple[list[Row], list[str]]:
    """``process_insert`` and ``process_cycle`` by 1, 2 and 4 processes on one shared buffer, half of them inserting.

    The loops are Python's; those of ``process_native_insert`` and ``process_native_cycle`` are the native race's.
    ``threads`` counts processes, ``per_second`` is all of one kind together, ``p999_us`` the slowest process's. Rows,
    and a line where there are no shared buffers.
    """
    try:
        library = Angle(settings.capacity, shared=True)
    except (RuntimeError, OSError) as failure:
        return [], [f"processes on a shared buffer: {in_short(failure)}"]
    try:
        fill(library, settings.capacity)
        return _race_processes(library, settings), []
    finally:
        library.buffer.close()


def _race_processes(library: Angle, settings: Settings) -> list[Row]:
    batch = settings.batches[0]
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with one_setting(2):
        rows = floor_rows(
            _core.ReplayFloor(settings.capacity, 1),
            [_operation(loop, INSERT) for loop in LOOPS],
            [_operation(loop, CYCLE) for loop in LOOPS],
            settings,
        )
        workers = Workers(library.buffer, batch, WORKERS)
        try:
            for _ in range(settings.repeats):
                for loop in LOOPS:
                    for plan in PLANS:
                        sides = workers.run(loop, plan, settings.race_seconds)
                        for work in dict.fromkeys(plan):
                            parts = [side for side, its in zip(sides, plan, strict=True) if its == work]
                            found.setdefault((_operation(loop, work), len(plan)), []).append(_together(parts))
                        check_rows(library.arrays(library.sample(batch)), library.name)
        finally:
            workers.close()
    return rows + [side_row("angle", name, sides, count, settings) for (name, count), sides in found.items()]
