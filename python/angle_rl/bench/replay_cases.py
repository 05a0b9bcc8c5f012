"""The replay benchmark's operations, and how they are timed in turns."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from angle_rl import _core
from angle_rl.bench.libraries import Angle, Library
from angle_rl.bench.report import FLOOR, Row, summarize
from angle_rl.bench.rows import HALFCHEETAH, SMALL, Shape, make_rows
from angle_rl.bench.timing import Clock, clock, round_robin

INSERT_BATCH = 1024  # rows of one insert_batch call
POOL = 1024  # distinct rows that stand ready to be inserted
UPDATES = 256  # distinct batches of handles that the update walks through
FLOORS = {HALFCHEETAH: _core.ReplayFloor, SMALL: _core.SmallReplayFloor}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of this benchmark."""

    capacity: int  # rows a buffer of HalfCheetah rows holds, >= 1
    batches: tuple[int, ...]  # sampled rows a call, each >= 1; races and other sweeps take the first
    threads: int  # cores for the single-threaded operations, >= 1
    repeats: int  # rounds over the libraries, >= 1
    seconds: float  # length of one library's turn in a round
    race_seconds: float  # length of one race of threads or processes
    quick: bool = False  # small sizes throughout


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation of one library."""

    library: str
    operation: str
    batch: int
    run: Clock
    capacity: int
    rows: str = HALFCHEETAH.name
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # notes beside the figures: what sampling gives, and the like


def inserting(library: Library, capacity: int) -> Callable[[], object]:
    """A call that inserts one of POOL rows that stand ready."""
    rows = _pool(library, capacity)
    ready = itertools.cycle([library.ready_row(rows, index) for index in range(POOL)])
    insert = library.insert
    return lambda: insert(next(ready))


def _pool(library: Library, capacity: int) -> Any:
    return make_rows(np.arange(capacity, capacity + POOL, dtype=np.int64), library.shape)


def insert_cases(library: Library, capacity: int, extra: Mapping[str, Any] | None = None) -> list[Case]:
    """``insert``: one row. ``insert_batch``: 1024 rows."""
    many = library.ready_rows(_pool(library, capacity))
    insert_many = library.insert_many
    case = partial(Case, library=library.name, capacity=capacity, rows=library.shape.name, extra=extra or {})
    return [
        case(operation="insert", batch=1, run=clock(inserting(library, capacity))),
        case(operation="insert_batch", batch=INSERT_BATCH, run=clock(lambda: insert_many(many))),
    ]


def updating(library: Library, batch: int, errors: Iterator[Any]) -> Clock:
    """The clock of new priorities for rows of earlier batches, which are drawn when it first runs.

    So no insertion of another operation comes between: ours would refuse rows that have been overwritten, and refusing
    costs less than updating. RuntimeError when it refuses any all the same.
    """
    update, handles = library.update, library.handles
    known: list[Any] = []

    def run(iterations: int) -> float:
        if not known:  # copied, since a peer may hand out a view of memory that its next sample overwrites or frees
            known.extend(copy.deepcopy(handles(library.sample(batch))) for _ in range(max(4, UPDATES * 256 // batch)))
        batches = itertools.cycle(known)
        seconds = clock(lambda: update(next(batches), next(errors)))(iterations)
        if isinstance(library, Angle):
            refused = sum(library.buffer.update_priorities(each, next(errors)) for each in known)
            if refused:
                raise RuntimeError(f"{library.name}: {refused} priorities were refused; their rows are gone")
        return seconds

    return run


def prioritized_cases(library: Library, capacity: int, batch: int) -> list[Case]:
    """``sample``, ``update`` of random rows, and ``cycle``: insert 1, sample, update the sampled rows."""
    generator = np.random.default_rng(1)
    errors = itertools.cycle(
        [
            library.ready_errors(generator.exponential(size=batch).astype(np.float32))
            for _ in range(max(4, 4096 // batch))
        ]
    )
    sample, update, handles = library.sample, library.update, library.handles
    insert = inserting(library, capacity)

    def cycle() -> None:
        insert()
        update(handles(sample(batch)), next(errors))

    gives = {"gives": library.gives}
    case = partial(Case, library=library.name, batch=batch, capacity=capacity, rows=library.shape.name)
    cases = [
        case(operation="update", run=updating(library, batch, errors)),
        case(operation="sample", run=clock(lambda: sample(batch)), extra=gives),
        case(operation="cycle", run=clock(cycle)),
    ]
    if isinstance(library, Angle):
        sample_out = library.sample_out
        cases.append(case(operation="sample_out", run=clock(lambda: sample_out(batch)), extra=gives))
    return cases


def uniform_case(library: Library, capacity: int, batch: int) -> Case:
    """``uniform_sample``."""
    return Case(
        library=library.name,
        operation="uniform_sample",
        batch=batch,
        run=clock(partial(library.sample, batch)),
        capacity=capacity,
        rows=library.shape.name,
        extra={"gives": library.gives},
    )


def floor_inserts(floor: Any, capacity: int, shape: Shape = HALFCHEETAH) -> list[Case]:
    """The floor's insertions."""
    case = partial(Case, library=FLOOR, capacity=capacity, rows=shape.name, extra={"bytes_a_row": shape.payload + 1})
    return [
        case(operation="insert", batch=1, run=partial(floor.insert, 1)),
        case(operation="insert_batch", batch=INSERT_BATCH, run=partial(floor.insert, INSERT_BATCH)),
    ]


def floor_cases(floor: Any, capacity: int, batch: int, shape: Shape = HALFCHEETAH) -> list[Case]:
    """The floor's operations of one batch size."""
    work = {name: partial(getattr(floor, name), batch) for name in ("sample", "update", "cycle", "uniform_sample")}
    work["sample_out"] = work["sample"]
    case = partial(Case, library=FLOOR, batch=batch, capacity=capacity, rows=shape.name)
    return [case(operation=name, run=run) for name, run in work.items()]


def measure(cases: Sequence[Case], *, repeats: int, seconds: float, threads: int) -> list[Row]:
    """Times the cases, those of one operation, batch, capacity and kind of rows in turns."""
    groups: dict[tuple[str, int, int, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.operation, case.batch, case.capacity, case.rows), []).append(case)
    rows = []
    for group in groups.values():
        times = round_robin([case.run for case in group], repeats=repeats, seconds=seconds)
        rows += [
            summarize(
                case.library,
                case.operation,
                taken,
                capacity=case.capacity,
                batch=case.batch,
                threads=threads,
                rows=case.rows,
                us_per_row=float(np.median(taken)) / case.batch if case.operation == "insert_batch" else None,
                **case.extra,
            )
            for case, taken in zip(group, times, strict=True)
        ]
    return rows
