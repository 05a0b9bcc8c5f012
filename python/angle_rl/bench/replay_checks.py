"""What a replay must get right before it is timed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from angle_rl import _core
from angle_rl.bench.libraries import Library
from angle_rl.bench.rows import check_indices, check_rows, chunks, make_rows

CAPACITY = 4096  # rows of the small buffer that the checks fill past its end
PAST = 104  # rows beyond the capacity
BATCHES = 96  # sampled batches of 256
GROUPS = np.array([0.25, 1.0, 2.0, 4.0], dtype=np.float32)  # td errors of the four groups of rows


def _expect(shares: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], name: str) -> None:
    """RuntimeError unless the counts follow the shares: five standard deviations and 0.3 % of slack."""
    draws = int(counts.sum())
    slack = 5 * np.sqrt(shares * (1 - shares) / draws) + 0.003
    if (np.abs(counts / draws - shares) > slack).any():
        raise RuntimeError(f"{name}: drew groups {counts / draws} where {shares} was due")


def check_library(kind: Callable[[int], Library]) -> None:
    """Fills a small buffer past its end, sets priorities, samples. RuntimeError when an answer is wrong.

    Every sampled row must be whole and, where the library tells its index, the newest one there; rows
    inserted last must be drawn; importance weights must be positive; four groups of rows must be drawn in
    proportion to their weights.
    """
    library = kind(CAPACITY)
    inserted = CAPACITY + PAST
    for rows in chunks(CAPACITY - CAPACITY // 8):
        library.insert_many(library.ready_rows(rows))
    for number in range(CAPACITY - CAPACITY // 8, inserted):
        library.insert(library.ready_row(make_rows(np.array([number])), 0))
    live = np.arange(PAST, inserted)
    if library.prioritized:
        errors = library.ready_errors(GROUPS[live % 4])
        library.update(library.handles_of(live), errors)
    counts = np.zeros(4, dtype=np.int64)
    newest = 0
    for _ in range(BATCHES):
        sampled = library.arrays(library.sample(256))
        check_indices(sampled, inserted, CAPACITY, library.name)
        if sampled.weights is not None and not (np.isfinite(sampled.weights) & (sampled.weights > 0)).all():
            raise RuntimeError(f"{library.name}: an importance weight is not positive and finite")
        numbers = check_rows(sampled, library.name)
        counts += np.bincount(numbers % 4, minlength=4)
        newest += int((numbers >= CAPACITY).sum())
    if newest == 0:
        raise RuntimeError(f"{library.name}: none of the {PAST} rows inserted last was drawn")
    weights = GROUPS.astype(np.float64) ** (library.exponent if library.prioritized else 0.0)
    _expect(weights / weights.sum(), counts, library.name)


def fill(library: Library, capacity: int) -> None:
    """Fills ``library`` with rows 0 to ``capacity``, varies their priorities, and checks what it returns."""
    for rows in chunks(capacity):
        library.insert_many(library.ready_rows(rows))
    if library.prioritized:
        generator = np.random.default_rng(0)
        for first in range(0, capacity, 8192):
            numbers = np.arange(first, min(first + 8192, capacity), dtype=np.int64)
            errors = generator.exponential(size=len(numbers)).astype(np.float32)
            library.update(library.handles_of(numbers), library.ready_errors(errors))
    for _ in range(4):
        check_indices(library.arrays(library.sample(256)), capacity, capacity, library.name)


def check_floor(capacity: int = 5000) -> None:
    """The floor does the work it claims: rows follow their weights, fields their rows, sums their leaves."""
    floor = _core.ReplayFloor(capacity, 1)
    floor.cycle(256, 50)
    floor.insert(64, 1 + 2 * capacity // 64)
    floor.update(256, 20)
    if not floor.sums_agree():
        raise RuntimeError("floor: a sum is not its leaves'")
    weights = np.array([floor.weight(row) for row in range(capacity)], dtype=np.float64)
    counts = np.zeros(4, dtype=np.int64)
    for _ in range(BATCHES):
        floor.sample(256, 1)
        rows = floor.indices()
        observations = floor.observations().reshape(256, 17)
        if any(floor.record(int(row)) != first for row, first in zip(rows, observations[:, 0], strict=True)):
            raise RuntimeError("floor: a gathered observation is not its row's")
        counts += np.bincount(rows % 4, minlength=4)
    due = np.bincount(np.arange(capacity) % 4, weights=weights, minlength=4)
    _expect(due / due.sum(), counts, "floor")
