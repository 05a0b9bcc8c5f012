"""flashbax, driven through an interpreter that has it (see flashbax_worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from angle_rl.bench.timing import Clock

OPERATIONS = ("insert", "insert_batch", "sample", "update", "cycle", "uniform_sample")
WORKER = Path(__file__).with_name("flashbax_worker.py")


class Flashbax:
    """flashbax's buffers in another process, which waits while nothing is asked of it."""

    name = "flashbax"
    gives = "jax"

    def __init__(self, python: str, capacity: int, batch: int) -> None:
        """Starts ``python``, fills and checks; RuntimeError saying why when that interpreter cannot."""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        try:
            self.process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as failure:
            raise RuntimeError(f"{python} does not start: {failure}") from failure
        try:
            self.versions = self._ask({"make": capacity, "batch": batch})
        except RuntimeError:
            self.close()
            raise

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError as failure:
            raise RuntimeError(f"its process ended: {failure}") from failure
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("its process ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def clock(self, operation: str) -> Clock:
        """The clock of one of OPERATIONS."""

        def run(iterations: int) -> float:
            return float(self._ask({"run": operation, "iterations": iterations})["seconds"])

        return run

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
