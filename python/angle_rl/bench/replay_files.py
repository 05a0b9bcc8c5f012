"""Saving and loading a full replay beside a plain write and a plain read of the same bytes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl.bench.libraries import Angle
from angle_rl.bench.replay_checks import fill
from angle_rl.bench.report import FLOOR, Row, publish, summarize
from angle_rl.replay import PrioritizedReplayBuffer


def plain_write(path: Path, views: Sequence[memoryview]) -> None:
    """The floor of saving: the bytes and a flush to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        for view in views:
            left = view
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_read(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The floor of loading: the bytes in fresh memory."""
    into = np.empty(path.stat().st_size, np.uint8)
    with open(path, "rb", buffering=0) as file:
        left = into.data
        while left:
            left = left[file.readinto(left) :]
    return into


def check(buffer: PrioritizedReplayBuffer, path: Path) -> None:
    """RuntimeError unless the file gives the same buffer back."""
    buffer.save(path)
    loaded = PrioritizedReplayBuffer.load(path)
    for name, part in buffer._core.parts().items():
        if not np.array_equal(part, loaded._core.parts()[name]):
            raise RuntimeError(f"the loaded buffer's {name} differs")
    for mine, theirs in zip(buffer.sample(256), loaded.sample(256), strict=True):
        if not mine.equal(theirs):
            raise RuntimeError("the loaded buffer draws another batch")


def file_rows(capacity: int, folder: Path, repeats: int) -> list[Row]:
    """Operations ``save`` and ``load`` of ``capacity`` HalfCheetah rows in ``folder``, in turns with the floors.

    A turn of ``save`` makes a new file, the disk idle before it. ``load`` reads what the system still has in memory.
    """
    library = Angle(capacity)
    fill(library, capacity)
    buffer = library.buffer
    saved, plain = folder / "saved.replay", folder / "plain.bytes"
    check(buffer, saved)
    plain_write(plain, [part.data for part in buffer._core.parts().values()])
    size = saved.stat().st_size

    def save() -> None:
        buffer.save(saved)

    def write() -> None:
        plain_write(plain, [part.data for part in buffer._core.parts().values()])

    work: dict[tuple[str, str], tuple[Path | None, Callable[[], object]]] = {
        ("angle", "save"): (saved, save),
        (FLOOR, "save"): (plain, write),
        ("angle", "load"): (None, lambda: PrioritizedReplayBuffer.load(saved)),
        (FLOOR, "load"): (None, lambda: plain_read(plain)),
    }
    times: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    for turn in range(repeats):
        for name in sorted(work, key=lambda name: (name[1], (name[0] == FLOOR) ^ turn % 2)):  # in turns, either first
            made, run = work[name]
            if made is not None:
                made.unlink()
                os.sync()
            start = time.perf_counter()
            kept = run()
            times[name].append((time.perf_counter() - start) * 1e6)
            del kept
    return [
        summarize(
            library_name,
            operation,
            taken,
            capacity=capacity,
            batch=capacity,
            threads=2,
            megabytes=round(size / 1e6),
            gigabytes_per_second=size / 1e3 / float(np.median(taken)),
        )
        for (library_name, operation), taken in times.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m angle_rl.bench.replay_files", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--capacity", type=int, default=1_000_000, help="rows of the buffer, all filled")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)"
    )
    given = parser.parse_args(argv)
    if given.capacity < 256 or given.repeats < 1:
        parser.error(f"--capacity is {given.capacity}, --repeats {given.repeats}; they must be at least 256 and 1")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = file_rows(given.capacity, Path(folder), given.repeats)
    publish(rows, [], given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
