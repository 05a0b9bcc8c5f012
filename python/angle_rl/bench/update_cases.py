"""What the parts of ``angle bench update`` share: settings, cases and turns, ours on each engine, SBX."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl.bench.learners import USUAL, Angle, Learner, Sizes, check_engine, check_learner
from angle_rl.bench.peers import in_short
from angle_rl.bench.report import Row, summarize
from angle_rl.bench.rows import Rows
from angle_rl.bench.sbx_process import Sbx
from angle_rl.bench.timing import Clock, round_robin

UPDATES_A_CALL = 32  # besides one
NATIVE = "angle-native"
BFLOAT16 = "angle-native-bf16"
BFLOAT16_TOLERANCE = 0.5  # of a tensor's change after a few updates, see check_engine


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One process of this benchmark."""

    capacity: int  # rows the replays hold, all filled, >= batch
    batch: int  # rows an update learns on, >= 1
    threads: int  # torch's, ours and cores, >= 1
    repeats: int  # rounds over the learners, >= 1
    seconds: float  # length of one learner's turn in a round
    quick: bool  # fewer points in the sweeps
    sections: tuple[str, ...]
    sbx_python: str  # an interpreter with sbx-rl


@dataclass(kw_only=True)
class Found:
    """What a process measured."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # a line for each thing that was not measured
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As `found_from_json` reads it."""
        return json.dumps(asdict(self))


def found_from_json(text: str) -> Found:
    """What `to_json` wrote."""
    read = json.loads(text)
    return Found(rows=[Row(**row) for row in read["rows"]], notes=read["notes"], about=read["about"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One library's way of one operation."""

    library: str
    run: Clock
    calls: int = 1  # of what is reported in one iteration of `run`
    extra: dict[str, Any] = field(default_factory=dict)


def tell(settings: Settings, what: str) -> None:
    """Says on standard error where the process is."""
    print(f"{settings.threads} thread{'s' * (settings.threads > 1)}: {what}", file=sys.stderr, flush=True)


def measure(
    operation: str,
    cases: Sequence[Case],
    settings: Settings,
    *,
    batch: int,
    capacity: int | None = None,
    rows: str = "halfcheetah",
    multiple: int = 2,
    rate: bool = False,
) -> list[Row]:
    """Times the cases in turns; microseconds of one call each, and calls a second where `rate` asks for it."""
    turns = [case.run for case in cases]
    times = round_robin(turns, repeats=settings.repeats, seconds=settings.seconds, multiple=multiple)
    measured = []
    for case, taken in zip(cases, times, strict=True):
        each = [microseconds / case.calls for microseconds in taken]
        measured.append(
            summarize(
                case.library,
                operation,
                each,
                capacity=settings.capacity if capacity is None else capacity,
                batch=batch,
                threads=settings.threads,
                rows=rows,
                per_second=1e6 / float(np.median(each)) if rate else None,
                **case.extra,
            )
        )
    return measured


def make_ours(capacity: int, sizes: Sizes = USUAL, threads: int = 1) -> tuple[list[Angle], list[str]]:
    """Ours on each engine of this version, all on one replay, and a line for each that there is not."""
    first = Angle(capacity, sizes, engine="torch", threads=threads)
    made, notes = [first], []
    replay = first.state.replay
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        (NATIVE, {}),
        (f"{NATIVE}, {UPDATES_A_CALL} updates a call", {"updates": UPDATES_A_CALL}),
        (BFLOAT16, {"precision": "bfloat16"}),
    )
    for name, fields in variants:
        try:
            learner = Angle(capacity, sizes, engine="native", threads=threads, replay=replay, **fields)
        except Exception as failure:
            if name == NATIVE:
                notes.append(f"{NATIVE}: not in this build ({in_short(failure)})")
                break
            notes.append(f"{name}: {in_short(failure)}")
            continue
        learner.name = BFLOAT16 if name == BFLOAT16 else NATIVE
        made.append(learner)
    return made, notes


def check_ours(learners: Sequence[Angle], threads: int) -> None:
    """RuntimeError unless every engine's updates are torch's."""
    for learner in learners:
        if learner.name == NATIVE and learner.updates == 1:
            check_engine("native", threads=threads)
        elif learner.name == BFLOAT16:
            check_engine("native", threads=threads, tolerance=BFLOAT16_TOLERANCE, precision="bfloat16")


def checked(learners: Sequence[Learner], rows: Rows) -> tuple[list[Learner], list[str]]:
    """The learners, filled, that pass their check, and a line for each other. RuntimeError where ours does not."""
    reasons = [_fault(learner, rows) for learner in learners]
    good = [learner for learner, why in zip(learners, reasons, strict=True) if why is None]
    return good, [why for why in reasons if why is not None]


def _fault(learner: Learner, rows: Rows) -> str | None:
    try:
        learner.fill(rows)
        check_learner(learner)
    except Exception as failure:  # a peer may fail in any way of its own
        if isinstance(learner, Angle):
            raise
        return f"{learner.name}: {in_short(failure).removeprefix(f'{learner.name}: ')}"
    return None


def make_sbx(settings: Settings, **options: Any) -> tuple[Sbx | None, str | None]:
    """SBX filled and checked, or a line saying why not."""
    sbx = None
    try:
        sbx = Sbx(settings.sbx_python)
        sbx.make(settings.capacity, Sizes(batch=settings.batch), **options)
    except RuntimeError as failure:
        if sbx is not None:
            sbx.close()
        return None, f"sbx in {Path(settings.sbx_python).name}: {in_short(failure)}"
    return sbx, None


def of_calls(updates: int) -> dict[str, Any]:
    """The remark that a row gets which takes several updates a call."""
    return {} if updates == 1 else {"updates_a_call": updates}
