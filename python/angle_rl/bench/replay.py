"""``angle bench replay``: our replay beside its peers and beside the machine's floor."""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl import _core
from angle_rl.bench import peers
from angle_rl.bench.flashbax_process import OPERATIONS, Flashbax
from angle_rl.bench.libraries import Angle, AngleUniform, Library
from angle_rl.bench.replay_checks import check_floor, check_library, fill
from angle_rl.bench.report import FLOOR, Row, publish, summarize
from angle_rl.bench.rows import check_rows, make_rows
from angle_rl.bench.timing import Clock, clock, one_setting, race, round_robin

INSERT_BATCH = 1024  # rows of one insert_batch call
POOL = 1024  # distinct rows that stand ready to be inserted
UPDATES = 256  # distinct batches of handles that the update walks through


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of this benchmark."""

    capacity: int  # rows a buffer holds, >= 1
    batches: tuple[int, ...]  # sampled rows a call, each >= 1
    threads: int  # cores for the single-threaded operations, >= 1
    repeats: int  # rounds over the libraries, >= 1
    seconds: float  # length of one library's turn in a round


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation of one library."""

    library: str
    operation: str
    batch: int
    run: Clock
    gives: str | None = None  # what sampling returns


def _rows(settings: Settings) -> Any:
    return make_rows(np.arange(settings.capacity, settings.capacity + POOL, dtype=np.int64))


def _inserting(library: Library, settings: Settings) -> Callable[[], object]:
    rows = _rows(settings)
    ready = itertools.cycle([library.ready_row(rows, index) for index in range(POOL)])
    insert = library.insert
    return lambda: insert(next(ready))


def insert_cases(library: Library, settings: Settings) -> list[Case]:
    """``insert``: one row. ``insert_batch``: 1024 rows."""
    many = library.ready_rows(_rows(settings))
    insert_many = library.insert_many
    return [
        Case(library=library.name, operation="insert", batch=1, run=clock(_inserting(library, settings))),
        Case(
            library=library.name,
            operation="insert_batch",
            batch=INSERT_BATCH,
            run=clock(lambda: insert_many(many)),
        ),
    ]


def prioritized_cases(library: Library, settings: Settings, batch: int) -> list[Case]:
    """``sample``, ``update`` of random rows, and ``cycle``: insert 1, sample, update the sampled rows."""
    generator = np.random.default_rng(1)
    errors = itertools.cycle(
        [
            library.ready_errors(generator.exponential(size=batch).astype(np.float32))
            for _ in range(max(4, 4096 // batch))
        ]
    )
    # Copied, since a peer may hand out a view of memory that its next sample overwrites or frees.
    known = itertools.cycle(
        [copy.deepcopy(library.handles(library.sample(batch))) for _ in range(max(4, UPDATES * 256 // batch))]
    )
    sample, update, handles = library.sample, library.update, library.handles
    insert = _inserting(library, settings)

    def cycle() -> None:
        insert()
        update(handles(sample(batch)), next(errors))

    case = partial(Case, library=library.name, batch=batch)
    cases = [
        case(operation="update", run=clock(lambda: update(next(known), next(errors)))),
        case(operation="sample", run=clock(lambda: sample(batch)), gives=library.gives),
        case(operation="cycle", run=clock(cycle)),
    ]
    if isinstance(library, Angle):
        sample_out = library.sample_out
        cases.append(case(operation="sample_out", run=clock(lambda: sample_out(batch)), gives=library.gives))
    return cases


def floor_cases(floor: Any, batch: int | None) -> list[Case]:
    """The floor's operations of one batch size; its inserts where ``batch`` is None."""
    if batch is None:
        return [
            Case(library=FLOOR, operation="insert", batch=1, run=partial(floor.insert, 1)),
            Case(
                library=FLOOR,
                operation="insert_batch",
                batch=INSERT_BATCH,
                run=partial(floor.insert, INSERT_BATCH),
            ),
        ]
    work = {name: partial(getattr(floor, name), batch) for name in ("sample", "update", "cycle", "uniform_sample")}
    work["sample_out"] = work["sample"]
    return [Case(library=FLOOR, operation=name, batch=batch, run=run) for name, run in work.items()]


def measure(cases: Sequence[Case], settings: Settings) -> list[Row]:
    """Times the cases, those of one operation and batch in turns."""
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.operation, case.batch), []).append(case)
    rows = []
    for group in groups.values():
        times = round_robin([case.run for case in group], repeats=settings.repeats, seconds=settings.seconds)
        rows += [
            summarize(
                case.library,
                case.operation,
                taken,
                capacity=settings.capacity,
                batch=case.batch,
                threads=settings.threads,
                gives=case.gives,
                us_per_row=float(np.median(taken)) / case.batch if case.operation == "insert_batch" else None,
            )
            for case, taken in zip(group, times, strict=True)
        ]
    return rows


def concurrent_rows(libraries: Sequence[Library], settings: Settings, batch: int) -> list[Row]:
    """One Python thread inserts row after row while another samples and updates.

    ``concurrent_insert`` and ``concurrent_cycle`` are the mean microseconds a call of the two threads;
    ``p999_us`` is the slowest call in a thousand.
    """
    gathered: dict[str, tuple[list[float], list[float], list[float], list[float]]] = {}
    for _ in range(settings.repeats):
        for library in libraries:
            errors = library.ready_errors(np.random.default_rng(2).exponential(size=batch).astype(np.float32))
            sample, update, handles = library.sample, library.update, library.handles
            found = race(
                _inserting(library, settings),
                lambda: update(handles(sample(batch)), errors),  # noqa: B023 - ends before the next library
                max(0.3, 5 * settings.seconds),
            )
            lists = gathered.setdefault(library.name, ([], [], [], []))
            lists[0].append(found.insert_us)
            lists[1].append(found.cycle_us)
            lists[2].extend(found.insert_calls_us)
            lists[3].extend(found.cycle_calls_us)
            check_rows(library.arrays(sample(batch)), library.name)
    rows = []
    for name, (inserts, cycles, insert_calls, cycle_calls) in gathered.items():
        for operation, size, times, calls in (
            ("concurrent_insert", 1, inserts, insert_calls),
            ("concurrent_cycle", batch, cycles, cycle_calls),
        ):
            rows.append(
                summarize(
                    name,
                    operation,
                    times,
                    capacity=settings.capacity,
                    batch=size,
                    threads=2,
                    p999_us=float(np.quantile(calls, 0.999)),
                    per_second=round(1e6 / float(np.median(times))),
                )
            )
    return rows


def flashbax_cases(worker: Flashbax, batch: int, with_inserts: bool) -> list[Case]:
    """flashbax's operations of one batch size."""
    sizes = {"insert": 1, "insert_batch": INSERT_BATCH}
    names = OPERATIONS if with_inserts else OPERATIONS[2:]
    return [
        Case(
            library=worker.name,
            operation=name,
            batch=sizes.get(name, batch),
            run=worker.clock(name),
            gives=worker.gives if "sample" in name else None,
        )
        for name in names
    ]


def start_flashbax(python: str, settings: Settings, batch: int) -> tuple[Flashbax | None, str | None]:
    """flashbax filled and checked, or a line saying why not."""
    try:
        return Flashbax(python, settings.capacity, batch), None
    except RuntimeError as failure:
        return None, f"flashbax in {python}, batch {batch}: {failure}"


def all_cases(libraries: Sequence[Library], workers: Sequence[Flashbax | None], settings: Settings) -> list[Case]:
    """Every single-threaded operation of every library, the floor's among them."""
    floor = _core.ReplayFloor(settings.capacity, 1)
    prioritized = {library.name for library in libraries if library.prioritized}
    cases = floor_cases(floor, None)
    for library in libraries:
        if library.prioritized or library.name not in prioritized:
            cases += insert_cases(library, settings)
    for index, (batch, worker) in enumerate(zip(settings.batches, workers, strict=True)):
        cases += floor_cases(floor, batch)
        for library in libraries:
            if library.prioritized:
                cases += prioritized_cases(library, settings, batch)
            else:
                run_sample = clock(partial(library.sample, batch))
                cases.append(
                    Case(
                        library=library.name,
                        operation="uniform_sample",
                        batch=batch,
                        run=run_sample,
                        gives=library.gives,
                    )
                )
        if worker is not None:
            cases += flashbax_cases(worker, batch, index == 0)
    return cases


def run(settings: Settings, flashbax_python: str) -> tuple[list[Row], list[str], dict[str, Any]]:
    """Checks and times every library there is: rows, a line per library there is not, and versions."""
    check_floor()
    check_library(Angle)
    check_library(AngleUniform)
    kinds, notes = peers.available(check_library)
    libraries = [kind(settings.capacity) for kind in (Angle, AngleUniform, *kinds)]
    for library in libraries:
        fill(library, settings.capacity)
    with one_setting(settings.threads):
        started = [start_flashbax(flashbax_python, settings, batch) for batch in settings.batches]
        workers = [worker for worker, _ in started]
        notes += [why for _, why in started if why is not None]
        try:
            rows = measure(all_cases(libraries, workers, settings), settings)
        finally:
            for worker in workers:
                if worker is not None:
                    worker.close()
    with one_setting(2):
        prioritized = [library for library in libraries if library.prioritized]
        rows += concurrent_rows(prioritized, settings, settings.batches[0])
    versions = next((worker.versions for worker in workers if worker is not None), None)
    return rows, notes, {"flashbax": versions}


def at_least_one(text: str) -> int:
    """An argument that must be an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status."""
    parser = argparse.ArgumentParser(prog="angle bench replay", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--quick", action="store_true", help="under a minute: 100,000 rows, few short rounds")
    parser.add_argument("--capacity", type=at_least_one, help="rows a buffer holds, filled (default 1,000,000)")
    parser.add_argument("--batch", type=at_least_one, nargs="+", help="sampled rows a call (default 256 8192)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="cores of the single-threaded operations")
    parser.add_argument("--repeats", type=at_least_one, help="rounds over the libraries (default 9)")
    parser.add_argument(
        "--flashbax-python",
        default=sys.executable,
        metavar="PATH",
        help="an interpreter with jax and flashbax",
    )
    given = parser.parse_args(argv)
    settings = Settings(
        capacity=given.capacity or (100_000 if given.quick else 1_000_000),
        batches=tuple(given.batch or ((256,) if given.quick else (256, 8192))),
        threads=given.threads,
        repeats=given.repeats or (3 if given.quick else 9),
        seconds=0.02 if given.quick else 0.2,
    )
    if settings.capacity < max(INSERT_BATCH, *settings.batches):
        smallest = max(INSERT_BATCH, *settings.batches)
        parser.error(f"--capacity is {settings.capacity}; it must be at least {smallest}")
    rows, notes, about = run(settings, given.flashbax_python)
    publish(rows, notes, given.json, **about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
