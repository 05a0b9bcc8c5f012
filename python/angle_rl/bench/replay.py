"""``angle bench replay``: our replay beside its peers and beside the machine's floor, and the goals it is held to."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from angle_rl import _core
from angle_rl.bench import peers
from angle_rl.bench.flashbax_process import OPERATIONS, Flashbax
from angle_rl.bench.goals import as_dicts, goals_table, judge
from angle_rl.bench.libraries import Angle, AngleUniform, Kind, Library
from angle_rl.bench.replay_atari import atari_rows
from angle_rl.bench.replay_cases import (
    INSERT_BATCH,
    Case,
    Settings,
    floor_cases,
    floor_inserts,
    insert_cases,
    measure,
    prioritized_cases,
    uniform_case,
)
from angle_rl.bench.replay_checks import DRAWN_HEADING, Drawn, check_floor, check_library, check_statistics, fill
from angle_rl.bench.replay_plots import plot_all
from angle_rl.bench.replay_processes import process_rows
from angle_rl.bench.replay_race import thread_rows
from angle_rl.bench.replay_sweeps import BATCH_SWEEP, CAPACITIES, QUICK_BATCH_SWEEP, QUICK_CAPACITIES, capacity_rows
from angle_rl.bench.report import Row, publish
from angle_rl.bench.timing import one_setting

SECTIONS = ("table", "batch", "threads", "capacity", "processes", "atari", "files", "statistics")


@dataclass(kw_only=True)
class Found:
    """What a run measured."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # a line for each thing that was not measured
    drawn: list[Drawn] = field(default_factory=list)
    flashbax: dict[str, Any] | None = None  # versions in its interpreter

    def add(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        """Takes over what a section measured, and what it did not."""
        self.rows += rows
        self.notes += notes


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def make_filled(kind: Kind, capacity: int) -> tuple[Library, dict[str, Any]]:
    """A filled library and its ``bytes_a_row``: what ours reserves, what a peer's process grew by meanwhile."""
    gc.collect()
    before = _resident()
    library = kind(capacity)
    fill(library, capacity)
    gc.collect()
    grown = _resident() - before
    held = library.buffer.nbytes if isinstance(library, Angle) else grown
    return library, {"bytes_a_row": held / capacity} if held > 0 else {}


def flashbax_cases(worker: Flashbax, capacity: int, batch: int, with_inserts: bool) -> list[Case]:
    """flashbax's operations of one batch size."""
    sizes = {"insert": 1, "insert_batch": INSERT_BATCH}
    names = OPERATIONS if with_inserts else OPERATIONS[2:]
    return [
        Case(
            library=worker.name,
            operation=name,
            batch=sizes.get(name, batch),
            run=worker.clock(name),
            capacity=capacity,
            extra={"gives": worker.gives} if "sample" in name else {},
        )
        for name in names
    ]


def start_flashbax(python: str, capacity: int, batch: int) -> tuple[Flashbax | None, str | None]:
    """flashbax filled and checked, or a line saying why not."""
    try:
        return Flashbax(python, capacity, batch), None
    except RuntimeError as failure:
        return None, f"flashbax in {python}, batch {batch}: {failure}"


def batch_cases(libraries: Sequence[Library], floor: Any, capacity: int, batch: int) -> list[Case]:
    """Every operation of one batch size of every library, the floor's among them."""
    cases = floor_cases(floor, capacity, batch)
    for library in libraries:
        if library.prioritized:
            cases += prioritized_cases(library, capacity, batch)
        else:
            cases.append(uniform_case(library, capacity, batch))
    return cases


def table_rows(
    libraries: Sequence[tuple[Library, dict[str, Any]]], settings: Settings, flashbax_python: str, found: Found
) -> None:
    """The single-threaded operations, flashbax and the floor among them."""
    capacity = settings.capacity
    floor = _core.ReplayFloor(capacity, 1)
    prioritized = {library.name for library, _ in libraries if library.prioritized}
    cases = floor_inserts(floor, capacity)
    for library, facts in libraries:
        if library.prioritized or library.name not in prioritized:
            cases += insert_cases(library, capacity, facts)
    workers: list[Flashbax] = []
    try:
        for index, batch in enumerate(settings.batches):
            cases += batch_cases([library for library, _ in libraries], floor, capacity, batch)
            worker, why = start_flashbax(flashbax_python, capacity, batch)
            if worker is None:
                found.notes.append(why or "flashbax")
                continue
            workers.append(worker)
            found.flashbax = worker.versions
            cases += flashbax_cases(worker, capacity, batch, index == 0)
        found.add(measure(cases, repeats=settings.repeats, seconds=settings.seconds, threads=settings.threads))
    finally:
        for worker in workers:
            worker.close()


def batch_rows(libraries: Sequence[Library], settings: Settings) -> list[Row]:
    """The operations at every batch size of the sweep that the table leaves out, in fewer and shorter turns."""
    floor = _core.ReplayFloor(settings.capacity, 1)
    sizes = QUICK_BATCH_SWEEP if settings.quick else BATCH_SWEEP
    rows: list[Row] = []
    for batch in sizes:
        if batch in settings.batches or batch > settings.capacity:
            continue
        cases = batch_cases(libraries, floor, settings.capacity, batch)
        rows += measure(
            cases, repeats=-(-settings.repeats // 2), seconds=settings.seconds / 2, threads=settings.threads
        )
    return rows


def file_rows(settings: Settings) -> tuple[list[Row], list[str]]:
    """``save`` and ``load``, where this version has them."""
    try:
        module = importlib.import_module("angle_rl.bench.replay_files")
    except ModuleNotFoundError:
        return [], ["save and load: this version has no benchmark of them"]
    with tempfile.TemporaryDirectory() as folder:
        rows: list[Row] = module.file_rows(settings.capacity, Path(folder), settings.repeats)
    return rows, []


def run(settings: Settings, sections: Sequence[str], flashbax_python: str) -> Found:
    """Checks the answers of every library there is, then times these sections."""
    found = Found()
    sizes = {"capacity": 100_000, "draws": 1_000_000} if settings.quick else {}
    found.drawn = check_statistics(**sizes)
    if set(sections) == {"statistics"}:
        return found
    check_floor()
    check_library(Angle)
    check_library(AngleUniform)
    kinds, notes = peers.available(check_library)
    if {"table", "batch", "threads", "capacity"} & set(sections):
        found.notes += notes
    if {"table", "batch", "threads"} & set(sections):
        every: list[Kind] = [Angle, AngleUniform, *kinds]
        made = [make_filled(kind, settings.capacity) for kind in every]
        libraries = [library for library, _ in made]
        with one_setting(settings.threads):
            if "table" in sections:
                table_rows(made, settings, flashbax_python, found)
            if "batch" in sections:
                found.add(batch_rows(libraries, settings))
        if "threads" in sections:
            found.add(thread_rows(libraries, settings))
        del libraries, made
        gc.collect()
    few = replace(settings, repeats=-(-settings.repeats // 2))
    if "capacity" in sections:
        prioritized = [kind for kind in kinds if getattr(kind, "prioritized", False)]
        sweep = QUICK_CAPACITIES if settings.quick else CAPACITIES
        found.add(*capacity_rows(prioritized, replace(few, seconds=settings.seconds / 2), sweep))
    if "processes" in sections:
        found.add(*process_rows(few))
    if "atari" in sections:
        found.add(*atari_rows(few))
    if "files" in sections:
        found.add(*file_rows(few))
    return found


def at_least_one(text: str) -> int:
    """An argument that must be an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def sections_of(text: str) -> tuple[str, ...]:
    """An argument that must name sections, separated by commas."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} does not name sections; they are {', '.join(SECTIONS)}")
    return names


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(prog="angle bench replay", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here, and the figures beside it")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the sweeps' figures here")
    parser.add_argument(
        "--only",
        type=sections_of,
        default=SECTIONS,
        metavar="SECTION[,SECTION]",
        help=f"parts to measure (default all): {', '.join(SECTIONS)}; statistics are always checked",
    )
    parser.add_argument("--quick", action="store_true", help="about a minute: small sizes, few short rounds")
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
        repeats=given.repeats or (2 if given.quick else 9),
        seconds=0.02 if given.quick else 0.2,
        race_seconds=0.15 if given.quick else 0.8,
        quick=given.quick,
    )
    if settings.capacity < max(INSERT_BATCH, *settings.batches):
        smallest = max(INSERT_BATCH, *settings.batches)
        parser.error(f"--capacity is {settings.capacity}; it must be at least {smallest}")
    return given, settings


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status."""
    given, settings = _arguments(argv)
    found = run(settings, given.only, given.flashbax_python)
    verdicts = judge(found.rows, settings.capacity)
    statistics = "\n".join([DRAWN_HEADING, *(drawn.line() for drawn in found.drawn)])
    texts = [statistics, goals_table(verdicts)] if found.rows else [statistics]
    parts = {"goals": as_dicts(verdicts), "statistics": [asdict(drawn) for drawn in found.drawn]}
    publish(found.rows, found.notes, given.json, texts=texts, parts=parts, flashbax=found.flashbax)
    folder = given.plots or (given.json.resolve().parent if given.json else None)
    if folder is not None:
        for path in plot_all(found.rows, folder, given.json.stem if given.json else "replay"):
            print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
