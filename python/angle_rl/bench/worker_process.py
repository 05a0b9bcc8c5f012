"""A worker in another interpreter, asked by one JSON line at a time."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class WorkerProcess:
    """A process that answers each JSON line on its input with one on its output, and waits otherwise."""

    def __init__(self, python: str, script: Path) -> None:
        """Starts ``python script``, with jax on the CPU; RuntimeError when that interpreter does not start."""
        try:
            self.process = subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        except OSError as failure:
            raise RuntimeError(f"{python} does not start: {failure}") from failure

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to a command; RuntimeError with what the worker says went wrong."""
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

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
