"""One update against width, depth, batch and critics, beside the floor of each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from angle_rl.bench.learners import USUAL, Learner, Sizes, StableBaselines3, random_rows
from angle_rl.bench.peers import in_short
from angle_rl.bench.products import best_product, floor_clock, sac_flops
from angle_rl.bench.report import FLOOR
from angle_rl.bench.timing import clock
from angle_rl.bench.update_cases import Case, Found, Settings, checked, make_ours, make_sbx, measure, tell

OPERATION = "learner_update_sweep"
CAPACITY = 50_000  # rows of the replays in the sweeps


@dataclass(frozen=True)
class Sweep:
    """One of the four, around the usual sizes."""

    name: str  # also the row's column or extra that it runs along
    values: tuple[int, ...]
    quick: tuple[int, ...]
    at: Callable[[int], Sizes]


SWEEPS = (
    Sweep("width", (64, 128, 256, 512, 1024), (64, 256), lambda n: replace(USUAL, hidden_sizes=(n, n))),
    Sweep("depth", (1, 2, 3, 4), (1, 2), lambda n: replace(USUAL, hidden_sizes=(256,) * n)),
    Sweep("batch", (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (32, 256), lambda n: replace(USUAL, batch=n)),
    Sweep("critics", (2, 4, 8, 16), (2, 4), lambda n: replace(USUAL, critics=n)),
)


def points(quick: bool) -> list[Sizes]:
    """Every sizes of the sweeps once, the usual ones first."""
    found = [sweep.at(n) for sweep in SWEEPS for n in (sweep.quick if quick else sweep.values)]
    return list(dict.fromkeys([USUAL, *found]))


def about(sizes: Sizes) -> dict[str, Any]:
    """The columns that a row of the sweeps has."""
    return {"width": sizes.hidden_sizes[0], "depth": len(sizes.hidden_sizes), "critics": sizes.critics}


def sweep_rows(settings: Settings, found: Found) -> None:
    """Ours on each engine, the peers whose sizes can be chosen, and the floor, at every point."""
    few = replace(settings, repeats=-(-settings.repeats // 2), seconds=settings.seconds / 4, capacity=CAPACITY)
    rows = random_rows(CAPACITY)
    sbx = None
    usual: list[str] = []
    if not settings.quick:
        sbx, _ = make_sbx(few, updates=(1,), environment=None)
    try:
        for sizes in points(settings.quick):
            tell(settings, f"{sizes}")
            ours, notes = make_ours(CAPACITY, sizes, settings.threads)
            if sizes != USUAL:  # what there is not for the usual sizes either, the table says
                found.notes += [f"{note}, with {sizes}" for note in notes if note not in usual]
            else:
                usual = notes
            learners: list[Learner] = [learner for learner in ours if learner.updates == 1]
            try:
                learners.append(StableBaselines3(CAPACITY, sizes))
            except Exception as failure:  # a peer may fail in any way of its own
                found.notes.append(f"stable-baselines3 with {sizes}: {in_short(failure)}")
            learners, wrong = checked(learners, rows)
            found.notes += [f"{why}, with {sizes}" for why in wrong]
            product, _ = best_product(
                few.seconds / 4, threads=settings.threads, width=max(sizes.hidden_sizes), batch=sizes.batch
            )
            flops = sac_flops(hidden_sizes=sizes.hidden_sizes, batch=sizes.batch, critics=sizes.critics)[1]
            extra = about(sizes)
            cases = [Case(library=FLOOR, run=floor_clock(product, flops), extra={**extra, "product": product.name})]
            cases += [Case(library=learner.name, run=clock(learner.update), extra=extra) for learner in learners]
            if sbx is not None:
                try:
                    sbx.make(CAPACITY, sizes, updates=(1,), environment=None)
                    cases.append(Case(library=sbx.name, run=sbx.clock("learner_update"), extra=extra))
                except RuntimeError as failure:
                    found.notes.append(f"sbx with {sizes}: {in_short(failure)}")
            net = f"{extra['depth']}x{extra['width']}, {sizes.critics} critics"
            found.rows += measure(OPERATION, cases, few, batch=sizes.batch, capacity=CAPACITY, rows=net, multiple=1)
            del learners, ours, cases
            gc.collect()
    finally:
        if sbx is not None:
            sbx.close()
