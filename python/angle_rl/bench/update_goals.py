"""What one update shall reach, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from angle_rl.bench.goals import Verdict
from angle_rl.bench.report import FLOOR, Row, is_peer
from angle_rl.bench.update_cases import BFLOAT16

# The products of one update at 219 GFLOP/s a core, the rate on the machine that the limits were set on.
FLOOR_US = {1: 542_638_080 / 219e3, 2: 542_638_080 / 438e3}
SCALES = {"ms": 1e-3, "us": 1.0, "s": 1e-6}


@dataclass(frozen=True, kw_only=True)
class UpdateGoal:
    """A figure of one operation, the best of ours on any engine: at most ``limit``, or a rate of at least that.

    Ours with one update a call; a peer's may take more.
    """

    work: str  # as a reader would say it
    operation: str
    limit: float
    unit: str  # "ms", "us" or "s" a call, or "steps/s": calls a second
    threads: int = 1
    batch: int = 256
    bfloat16: bool = False
    floor: float | None = None  # what the floor took, in `unit`, on the machine that the limit was set on

    def of(self, row: Row) -> float | None:
        """The figure of a row; None where it is another operation's, or with other threads or rows a call."""
        if (row.operation, row.threads, row.batch) != (self.operation, self.threads, self.batch):
            return None
        ours = row.library != FLOOR and not is_peer(row)
        if ours and ((row.library == BFLOAT16) != self.bfloat16 or "updates_a_call" in row.extra):
            return None
        return row.median_us * SCALES[self.unit] if self.unit in SCALES else 1e6 / row.median_us


GOALS = (
    *(
        UpdateGoal(
            work=f"SAC update{', bfloat16 products' if bfloat16 else ', 2x256, batch 256'}, {cores}",
            operation="learner_update",
            limit=limit,
            unit="ms",
            threads=threads,
            bfloat16=bfloat16,
            floor=FLOOR_US[threads] / 1e3,
        )
        for bfloat16, threads, cores, limit in (
            (False, 1, "one core", 2.75),
            (False, 2, "two cores", 1.5),
            (True, 1, "one core", 1.9),
            (True, 2, "two cores", 1.1),
        )
    ),
    UpdateGoal(work="HalfCheetah-v5, an update a step, one core", operation="train_step", limit=330, unit="steps/s"),
    UpdateGoal(work="the same, two cores", operation="train_step", limit=560, unit="steps/s", threads=2),
    UpdateGoal(work="act, one observation", operation="act", limit=5, unit="us", batch=1),
    UpdateGoal(
        work="import to the first update, beyond torch", operation="import_to_first_update", limit=1.5, unit="s"
    ),
)


def judge_updates(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal against the rows, in the order of GOALS."""
    return [_verdict(goal, rows) for goal in GOALS]


def _verdict(goal: UpdateGoal, rows: Iterable[Row]) -> Verdict:
    at_least = goal.unit not in SCALES
    best = max if at_least else min
    ours: list[float] = []
    peers: list[tuple[float, str]] = []
    floor: float | None = None
    for row in rows:
        value = goal.of(row)
        if value is None:
            continue
        if row.library == FLOOR:
            floor = value
        elif is_peer(row):
            calls = row.extra.get("updates_a_call")
            peers.append((value, row.library if calls is None else f"{row.library}, {calls} a call"))
        else:
            ours.append(value)
    peer, name = best(peers) if peers else (None, None)
    return Verdict(
        work=goal.work,
        unit=goal.unit,
        measured=best(ours) if ours else None,
        limit=goal.limit,
        at_least=at_least,
        peer=peer,
        peer_name=name,
        floor=floor,
        limit_floor=goal.floor,
    )
