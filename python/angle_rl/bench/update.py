"""``angle bench update``: one SAC update and one whole training step, beside others and the floor, and the goals."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from angle_rl.bench.goals import as_dicts, goals_table
from angle_rl.bench.report import publish
from angle_rl.bench.update_cases import Found, Settings, found_from_json
from angle_rl.bench.update_goals import judge_updates
from angle_rl.bench.update_imports import import_rows
from angle_rl.bench.update_plots import plot_updates

SECTIONS = ("table", "training", "act", "sweeps", "import")


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Processes started inside run on the last so many of this process's cores, where the system can say so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure_apart(settings: Settings) -> Found:
    """Runs these settings in a fresh process on as many cores. RuntimeError where it fails."""
    threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "angle_rl.bench.update_measure", json.dumps(asdict(settings)), str(output)]
        with on_cores(settings.threads):
            done = subprocess.run(command, env={**os.environ, **threads}, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"measuring with {settings.threads} threads failed (exit status {done.returncode})")
        return found_from_json(output.read_text())


def run(every: Sequence[Settings]) -> tuple[Found, bool]:
    """Each settings in processes of their own, the sweeps apart, then the imports; and whether none of it failed."""
    found, good = Found(), True
    for settings in every:
        for among in (("table", "training", "act"), ("sweeps",)):
            sections = tuple(name for name in settings.sections if name in among)
            if not sections:
                continue
            try:
                part = measure_apart(replace(settings, sections=sections))
            except RuntimeError as failure:
                good = False
                part = Found(notes=[f"{', '.join(sections)}: {failure}"])
            found.rows += part.rows
            found.notes += [note for note in part.notes if note not in found.notes]
            found.about |= part.about
    first = every[0]
    if "import" in first.sections:
        print("import to the first update", file=sys.stderr, flush=True)
        with on_cores(first.threads):
            rows, notes = import_rows(first.sbx_python, first.threads, repeats=-(-first.repeats // 2))
        found.rows += rows
        found.notes += notes
    return found, good


def at_least_one(text: str) -> int:
    """An argument that must be an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def numbers_of(text: str) -> tuple[int, ...]:
    """An argument of integers >= 1, separated by commas."""
    return tuple(dict.fromkeys(at_least_one(part) for part in text.split(",")))


def sections_of(text: str) -> tuple[str, ...]:
    """An argument that must name sections, separated by commas."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} does not name sections; they are {', '.join(SECTIONS)}")
    return names


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[Settings]]:
    parser = argparse.ArgumentParser(prog="angle bench update", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here, and the figures beside it")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the figures here")
    parser.add_argument(
        "--only",
        type=sections_of,
        default=SECTIONS,
        metavar="SECTION[,SECTION]",
        help=f"parts to measure (default all): {', '.join(SECTIONS)}",
    )
    parser.add_argument("--quick", action="store_true", help="10,000 rows, few short rounds and points")
    parser.add_argument("--capacity", type=at_least_one, help="rows a replay holds, filled (default 1,000,000)")
    parser.add_argument("--batch", type=at_least_one, default=256, help="rows an update learns on (default 256)")
    parser.add_argument(
        "--threads", type=numbers_of, metavar="N[,N]", help="threads and cores, each in its own process (default 1,2)"
    )
    parser.add_argument("--repeats", type=at_least_one, help="rounds over the learners (default 9)")
    parser.add_argument(
        "--sbx-python", default=sys.executable, metavar="PATH", help="an interpreter with sbx-rl and its jax"
    )
    given = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = given.threads or tuple(n for n in (1, 2) if n <= cores)
    capacity = given.capacity or (10_000 if given.quick else 1_000_000)
    if max(threads) > cores:
        parser.error(f"--threads asks for {max(threads)} cores; this process has {cores}")
    if capacity < given.batch:
        parser.error(f"--capacity is {capacity}; it must be at least {given.batch}")
    return given, [
        Settings(
            capacity=capacity,
            batch=given.batch,
            threads=number,
            repeats=given.repeats or (3 if given.quick else 9),
            seconds=0.1 if given.quick else 1.0,
            quick=given.quick,
            sections=given.only,
            sbx_python=given.sbx_python,
        )
        for number in threads
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status.

    1: a part failed, which a line says; the rest is measured and written all the same.
    """
    given, every = _arguments(argv)
    found, good = run(every)
    verdicts = judge_updates(found.rows)
    publish(
        found.rows,
        found.notes,
        given.json,
        texts=[goals_table(verdicts)],
        parts={"goals": as_dicts(verdicts)},
        **found.about,
    )
    folder = given.plots or (given.json.resolve().parent if given.json else None)
    if folder is not None:
        for path in plot_updates(found.rows, folder, given.json.stem if given.json else "update"):
            print(f"written to {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
