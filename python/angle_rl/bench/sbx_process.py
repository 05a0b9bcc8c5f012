"""SBX (SAC in jax), driven through an interpreter that has it (see sbx_worker.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from angle_rl.bench.learners import ENVIRONMENT, USUAL, Sizes
from angle_rl.bench.timing import Clock
from angle_rl.bench.worker_process import WorkerProcess

WORKER = Path(__file__).with_name("sbx_worker.py")
UPDATES = (1, 32)  # updates a call


class Sbx:
    """SBX's learners in another process, which waits while nothing is asked of it."""

    name = "sbx"

    def __init__(self, python: str) -> None:
        """Starts ``python``; RuntimeError when it does not start."""
        self.worker = WorkerProcess(python, WORKER)
        self.versions: dict[str, str] = {}

    def make(
        self,
        capacity: int,
        sizes: Sizes = USUAL,
        *,
        updates: Sequence[int] = UPDATES,
        environment: str | None = ENVIRONMENT,
    ) -> None:
        """Makes, fills and checks anew; RuntimeError saying why when that interpreter cannot.

        `environment` None: training steps are not asked for, and no simulator is needed.
        """
        asked = {"make": capacity, "updates": list(updates), "environment": environment, **dataclasses.asdict(sizes)}
        self.versions = self.worker.ask(asked)

    def clock(self, operation: str, updates: int = 1) -> Clock:
        """The clock of ``learner_update``, ``train_step`` or ``select_action``, so many updates or steps a call."""

        def run(iterations: int) -> float:
            asked = {"run": operation, "updates": updates, "iterations": iterations}
            return float(self.worker.ask(asked)["seconds"])

        return run

    def close(self) -> None:
        """Ends the process."""
        self.worker.close()
