"""What the replay shall reach, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from angle_rl.bench.report import FLOOR, Row, is_peer

OURS = "angle"
PER_SECOND, BYTES, PER_ROW, MEDIAN = "per_second", "bytes_a_row", "us_per_row", "median_us"
UNITS = {MEDIAN: "us", PER_ROW: "us", PER_SECOND: "/s", BYTES: "bytes"}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that one operation shall reach: at most ``limit``, or at least where ``figure`` is a rate."""

    work: str  # as a reader would say it
    operation: str
    limit: float
    batch: int = 256
    rows: str = "halfcheetah"
    threads: int = 1
    figure: str = MEDIAN
    floor: float | None = None  # what the floor took, in us, on the machine that the limit was set on

    def of(self, row: Row) -> float | None:
        """The figure of a row; None where the row is another operation's or lacks it."""
        if (row.operation, row.batch, row.rows) != (self.operation, self.batch, self.rows):
            return None
        if row.threads != self.threads and row.library != FLOOR:
            return None
        value = row.median_us if self.figure == MEDIAN else row.extra.get(self.figure)
        return None if value is None else float(value)


GOALS = (
    Goal(work="prioritised sample, 256", operation="sample", limit=15, floor=6.2),
    Goal(work="the same into out=", operation="sample_out", limit=10, floor=6.2),
    Goal(work="sample 8192", operation="sample", batch=8192, limit=240, floor=192),
    Goal(work="update 256 priorities", operation="update", limit=6, floor=1.8),
    Goal(work="update 8192 priorities", operation="update", batch=8192, limit=140, floor=43),
    Goal(work="insert 1 + sample 256 + update 256", operation="cycle", limit=22, floor=7.4),
    Goal(work="insert one row", operation="insert", batch=1, limit=1.5, floor=0.04),
    Goal(work="insert 1024 rows, a row", operation="insert_batch", batch=1024, limit=0.03, figure=PER_ROW),
    *(
        Goal(
            work=f"{who}: {what}",
            operation=f"{prefix}_{operation}",
            batch=batch,
            threads=2,
            limit=limit,
            figure=PER_SECOND,
        )
        for who, prefix, limits in (
            ("one inserting, one learning, Python threads", "concurrent", (230_000, 12_000)),
            ("the same, two processes, Python loops", "process", (400_000, 30_000)),
            ("the same, two processes, native loops", "process_native", (400_000, 30_000)),
            ("the same, native threads", "native", (3_000_000, 60_000)),
        )
        for what, operation, batch, limit in zip(
            ("inserts", "cycles"), ("insert", "cycle"), (1, 256), limits, strict=True
        )
    ),
    Goal(work="bytes a row", operation="insert", batch=1, limit=192 + 16, figure=BYTES),
    Goal(work="Atari rows, sample 256", operation="sample", rows="atari", limit=600, floor=557),
)

FLAT = 2.5  # times the cost at 100,000 rows that 10,000,000 may cost, batch 256
FLAT_OPERATIONS = (("sample", 256), ("update", 256), ("cycle", 256), ("insert", 1))
FLAT_FROM, FLAT_TO = 100_000, 10_000_000


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal and what was measured; None where nothing was."""

    work: str
    unit: str
    measured: float | None
    limit: float
    at_least: bool  # whether the limit is a lower one
    peer: float | None = None  # the best peer's
    peer_name: str | None = None
    floor: float | None = None
    limit_floor: float | None = None  # the floor on the machine that the limit was set on

    @property
    def floors(self) -> tuple[float, float] | None:
        """How many times the floor was measured, and how many the limit was: machines differ less in these."""
        if self.measured is None or not self.floor or not self.limit_floor:
            return None
        return self.measured / self.floor, self.limit / self.limit_floor

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def missed_by(self) -> float | None:
        """How many times worse than the goal; None where it is met or nothing was measured."""
        if self.met is not False or not self.measured:
            return None
        return self.limit / self.measured if self.at_least else self.measured / self.limit

    def words(self) -> str:
        """met, missed by how much, or not measured."""
        if self.met is None:
            return "not measured"
        return "met" if self.met else "missed" if self.missed_by is None else f"missed by {self.missed_by:.2f}x"


def judge(rows: Sequence[Row], capacity: int) -> list[Verdict]:
    """Every goal against the rows of buffers of ``capacity`` rows (Atari's of any), and the cost against capacity."""
    return [*(_verdict(goal, rows, capacity) for goal in GOALS), *_flatness(rows)]


def _verdict(goal: Goal, rows: Iterable[Row], capacity: int) -> Verdict:
    at_least = goal.figure == PER_SECOND
    best = max if at_least else min
    ours: float | None = None
    floor: float | None = None
    peers: list[tuple[float, str]] = []
    for row in rows:
        value = goal.of(row) if row.capacity == capacity or goal.rows == "atari" else None
        if value is None:
            continue
        if row.library == OURS:
            ours = value
        elif row.library == FLOOR:
            floor = value
        elif is_peer(row):
            peers.append((value, row.library))
    peer, name = best(peers) if peers else (None, None)
    return Verdict(
        work=goal.work,
        unit=UNITS[goal.figure],
        measured=ours,
        limit=goal.limit,
        at_least=at_least,
        peer=peer,
        peer_name=name,
        floor=floor,
        limit_floor=goal.floor,
    )


def _flatness(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for operation, batch in FLAT_OPERATIONS:
        medians = {
            (row.library, row.capacity): row.median_us
            for row in rows
            if row.operation == operation and row.batch == batch and row.rows == "32 bytes"
        }

        def rise(library: str, medians: dict[tuple[str, int], float] = medians) -> float | None:
            low, high = medians.get((library, FLAT_FROM)), medians.get((library, FLAT_TO))
            return None if low is None or high is None else high / low

        libraries = {library for library, _ in medians} - {OURS, FLOOR}
        peers = [(value, library) for library in sorted(libraries) if (value := rise(library)) is not None]
        peer, name = min(peers) if peers else (None, None)
        found.append(
            Verdict(
                work=f"{operation}, batch {batch}: 10M rows over 100k",
                unit="x",
                measured=rise(OURS),
                limit=FLAT,
                at_least=False,
                peer=peer,
                peer_name=name,
                floor=rise(FLOOR),
            )
        )
    return found


def shown(value: float | None) -> str:
    """A figure as tables have it."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def goals_table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as text, a line each."""
    head = f"{'goal':<58}{'measured':>12}{'goal':>14}  {'':<20}{'best peer':>12}{'':<14}{'floor':>12}"
    lines = [f"{head}{'x floor':>9}{'goal':>7}"]
    for verdict in verdicts:
        limit = f"{'>=' if verdict.at_least else '<='} {shown(verdict.limit)}"
        peer = f" ({verdict.peer_name})" if verdict.peer_name else ""
        floors = verdict.floors
        times = "" if floors is None else f"{floors[0]:>9.2f}{floors[1]:>7.2f}"
        lines.append(
            f"{verdict.work + ', ' + verdict.unit:<58}{shown(verdict.measured):>12}{limit:>14}  "
            f"{verdict.words():<20}{shown(verdict.peer):>12}{peer:<14}{shown(verdict.floor):>12}{times}".rstrip()
        )
    return "\n".join(lines)


def as_dicts(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """The verdicts for JSON."""
    return [{**asdict(verdict), "met": verdict.met, "missed_by": verdict.missed_by} for verdict in verdicts]
