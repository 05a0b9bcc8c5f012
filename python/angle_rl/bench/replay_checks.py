"""What a replay must get right before it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from angle_rl import _core
from angle_rl.bench.libraries import Kind, Library
from angle_rl.bench.rows import check_indices, check_rows, chunks, make_rows
from angle_rl.replay import PrioritizedReplayBuffer

CAPACITY = 4096  # rows of the small buffer that the checks fill past its end
PAST = 104  # rows beyond the capacity
BATCHES = 96  # sampled batches of 256
SIGMAS = 4.5  # standard deviations that a figure of check_statistics may lie from what is due
GROUPS = np.array([0.25, 1.0, 2.0, 4.0], dtype=np.float32)  # td errors of the four groups of rows


def _expect(shares: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], name: str) -> None:
    """RuntimeError unless the counts follow the shares: five standard deviations and 0.3 % of slack."""
    draws = int(counts.sum())
    slack = 5 * np.sqrt(shares * (1 - shares) / draws) + 0.003
    if (np.abs(counts / draws - shares) > slack).any():
        raise RuntimeError(f"{name}: drew groups {counts / draws} where {shares} was due")


def check_library(kind: Kind) -> None:
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
    for rows in chunks(capacity, library.shape):
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


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How often the rows of one kind in one half of the buffer were drawn, and how often a multinomial draws them."""

    draws: str  # "independent" or "stratified"
    half: str  # "first" or "second"
    priority: float
    rows: int
    share: float  # of all draws
    due_share: float
    share_sigmas: float  # the difference over a binomial's standard deviation
    mean: float  # draws of one row
    due_mean: float
    variance: float  # of one row's draws about the mean of its kind
    due_variance: float
    variance_sigmas: float  # the difference over a multinomial's standard deviation
    limit: float  # sigmas allowed: both ways, but for a stratified variance, which may be as small as it likes

    @property
    def good(self) -> bool:
        """Whether both figures lie within the limit."""
        low = -self.limit if self.draws == "independent" else -np.inf
        return abs(self.share_sigmas) <= self.limit and low <= self.variance_sigmas <= self.limit

    def line(self) -> str:
        """One line of a table whose heading is DRAWN_HEADING."""
        return (
            f"{self.draws:<12}{self.half:<8}{self.priority:>8g}{self.rows:>9}{self.share:>13.4e}{self.due_share:>13.4e}"
            f"{self.share_sigmas:>8.2f}{self.mean:>12.6f}{self.due_mean:>12.6f}{self.variance:>12.6f}"
            f"{self.due_variance:>12.6f}{self.variance_sigmas:>8.2f}  {'as due' if self.good else 'NOT AS DUE'}"
        )


DRAWN_HEADING = (
    f"{'draws':<12}{'half':<8}{'priority':>8}{'rows':>9}{'share':>13}{'due':>13}{'sigmas':>8}{'mean':>12}{'due':>12}"
    f"{'variance':>12}{'due':>12}{'sigmas':>8}"
)


def compare_draws(
    counts: npt.NDArray[np.int64], priorities: npt.NDArray[np.float64], kind: str, limit: float = SIGMAS
) -> list[Drawn]:
    """How often each row was drawn, held against a multinomial, by priority and half of the buffer.

    The draws of m rows of equal weight in n draws number S, binomial (n, their share); given S, their counts c are
    multinomial over m equal cells, so that X = sum((c - S/m)**2) / (S/m) has the mean m - 1 and the variance
    2 (m - 1) (1 - 1/S) exactly. That holds for as few draws a row as may be.
    """
    weights = np.round(priorities * 2.0**20)
    total, draws = weights.sum(), int(counts.sum())
    found = []
    for half, place in (("first", slice(None, len(counts) // 2)), ("second", slice(len(counts) // 2, None))):
        for priority in np.unique(priorities):
            chosen = counts[place][priorities[place] == priority]
            rows, drawn = len(chosen), int(chosen.sum())
            share = rows * round(priority * 2**20) / total
            mean = max(drawn, 1) / rows
            spread = float(((chosen - mean) ** 2).sum()) / mean
            found.append(
                Drawn(
                    draws=kind,
                    half=half,
                    priority=float(priority),
                    rows=rows,
                    share=drawn / draws,
                    due_share=share,
                    share_sigmas=float((drawn - draws * share) / np.sqrt(draws * share * (1 - share))),
                    mean=drawn / rows,
                    due_mean=draws * share / rows,
                    variance=spread * mean / (rows - 1),
                    due_variance=mean,
                    variance_sigmas=float((spread - (rows - 1)) / np.sqrt(2 * (rows - 1) * (1 - 1 / max(drawn, 2)))),
                    limit=limit,
                )
            )
    return found


def check_statistics(capacity: int = 1_000_000, draws: int = 16_000_000, batch: int = 65_536) -> list[Drawn]:
    """Draws from ``capacity`` rows, 90 % of priority 1 and 10 % of 1e-3, spread at random over both halves.

    Under independent draws, share and variance of each kind in each half must be a multinomial's; under stratified ones
    the share, and a variance no larger. RuntimeError with the figures where they are not.
    """
    batch = min(batch, capacity)
    order = np.random.default_rng(0).permutation(capacity)
    priorities = np.where(order < capacity // 10, 1e-3, 1.0)
    found: list[Drawn] = []
    for stratified in (False, True):
        buffer = PrioritizedReplayBuffer(
            capacity,
            {"observations": ((1,), np.float32), "actions": ((1,), np.float32)},
            priority_exponent=1.0,
            priority_epsilon=0.0,
            stratified=stratified,
            seed=1,
        )
        column = np.zeros((capacity, 1), np.float32)
        ends = np.zeros(capacity, np.bool_)
        handles = buffer.insert(column, column, column[:, 0], column, ends)
        buffer.update_priorities(handles, priorities)
        counts = np.zeros(capacity, np.int64)
        for _ in range(-(-draws // batch)):
            counts += np.bincount(buffer.sample(batch).handles.numpy(), minlength=capacity)
        found += compare_draws(counts, priorities, "stratified" if stratified else "independent")
    if not all(drawn.good for drawn in found):
        figures = "\n".join([DRAWN_HEADING, *(drawn.line() for drawn in found)])
        raise RuntimeError(f"angle: rows are not drawn by their weights\n{figures}")
    return found
