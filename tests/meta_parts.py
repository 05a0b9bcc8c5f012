"""Agents in float64 and inputs of meta steps, for the tests of meta-learning."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from angle_rl import AgentConfig, Hyperparameters, Training
from angle_rl.agents.sac import SAC
from angle_rl.agents.td3 import TD3
from angle_rl.feed import FunctionFeed
from angle_rl.meta import Learning, MetaInputs
from angle_rl.types import Batch, RandomKey

OBSERVATIONS = gymnasium.spaces.Box(-1, 1, (3,))
LOW, HIGH = np.float32([-2.0, -1.0]), np.float32([1.0, 3.0])
ACTIONS = gymnasium.spaces.Box(LOW, HIGH)
BOX = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)  # of `walk_feed`, observations and actions


class Bound:
    """Keeps what an agent shows to its meta trainer."""

    learning: Learning

    def bind(self, learning: Learning) -> None:
        self.learning = learning

    def update_meta_learning_model(self, states: Any, q: Any) -> None:
        """Nothing."""


def learning_of_agent(agent: str, *, double: bool = True, **hyperparameters: Any) -> Learning:
    """What a small agent shows, its networks in float64 and one Adam step old."""
    defaults: dict[str, Any] = {"hidden_sizes": (8, 8), "batch_size": 16, "activation": "tanh", "learning_rate": 0.05}
    settings = Hyperparameters(agent=agent, **(defaults | hyperparameters))
    config = AgentConfig(hyperparameters=settings, training=Training(engine="torch"))
    kind = {"sac": SAC, "td3": TD3}[agent]
    bound = Bound()
    state, _ = kind(config).init(RandomKey(1), observation_space=OBSERVATIONS, action_space=ACTIONS, meta=bound)
    if double:
        for name in state.networks:
            network = getattr(state, name)
            if network is not None:
                network.double()
    for name in ("policy", "critics"):
        generator = torch.Generator().manual_seed(3)
        for parameter in getattr(state, name).parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        state.optimizers[name].step()
        state.optimizers[name].zero_grad(set_to_none=True)
    return bound.learning


def batch_of(seed: int, rows: int = 16, dtype: torch.dtype = torch.float64) -> Batch:
    """Transitions made up from a seed."""
    generator = torch.Generator().manual_seed(seed)
    observations, following = (torch.rand(rows, 3, generator=generator, dtype=dtype) * 2 - 1 for _ in range(2))
    actions = torch.rand(rows, 2, generator=generator, dtype=dtype) * torch.tensor(HIGH - LOW) + torch.tensor(LOW)
    rewards = torch.randn(rows, generator=generator, dtype=dtype)
    ends = torch.rand(rows, generator=generator) < 0.2
    return Batch(
        observations,
        actions.to(dtype),
        rewards,
        following,
        torch.where(ends, 0.0, 0.99).to(dtype),
        torch.rand(rows, generator=generator, dtype=dtype) * 0.5 + 0.5,
        torch.arange(rows),
        torch.ones(rows, dtype=torch.int64),
    )


def meta_inputs(dtype: torch.dtype = torch.float64, *, transitions: bool = False) -> MetaInputs:
    """What one meta step is given."""
    training, validation, first = (batch_of(seed, dtype=dtype) for seed in (11, 12, 13))
    return MetaInputs(
        states=training.observations,
        validation_states=validation.observations,
        initial_states=first.observations,
        q=torch.zeros(2, 16, dtype=dtype),
        batch=training if transitions else None,
        validation_batch=validation if transitions else None,
        key=RandomKey(9),
    )


def check_gradients(learner, learning, inputs, *, step=1e-5, most=12):
    """Each meta-gradient against central differences: relative error of the whole vector at most 1e-5."""
    learner.adopt(learner.begin(learning, RandomKey(5)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from where it begins
        for parameter in learner.meta_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    _, gradients = learner.meta_gradient(learning, inputs)
    for name, parameter in learner.meta_parameters().items():
        flat = parameter.detach().view(-1)
        places = torch.randperm(len(flat), generator=generator)[:most]
        differences = []
        for place in places:
            sides = []
            for move in (step, -step):
                flat[place] += move
                sides.append(float(learner.meta_gradient(learning, inputs)[0]))
                flat[place] -= move
            differences.append((sides[0] - sides[1]) / (2 * step))
        expected, found = torch.tensor(differences, dtype=torch.float64), gradients[name].double().view(-1)[places]
        assert float(expected.norm()) > 1e-9, f"{name} has no gradient to compare"
        assert float((found - expected).norm() / expected.norm()) <= 1e-5, name


def walk_feed() -> FunctionFeed:
    """A point that the action moves, punished for its distance from 0."""

    def walk(observation: Any, action: Any) -> Any:
        observation = np.clip(observation + 0.1 * action, -1, 1).astype(np.float32)
        return observation, -float(np.abs(observation).sum())

    return FunctionFeed(walk, initial_observation=np.array([0.5], np.float32), action_space=BOX, step_limit=10)
