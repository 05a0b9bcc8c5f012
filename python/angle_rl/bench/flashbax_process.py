"""flashbax, driven through an interpreter that has it (see flashbax_worker.py)."""

from __future__ import annotations

from pathlib import Path

from angle_rl.bench.timing import Clock
from angle_rl.bench.worker_process import WorkerProcess

OPERATIONS = ("insert", "insert_batch", "sample", "update", "cycle", "uniform_sample")
WORKER = Path(__file__).with_name("flashbax_worker.py")


class Flashbax:
    """flashbax's buffers in another process, which waits while nothing is asked of it."""

    name = "flashbax"
    gives = "jax"

    def __init__(self, python: str, capacity: int, batch: int) -> None:
        """Starts ``python``, fills and checks; RuntimeError saying why when that interpreter cannot."""
        self.worker = WorkerProcess(python, WORKER)
        try:
            self.versions = self.worker.ask({"make": capacity, "batch": batch})
        except RuntimeError:
            self.close()
            raise

    def clock(self, operation: str) -> Clock:
        """The clock of one of OPERATIONS."""

        def run(iterations: int) -> float:
            return float(self.worker.ask({"run": operation, "iterations": iterations})["seconds"])

        return run

    def close(self) -> None:
        """Ends the process."""
        self.worker.close()
