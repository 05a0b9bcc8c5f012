"""What one process of ``angle bench update`` measures, with a given number of threads and cores.

``python -m angle_rl.bench.update_measure SETTINGS OUTPUT``: settings as JSON, rows as JSON into a file. The cores that
it was started on are all that it uses.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl.bench.eager import check_same_numbers
from angle_rl.bench.learners import ENVIRONMENT, Angle, Learner, Sizes, eager, random_rows
from angle_rl.bench.peers import in_short
from angle_rl.bench.products import best_product, floor_clock, sac_flops
from angle_rl.bench.report import FLOOR
from angle_rl.bench.rows import OBSERVATION
from angle_rl.bench.sbx_process import Sbx
from angle_rl.bench.timing import clock, one_setting
from angle_rl.bench.update_cases import (
    UPDATES_A_CALL,
    Case,
    Found,
    Settings,
    check_ours,
    checked,
    make_ours,
    make_sbx,
    measure,
    of_calls,
    tell,
)
from angle_rl.bench.update_peers import environment_missing, peers
from angle_rl.bench.update_sweeps import sweep_rows
from angle_rl.trainer import AgentTrainer


@contextlib.contextmanager
def all_learners(settings: Settings, found: Found) -> Iterator[tuple[list[Learner], Sbx | None]]:
    """Everybody, filled and checked; a note for each that there is not."""
    check_same_numbers()
    ours, notes = make_ours(settings.capacity, Sizes(batch=settings.batch), settings.threads)
    check_ours(ours, settings.threads)
    others, missing = peers(settings.capacity, settings.batch)
    every: list[Learner] = [*ours, *eager(settings.capacity, settings.batch), *others]
    learners, wrong = checked(every, random_rows(settings.capacity))
    gc.collect()
    sbx, why = make_sbx(settings, environment=None if environment_missing(ENVIRONMENT) else ENVIRONMENT)
    found.notes += [*notes, *missing, *wrong, *([why] if why else [])]
    if sbx is not None:
        found.about["sbx"] = sbx.versions
    try:
        yield learners, sbx
    finally:
        for learner in learners:
            learner.close()
        if sbx is not None:
            sbx.close()


def sbx_cases(sbx: Sbx | None, operation: str) -> list[Case]:
    """SBX's way of an operation, at each number of updates a call."""
    if sbx is None:
        return []
    numbers = (1,) if operation == "select_action" else (1, UPDATES_A_CALL)
    return [Case(library=sbx.name, run=sbx.clock(operation, k), calls=k, extra=of_calls(k)) for k in numbers]


def update_rows(learners: Sequence[Learner], sbx: Sbx | None, settings: Settings, found: Found) -> None:
    """``learner_update``, and the floor's."""
    tell(settings, "learner_update")
    product, rates = best_product(seconds=settings.seconds / 4, threads=settings.threads)
    dense, necessary = sac_flops(batch=settings.batch)
    found.about |= {
        "update_flops": necessary,
        "update_flops_dense": dense,
        f"product_gflops_{settings.threads}": {name: rate / 1e9 for name, rate in rates.items()},
    }
    cases = [Case(library=FLOOR, run=floor_clock(product, necessary), extra={"product": product.name})]
    cases += [
        Case(
            library=learner.name,
            run=clock(learner.update),
            calls=learner.updates,
            extra=of_calls(learner.updates),
        )
        for learner in learners
    ]
    found.rows += measure("learner_update", cases + sbx_cases(sbx, "learner_update"), settings, batch=settings.batch)


def training_rows(learners: Sequence[Learner], sbx: Sbx | None, settings: Settings, found: Found) -> None:
    """``train_step``: the environment's step and an update each."""
    why = environment_missing(ENVIRONMENT)
    if why is not None:
        found.notes.append(f"train_step, since {ENVIRONMENT} cannot be made: {why}")
        return
    tell(settings, "train_step")
    overlaps = "overlap" in inspect.signature(AgentTrainer).parameters
    cases: list[Case] = []
    for learner in learners:
        options: list[dict[str, Any]] = [{}]
        if isinstance(learner, Angle) and overlaps and learner.name != "angle-torch":
            options.append({"overlap": True})
        for option in options:
            try:
                run = learner.steps(**option)
            except Exception as failure:
                found.notes.append(f"train_step of {learner.name} {option or ''}: {in_short(failure)}")
                continue
            extra = of_calls(learner.updates) | option
            cases.append(Case(library=learner.name, run=run, calls=learner.updates, extra=extra))
    cases += sbx_cases(sbx, "train_step")
    found.rows += measure("train_step", cases, settings, batch=settings.batch, rate=True)
    for learner in learners:
        learner.close()


def acting_rows(learners: Sequence[Learner], sbx: Sbx | None, settings: Settings, found: Found) -> None:
    """``act``: the policy's forward pass for one observation. ``select_action``: all of choosing one action."""
    tell(settings, "act")
    settings = replace(settings, seconds=settings.seconds / 4)
    ours = [learner for learner in learners if isinstance(learner, Angle) and learner.updates == 1]
    calls: list[tuple[str, Callable[[], object]]] = []
    for learner in ours:
        own, plain = learner.forward()
        calls += [(learner.name, own)] + ([("torch", plain)] if learner is ours[0] else [])
    cases = [Case(library=name, run=clock(call)) for name, call in calls]
    found.rows += measure("act", cases, settings, batch=1)
    observation = np.random.default_rng(0).standard_normal(OBSERVATION).astype(np.float32)

    def choosing(learner: Learner) -> Callable[[], object]:
        return lambda: learner.choose(observation)

    cases = [Case(library=learner.name, run=clock(choosing(learner))) for learner in learners if learner.updates == 1]
    found.rows += measure("select_action", cases + sbx_cases(sbx, "select_action"), settings, batch=1)


def run(settings: Settings) -> Found:
    """Checks and times what the settings ask for."""
    found = Found()
    parts = {"table": update_rows, "training": training_rows, "act": acting_rows}
    with one_setting(settings.threads):
        if set(parts) & set(settings.sections):
            with all_learners(settings, found) as (learners, sbx):
                for name, part in parts.items():
                    if name in settings.sections:
                        part(learners, sbx, settings, found)
            del learners, sbx
            gc.collect()
        if "sweeps" in settings.sections:
            sweep_rows(settings, found)
    return found


def main() -> int:
    """Runs with the process's arguments."""
    given = json.loads(sys.argv[1])
    settings = Settings(**{**given, "sections": tuple(given["sections"])})
    Path(sys.argv[2]).write_text(run(settings).to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
