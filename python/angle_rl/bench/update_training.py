"""Whole training steps of AgentTrainer, a given number at a time, so that others can take turns with it."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from typing import Any

import gymnasium

from angle_rl.config import AgentConfig, Service
from angle_rl.trainer import AgentTrainer

WAIT = 600.0  # seconds without a step after which a trainer counts as stuck


class Closed(Exception):
    """Ends a trainer from within its environment."""


class Gate(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that steps only as often as it is let."""

    def __init__(self, environment: gymnasium.Env[Any, Any]) -> None:
        super().__init__(environment)
        self.left = 0  # steps still let through
        self.open, self.idle = threading.Event(), threading.Event()
        self.closed = False

    def step(self, action: Any) -> Any:
        if self.left == 0:
            self.idle.set()
            self.open.wait()
            self.open.clear()
            if self.closed:
                raise Closed
        self.left -= 1
        return self.env.step(action)


class TrainerSteps:
    """A clock of an AgentTrainer's steps, ``steps_a_call`` an iteration, each with its update.

    The trainer runs in a thread of its own, with its feed, its metrics and everything; between two runs its
    environment waits. A run ends when all of its updates are done, too.
    """

    def __init__(self, config: AgentConfig, replay: Any, steps_a_call: int = 1, **options: Any) -> None:
        self.steps_a_call = steps_a_call
        self.gate = Gate(gymnasium.make(config.training.environment))
        self.folder = tempfile.TemporaryDirectory(prefix="angle-bench-")
        service = Service(
            run_folder=self.folder.name, tensorboard=False, progress=False, checkpoint_interval=None, log_interval=1000
        )
        whole = AgentConfig(hyperparameters=config.hyperparameters, training=config.training, service=service)
        self.trainer = AgentTrainer(
            whole, feed=self.gate, replay=replay, evaluation_feed=config.training.environment, **options
        )
        self.failure: BaseException | None = None
        self.released = 0
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        try:
            self._wait()
        except BaseException:
            self.folder.cleanup()
            raise

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as failure:
            self.failure = failure
            self.gate.idle.set()

    def _wait(self) -> None:
        """Until the environment waits again and the updates that its steps call for are done."""
        if not self.gate.idle.wait(WAIT):
            raise RuntimeError("the trainer is stuck")
        patience = time.perf_counter() + WAIT
        while self.failure is None and self.trainer.updates + self.trainer.skipped_updates + self.steps_a_call <= (
            self.released
        ):
            if time.perf_counter() > patience:
                raise RuntimeError(f"{self.trainer.updates} updates after {self.released} steps")
            time.sleep(5e-5)
        if self.failure is not None and not isinstance(self.failure, Closed):
            raise RuntimeError(f"the trainer failed: {self.failure}") from self.failure

    def __call__(self, iterations: int) -> float:
        """Runs so many iterations; seconds."""
        steps = iterations * self.steps_a_call
        self.released += steps
        self.gate.idle.clear()
        self.gate.left = steps
        start = time.perf_counter()
        self.gate.open.set()
        self._wait()
        return time.perf_counter() - start

    def close(self) -> None:
        """Ends the trainer."""
        self.gate.closed = True
        self.gate.open.set()
        self.thread.join(WAIT)
        with contextlib.suppress(OSError):
            self.folder.cleanup()
        self.gate.close()
