"""``angle bench meta``: what meta steps add to the updates between them."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from angle_rl.bench.goals import Verdict, as_dicts, goals_table
from angle_rl.bench.learners import Angle, random_rows
from angle_rl.bench.report import Row, publish
from angle_rl.bench.timing import clock, one_setting
from angle_rl.bench.update_cases import Case, Settings, measure
from angle_rl.config import AgentConfig, Service, Training
from angle_rl.meta_trainer import LEARNERS, MetaLearnerTrainer

INTERVALS = (1, 10, 100)
GOALS = {("entropy", 10): 0.40, ("entropy", 100): 0.05}
"""The share of the plain updates' time that meta steps may add, by learner and interval"""


def variants(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Library, learner and engine of everything that is measured, the plain updates first."""
    every = [("angle-native", "none", "native"), ("angle-torch", "none", "torch")]
    every += [("angle-native", name, "native") for name in names]
    return every + [("angle-torch", name, "torch") for name in names if name == "critic"]


def make(learner: str, engine: str, interval: int, settings: Settings) -> Angle:
    """SAC at HalfCheetah's sizes with a meta step every `interval` updates; its entropy coefficient is fixed."""
    meta: Any = None
    fields: dict[str, Any] = {"entropy_coefficient": 0.2}
    if learner != "none":
        folder = tempfile.gettempdir()
        config = AgentConfig(training=Training(), service=Service(run_folder=folder)).replace(meta=learner, **fields)
        meta = MetaLearnerTrainer(config)
        fields["meta_update_interval"] = interval
    return Angle(settings.capacity, engine=engine, threads=settings.threads, meta=meta, **fields)


def several(call: Callable[[], object], times: int) -> Callable[[], None]:
    """A call that is so many of another."""

    def run() -> None:
        for _ in itertools.repeat(None, times):
            call()

    return run


def check(learner: Angle, interval: int) -> None:
    """RuntimeError unless meta steps come as often as they should, and teach something."""
    meta = learner.state.meta
    if meta is None:
        return
    before = meta.meta_steps
    several(learner.update, 2 * interval)()
    if meta.meta_steps - before != 2 or meta.skipped_meta_steps:
        raise RuntimeError(f"{meta.meta_steps - before} meta steps, {meta.skipped_meta_steps} skipped; 2 were due")
    if not all(one.has_learned() for one in meta.learners):
        raise RuntimeError("a meta step has changed no meta-parameter")


def meta_rows(names: Sequence[str], settings: Settings) -> list[Row]:
    """``meta_update``: an update with its part of a meta step, in microseconds."""
    rows: list[Row] = []
    given = random_rows(settings.capacity)
    for interval in INTERVALS:
        print(f"{settings.threads} threads: every {interval}", file=sys.stderr, flush=True)
        cases = []
        for library, learner, engine in variants(names):
            made = make(learner, engine, interval, settings)
            made.fill(given)
            check(made, interval)
            extra = {"learner": learner, "interval": interval}
            cases.append(Case(library=library, run=clock(several(made.update, interval)), calls=interval, extra=extra))
        found = measure("meta_update", cases, settings, batch=settings.batch, multiple=1)
        plain = {row.library: row.median_us for row in found if row.extra["learner"] == "none"}
        rows += [_with_share(row, plain[row.library]) for row in found]
    return rows


def _with_share(row: Row, plain: float) -> Row:
    if row.extra["learner"] == "none":
        return row
    return replace(row, extra={**row.extra, "share": row.median_us / plain - 1.0})


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal against the rows of one thread."""
    shares = {
        (row.extra["learner"], row.extra["interval"]): row.extra["share"]
        for row in rows
        if row.library == "angle-native" and "share" in row.extra and row.threads == 1
    }
    return [
        Verdict(
            work=f"meta steps of {learner} every {interval} updates, of the plain updates' time",
            unit="share",
            measured=shares.get((learner, interval)),
            limit=limit,
            at_least=False,
        )
        for (learner, interval), limit in GOALS.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with these arguments (default: the process's) and returns the exit status."""
    parser = argparse.ArgumentParser(prog="angle bench meta", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--quick", action="store_true", help="few short rounds")
    parser.add_argument("--learner", choices=tuple(LEARNERS), action="append", help="only these (default: all)")
    given = parser.parse_args(argv)
    settings = Settings(
        capacity=10_000 if given.quick else 100_000,
        batch=256,
        threads=1,
        repeats=3 if given.quick else 9,
        seconds=0.05 if given.quick else 1.0,
        quick=given.quick,
        sections=(),
        sbx_python=sys.executable,
    )
    with one_setting(settings.threads):
        rows = meta_rows(given.learner or tuple(LEARNERS), settings)
    verdicts = judge(rows)
    publish(rows, [], given.json, texts=[goals_table(verdicts)], parts={"goals": as_dicts(verdicts)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
