"""Runs SBX's SAC in an interpreter of its own, which needs sbx-rl and gymnasium[mujoco], but not this package.

Started by path; reads one JSON command a line from standard input and answers one JSON line:

- ``{"make": capacity, "batch": n, "hidden_sizes": [...], "critics": n, "updates": [1, 32], "environment": id}`` makes,
  fills and checks a learner for each number of updates a call, all on one replay;
- ``{"run": operation, "updates": k, "iterations": n}`` answers the seconds that so many calls took.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import warnings
from typing import Any

TAU = 0.005


class Worker:
    """SBX's SAC at its defaults, without learning starts; HalfCheetah's observations [17] and actions [6]."""

    def __init__(self, command: dict[str, Any]) -> None:
        import jax
        import numpy as np
        from sbx import SAC
        from stable_baselines3.common.logger import configure

        self.jax, self.np, self.batch = jax, np, command["batch"]
        self.models: dict[int, Any] = {}
        for updates in command["updates"]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = SAC(
                    "MlpPolicy",
                    self.environment(command["environment"]),
                    buffer_size=command["make"] if not self.models else 1,
                    batch_size=self.batch,
                    tau=TAU,
                    learning_starts=0,
                    train_freq=updates,
                    gradient_steps=updates,
                    policy_kwargs={"net_arch": list(command["hidden_sizes"]), "n_critics": command["critics"]},
                    seed=0,
                )
            model.set_logger(configure(None, []))
            if self.models:
                model.replay_buffer = next(iter(self.models.values())).replay_buffer
            self.models[updates] = model
        self.fill(next(iter(self.models.values())).replay_buffer)
        for updates, model in self.models.items():
            self.check(model, updates)

    def environment(self, name: str | None) -> Any:
        """The environment; None: one with its spaces that cannot be stepped."""
        import gymnasium

        if name is not None:
            return gymnasium.make(name)
        np = self.np

        class Spaces(gymnasium.Env[Any, Any]):
            observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float64)
            action_space = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)

        return Spaces()

    def fill(self, buffer: Any) -> None:
        """Random rows, as many as it holds."""
        generator = self.np.random.default_rng(0)
        n = buffer.buffer_size
        buffer.observations[:n, 0] = generator.standard_normal((n, 17), dtype=self.np.float32)
        buffer.next_observations[:n, 0] = generator.standard_normal((n, 17), dtype=self.np.float32)
        buffer.actions[:n, 0] = generator.uniform(-1, 1, (n, 6))
        buffer.rewards[:n, 0] = generator.standard_normal(n, dtype=self.np.float32)
        buffer.dones[:n, 0] = 0.0
        buffer.pos, buffer.full = 0, True

    def learned(self, model: Any) -> dict[str, list[Any]]:
        """The parameters as NumPy arrays."""
        parts = {
            "policy": model.policy.actor_state.params,
            "critics": model.policy.qf_state.params,
            "targets": model.policy.qf_state.target_params,
        }
        return {
            name: [self.np.array(leaf) for leaf in self.jax.tree_util.tree_leaves(tree)] for name, tree in parts.items()
        }

    def check(self, model: Any, updates: int) -> None:
        """RuntimeError unless a call changes everything, stays finite, and one update moves the targets by tau."""
        np = self.np
        before = self.learned(model)
        model.train(gradient_steps=updates, batch_size=self.batch)
        after = self.learned(model)
        for name, arrays in after.items():
            for old, new in zip(before[name], arrays, strict=True):
                if not np.isfinite(new).all() or (old == new).all():
                    raise RuntimeError(f"{updates} updates left the {name} unchanged or not finite")
        if updates == 1:
            for old, new, online in zip(before["targets"], after["targets"], after["critics"], strict=True):
                if not np.allclose(new, TAU * online + (1 - TAU) * old, rtol=1e-4, atol=1e-6):
                    raise RuntimeError("the targets did not move by tau")

    def run(self, operation: str, updates: int, iterations: int) -> float:
        """Seconds that so many calls took; each is `updates` updates or training steps, or one action."""
        model = self.models[updates]
        observation = self.np.zeros(17, self.np.float32)
        start = time.perf_counter()
        if operation == "train_step":
            model.learn(total_timesteps=iterations * updates, reset_num_timesteps=False, log_interval=None)
        elif operation == "select_action":
            for _ in range(iterations):
                model.predict(observation, deterministic=False)
        else:
            for _ in range(iterations):
                model.train(gradient_steps=updates, batch_size=self.batch)
        self.jax.block_until_ready(model.policy.qf_state.params)
        self.jax.block_until_ready(model.policy.actor_state.params)
        return time.perf_counter() - start


def main() -> None:
    sys.path.pop(0)  # this file's folder, whose names are not meant for this interpreter
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "make" in command:
                worker = None  # gives its memory back first
                worker = Worker(command)
                names = ("sbx-rl", "jax", "stable-baselines3")
                answer: dict[str, Any] = {name: importlib.metadata.version(name) for name in names}
            elif worker is None:
                answer = {"error": "no learner has been made"}
            else:
                answer = {"seconds": worker.run(command["run"], command["updates"], command["iterations"])}
        except Exception as failure:
            answer = {"error": (str(failure).strip() or type(failure).__name__).splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
