"""One buffer, threads that insert and threads that learn at the same time: native ones and Python's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from angle_rl import _core
from angle_rl.bench.libraries import Angle, Library
from angle_rl.bench.replay_cases import Settings, inserting
from angle_rl.bench.report import FLOOR, Row, summarize
from angle_rl.bench.rows import HALFCHEETAH, check_rows
from angle_rl.bench.timing import one_setting, race, round_robin

INSERT, CYCLE = "insert", "cycle"
WARM = 20  # unmeasured calls before a race: peers compile and import at their first ones


def learning(library: Library, batch: int, *, out: bool = False) -> Callable[[], object]:
    """A call that samples a batch, into the tensors of the one before where ``out``, and updates its priorities."""
    errors = library.ready_errors(np.random.default_rng(2).exponential(size=batch).astype(np.float32))
    update, handles = library.update, library.handles
    if out:
        assert isinstance(library, Angle)
        return partial(_learn, library.sample_out, update, handles, batch, errors)
    return partial(_learn, library.sample, update, handles, batch, errors)


def _learn(sample: Any, update: Any, handles: Any, batch: int, errors: Any) -> None:
    update(handles(sample(batch)), errors)


def size_of(operation: str, batch: int) -> int:
    """Rows that a call of this operation touches."""
    return 1 if operation.endswith(INSERT) else batch


def floor_rows(floor: Any, inserts: Sequence[str], cycles: Sequence[str], settings: Settings) -> list[Row]:
    """The floor's insertions and cycles, by one thread alone, under each of these names."""
    batch = settings.batches[0]
    runs = [partial(floor.insert, 1), partial(floor.learn, batch)]
    times = round_robin(runs, repeats=settings.repeats, seconds=settings.seconds)
    return [
        summarize(
            FLOOR,
            operation,
            taken,
            capacity=settings.capacity,
            batch=size,
            threads=1,
            per_second=round(1e6 / float(np.median(taken))),
        )
        for names, size, taken in zip((inserts, cycles), (1, batch), times, strict=True)
        for operation in names
    ]


def side_row(
    library: str, operation: str, sides: Sequence[Mapping[str, float]], threads: int, settings: Settings
) -> Row:
    """The row of one operation from what ``_core.Replay.race`` said of it in each round; of p99.9 the median."""
    return summarize(
        library,
        operation,
        [side["mean_us"] for side in sides],
        capacity=settings.capacity,
        batch=size_of(operation, settings.batches[0]),
        threads=threads,
        p999_us=float(np.median([side["p999_us"] for side in sides])),
        per_second=round(float(np.median([side["per_second"] for side in sides]))),
    )


def native_rows(library: Angle, settings: Settings) -> list[Row]:
    """``native_insert`` and ``native_cycle``: threads without an interpreter, alone and one of each.

    The race itself holds sampled rows against their numbers and raises RuntimeError where they are not whole.
    """
    lanes = {(1, 0): 1, (0, 1): 1, (1, 1): 2}
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(settings.repeats):
        for (inserters, learners), threads in lanes.items():
            options = _core.RaceOptions(
                inserters=inserters,
                learners=learners,
                batch=settings.batches[0],
                seconds=settings.race_seconds,
                first_row=settings.capacity,
            )
            result = library.buffer._core.race(options)
            for operation, side, taking_part in ((INSERT, "inserts", inserters), (CYCLE, "cycles", learners)):
                if taking_part:
                    found.setdefault((f"native_{operation}", threads), []).append(result[side])
    return [side_row("angle", operation, sides, threads, settings) for (operation, threads), sides in found.items()]


def python_rows(libraries: Sequence[Library], settings: Settings) -> list[Row]:
    """``concurrent_insert`` and ``concurrent_cycle``: one Python thread inserts row after row while another samples and
    updates, and each alone. ``concurrent_cycle_out``, ours only: the learner samples into the same tensors again.

    The microseconds are each round's mean; ``p999_us`` is the slowest call in a thousand of all rounds.
    """
    batch = settings.batches[0]
    means: dict[tuple[str, str, int], list[float]] = {}
    calls: dict[tuple[str, str, int], list[np.ndarray[Any, np.dtype[np.float64]]]] = {}

    def run(library: Library, work: Mapping[str, Callable[[], object]], noted: Sequence[str]) -> None:
        for call in work.values():
            for _ in range(WARM):
                call()
        taken = race(list(work.values()), settings.race_seconds)
        for operation, each in zip(work, taken, strict=True):
            if operation in noted:
                place = (library.name, f"concurrent_{operation}", len(work))
                means.setdefault(place, []).append(float(each.mean()))
                calls.setdefault(place, []).append(each)
        check_rows(library.arrays(library.sample(batch)), library.name)

    for _ in range(settings.repeats):
        for library in libraries:
            insert, learn = inserting(library, settings.capacity), learning(library, batch)
            run(library, {INSERT: insert}, [INSERT])
            run(library, {CYCLE: learn}, [CYCLE])
            run(library, {INSERT: insert, CYCLE: learn}, [INSERT, CYCLE])
            if isinstance(library, Angle):
                into = learning(library, batch, out=True)
                run(library, {f"{CYCLE}_out": into}, [f"{CYCLE}_out"])
                run(library, {INSERT: insert, f"{CYCLE}_out": into}, [f"{CYCLE}_out"])
    return [
        summarize(
            name,
            operation,
            times,
            capacity=settings.capacity,
            batch=size_of(operation, batch),
            threads=threads,
            p999_us=float(np.quantile(np.concatenate(calls[name, operation, threads]), 0.999)),
            per_second=round(1e6 / float(np.median(times))),
        )
        for (name, operation, threads), times in means.items()
    ]


def thread_rows(libraries: Sequence[Library], settings: Settings) -> list[Row]:
    """Native and Python threads, 1 and 2 of them, over the floor. ``libraries`` hold ``settings.capacity`` rows."""
    ours = next(library for library in libraries if isinstance(library, Angle) and library.prioritized)
    assert ours.shape == HALFCHEETAH
    with one_setting(1):
        rows = floor_rows(
            _core.ReplayFloor(settings.capacity, 1),
            ("native_insert", "concurrent_insert"),
            ("native_cycle", "concurrent_cycle", "concurrent_cycle_out"),
            settings,
        )
    with one_setting(2):
        rows += native_rows(ours, settings)
        rows += python_rows([library for library in libraries if library.prioritized], settings)
    return rows
