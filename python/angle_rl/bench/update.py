"""``angle bench update``: one SAC update and one whole training step, beside others and the floor."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angle_rl.bench.eager import check_same_numbers
from angle_rl.bench.learners import (
    ENVIRONMENT,
    Learner,
    StableBaselines3,
    check_learner,
    ours_and_eager,
    random_rows,
)
from angle_rl.bench.products import best_product, floor_clock, sac_flops
from angle_rl.bench.replay import at_least_one
from angle_rl.bench.report import FLOOR, Row, publish, summarize
from angle_rl.bench.timing import Clock, clock, one_setting, round_robin


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of this benchmark."""

    capacity: int  # rows the replays hold, all filled, >= batch
    batch: int  # rows an update learns on, >= 1
    threads: int  # torch's threads and cores, >= 1
    repeats: int  # rounds over the learners, >= 1
    seconds: float  # length of one learner's turn in a round


def make_learners(capacity: int, batch: int) -> tuple[list[Learner], list[str]]:
    """The learners, filled and checked, and a line for each that there is not."""
    rows = random_rows(capacity)
    learners: list[Learner] = [make(capacity, batch) for make in ours_and_eager()]
    notes: list[str] = []
    try:
        learners.append(StableBaselines3(capacity, batch))
    except Exception as failure:  # a peer may fail in any way of its own
        notes.append(f"stable-baselines3: {str(failure).splitlines()[0]}")
    for learner in learners:
        learner.fill(rows)
        check_learner(learner)
    return learners, notes


def run(settings: Settings) -> tuple[list[Row], list[str], dict[str, Any]]:
    """Checks and times every learner: rows, a line per learner there is not, and the floor's details."""
    with one_setting(settings.threads):
        check_same_numbers()
        learners, notes = make_learners(settings.capacity, settings.batch)
        name, rate, product = best_product()
        dense, minimum_critic = sac_flops(batch=settings.batch)
        about = {
            "update_flops": dense,
            "update_flops_minimum_critic_only": minimum_critic,
            "best_product": name,
            "best_product_gflops": rate / 1e9,
        }

        def measure(operation: str, clocks: dict[str, Clock]) -> list[Row]:
            times = round_robin(list(clocks.values()), repeats=settings.repeats, seconds=settings.seconds, multiple=2)
            return [
                summarize(
                    library,
                    operation,
                    taken,
                    capacity=settings.capacity,
                    batch=settings.batch,
                    threads=settings.threads,
                    product=name if library == FLOOR else None,
                )
                for library, taken in zip(clocks, times, strict=True)
            ]

        floor: dict[str, Clock] = {FLOOR: floor_clock(product, dense)}
        rows = measure("learner_update", floor | {learner.name: clock(learner.update) for learner in learners})
        try:
            steppers = {learner.name: learner.stepper() for learner in learners}
        except Exception as failure:  # the simulator may be missing or fail in any way of its own
            notes.append(f"env_step, since {ENVIRONMENT} cannot be made: {str(failure).splitlines()[0]}")
        else:
            rows += measure("env_step", steppers)
    return rows, notes, about


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status."""
    parser = argparse.ArgumentParser(prog="angle bench update", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--quick", action="store_true", help="under a minute: 10,000 rows, few short rounds")
    parser.add_argument("--capacity", type=at_least_one, help="rows a replay holds, filled (default 1,000,000)")
    parser.add_argument("--batch", type=at_least_one, default=256, help="rows an update learns on (default 256)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="torch's threads, and cores")
    parser.add_argument("--repeats", type=at_least_one, help="rounds over the learners (default 9)")
    given = parser.parse_args(argv)
    settings = Settings(
        capacity=given.capacity or (10_000 if given.quick else 1_000_000),
        batch=given.batch,
        threads=given.threads,
        repeats=given.repeats or (3 if given.quick else 9),
        seconds=0.2 if given.quick else 2.0,
    )
    if settings.capacity < settings.batch:
        parser.error(f"--capacity is {settings.capacity}; it must be at least {settings.batch}")
    rows, notes, about = run(settings)
    publish(rows, notes, given.json, **about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
