"""SAC at HalfCheetah's sizes, by our library and by others: one update, and one whole step of training."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from angle_rl.agents import SAC
from angle_rl.bench.eager import TAU, CleanRLStyle, TunedTorch
from angle_rl.bench.libraries import spaces
from angle_rl.bench.rows import ACTION, OBSERVATION, Rows
from angle_rl.bench.timing import Clock
from angle_rl.config import AgentConfig, Hyperparameters, Training
from angle_rl.types import EnvironmentState, RandomKey, RLState

ENVIRONMENT = "HalfCheetah-v5"


class Learner(Protocol):
    """One SAC under test."""

    name: str
    multiple: int  # updates after which its mix of critic and policy steps repeats

    def fill(self, rows: Rows) -> None:
        """Fills the replay with as many rows as it holds."""

    def update(self) -> object:
        """On average one step each of the critics, the policy, the entropy coefficient and the targets."""

    def critics(self) -> list[torch.Tensor]:
        """The critics' parameters."""

    def targets(self) -> list[torch.Tensor]:
        """The target critics' parameters, in the critics' order."""

    def policy(self) -> list[torch.Tensor]:
        """The policy's parameters."""

    def stepper(self) -> Clock:
        """A clock of whole training steps: act, step the environment, store the row, update."""


def random_rows(count: int) -> Rows:
    """Rows as a standardised HalfCheetah might give them."""
    generator = np.random.default_rng(0)
    return Rows(
        observations=generator.standard_normal((count, OBSERVATION), dtype=np.float32),
        actions=generator.uniform(-1, 1, (count, ACTION)).astype(np.float32),
        rewards=generator.standard_normal(count, dtype=np.float32),
        next_observations=generator.standard_normal((count, OBSERVATION), dtype=np.float32),
        terminated=np.zeros(count, dtype=np.bool_),
    )


class AngleTorch:
    """Ours: agents.SAC with its defaults, so with prioritised replay, on the torch engine."""

    name = "angle-torch"
    multiple = 1

    def __init__(self, capacity: int, batch: int) -> None:
        config = AgentConfig(
            hyperparameters=Hyperparameters(
                agent="sac", batch_size=batch, tau=TAU, replay_capacity=capacity, learning_starts=0
            ),
            training=Training(environment=ENVIRONMENT, engine="torch"),
        )
        observation_space, action_space = spaces()
        self.agent = SAC(config)
        self.state, self.key = self.agent.init(
            RandomKey(0), observation_space=observation_space, action_space=action_space
        )

    def fill(self, rows: Rows) -> None:
        self.state.replay.insert(*rows)

    def update(self) -> object:
        now, self.key = self.key.split(2)
        return self.state.engine.update(now, 1)

    def critics(self) -> list[torch.Tensor]:
        return list(self.state.critics.parameters())

    def targets(self) -> list[torch.Tensor]:
        return list(self.state.target_critics.parameters())

    def policy(self) -> list[torch.Tensor]:
        return list(self.state.policy.parameters())

    def stepper(self) -> Clock:
        environment = gymnasium.make(ENVIRONMENT)
        none, stepped = np.zeros(1, np.bool_), np.ones(1, np.bool_)

        def seen(observation: Any, final: Any, reward: float, terminated: bool, truncated: bool) -> EnvironmentState:
            return EnvironmentState(
                observation=np.asarray(observation, np.float32)[None],
                reward=np.array([reward]),
                terminated=np.array([terminated]) if terminated else none,
                truncated=np.array([truncated]) if truncated else none,
                final_observation=np.asarray(final, np.float32)[None],
                stepped=stepped,
            )

        observation, _ = environment.reset(seed=0)
        first = seen(observation, observation, 0.0, False, False)
        state = RLState(self.state, first, self.key, iteration=0, episode=0, trajectory=None)
        agent = self.agent

        def run(iterations: int) -> float:
            nonlocal state
            start = time.perf_counter()
            for _ in range(iterations):
                action, state = agent.select_action(state, state.iteration)
                following, reward, terminated, truncated, _ = environment.step(action[0])
                final = following
                if terminated or truncated:
                    following, _ = environment.reset()
                after = state._replace(
                    environment_state=seen(following, final, float(reward), terminated, truncated),
                    iteration=state.iteration + 1,
                )
                recorded = agent.record_observation(
                    state, action, after.environment_state.reward, after.environment_state.terminated, after
                )
                state = agent.optimize_model(recorded)
            return time.perf_counter() - start

        return run


class Eager:
    """One of the eager implementations."""

    def __init__(self, kind: type[CleanRLStyle] | type[TunedTorch], capacity: int, batch: int) -> None:
        self.batch = batch
        self.learner = kind(capacity)
        self.name = kind.name
        self.multiple = 2 if kind is CleanRLStyle else 1
        self.fill, self.critics = self.learner.fill, self.learner.critics
        self.targets, self.policy = self.learner.targets, self.learner.policy

    def update(self) -> object:
        self.learner.update(self.batch)
        return None

    def stepper(self) -> Clock:
        environment = gymnasium.make(ENVIRONMENT)
        observation, _ = environment.reset(seed=0)
        learner, batch = self.learner, self.batch

        def run(iterations: int) -> float:
            nonlocal observation
            start = time.perf_counter()
            for _ in range(iterations):
                action = learner.act(observation)
                following, reward, terminated, truncated, _ = environment.step(action)
                learner.store(observation, action, float(reward), following, terminated)
                observation = environment.reset()[0] if terminated or truncated else following
                learner.update(batch)
            return time.perf_counter() - start

        return run


class StableBaselines3:
    """Stable-Baselines3's SAC at its defaults, without learning starts."""

    name = "stable-baselines3"
    multiple = 1

    def __init__(self, capacity: int, batch: int) -> None:
        from stable_baselines3 import SAC as PeerSAC
        from stable_baselines3.common.logger import configure

        self.batch = batch
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.model = PeerSAC(
                "MlpPolicy",
                gymnasium.make(ENVIRONMENT),
                buffer_size=capacity,
                batch_size=batch,
                tau=TAU,
                learning_starts=0,
                device="cpu",
                seed=0,
            )
        self.model.set_logger(configure(None, []))

    def fill(self, rows: Rows) -> None:
        buffer = self.model.replay_buffer
        n = len(rows.rewards)
        buffer.observations[:n, 0], buffer.next_observations[:n, 0] = (
            rows.observations,
            rows.next_observations,
        )
        buffer.actions[:n, 0], buffer.rewards[:n, 0], buffer.dones[:n, 0] = rows.actions, rows.rewards, 0.0
        buffer.pos, buffer.full = n % buffer.buffer_size, n == buffer.buffer_size

    def update(self) -> object:
        return self.model.train(gradient_steps=1, batch_size=self.batch)

    def critics(self) -> list[torch.Tensor]:
        return list(self.model.critic.parameters())

    def targets(self) -> list[torch.Tensor]:
        return list(self.model.critic_target.parameters())

    def policy(self) -> list[torch.Tensor]:
        return list(self.model.actor.parameters())

    def stepper(self) -> Clock:
        model = self.model

        def run(iterations: int) -> float:
            start = time.perf_counter()
            model.learn(total_timesteps=iterations, reset_num_timesteps=False, log_interval=None)
            return time.perf_counter() - start

        return run


def ours_and_eager() -> list[Callable[[int, int], Learner]]:
    """The learners that need nothing but this package."""
    return [
        AngleTorch,
        lambda capacity, batch: Eager(CleanRLStyle, capacity, batch),
        lambda capacity, batch: Eager(TunedTorch, capacity, batch),
    ]


def check_learner(learner: Learner) -> None:
    """RuntimeError unless updates change everything, stay finite, and move the targets by tau."""
    parts = {"policy": learner.policy(), "critics": learner.critics(), "targets": learner.targets()}
    before = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in parts.items()}
    for _ in range(learner.multiple):
        slow = [tensor.detach().clone() for tensor in learner.targets()]
        learner.update()
        for target, old, online in zip(learner.targets(), slow, learner.critics(), strict=True):
            if not torch.allclose(target, TAU * online + (1 - TAU) * old, rtol=1e-4, atol=1e-6):
                raise RuntimeError(f"{learner.name}: the targets did not move by tau")
    for name, tensors in parts.items():
        moved = [not torch.equal(tensor, old) for tensor, old in zip(tensors, before[name], strict=True)]
        if not all(moved) or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise RuntimeError(f"{learner.name}: an update left the {name} unchanged or not finite")
