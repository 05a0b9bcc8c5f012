"""What the agents for finitely many actions share: the actions of a space, and epsilon-greedy exploration."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch

from angle_rl.agents.exploration import Exploration, make_schedule
from angle_rl.config import Hyperparameters
from angle_rl.types import RandomKey


def discrete_actions(space: gymnasium.Space[Any], agent: str) -> tuple[int, int]:
    """The number of actions and the first of them. ValueError where the space is not Discrete."""
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise ValueError(f"action_space is {space}; {agent} needs finitely many actions (a Discrete)")
    return int(space.n), int(space.start)


def first_exploration(hyperparameters: Hyperparameters) -> Exploration:
    """The share of random actions: `exploration_epsilon`, changing as `exploration_schedule` says."""
    return Exploration(make_schedule(hyperparameters, hyperparameters.exploration_epsilon))


def random_share(exploration: Exploration, steps: int, learning_starts: int) -> float:
    """The share of random actions after `steps` transitions: 1 until `learning_starts`; never more."""
    return 1.0 if steps < learning_starts else min(exploration.scale(steps), 1.0)


def epsilon_greedy(greedy: torch.Tensor, actions: int, epsilon: float, key: RandomKey) -> torch.Tensor:
    """``[n]`` int64 in [0, actions): each of `greedy` ``[n]``, or with probability `epsilon` a uniform one."""
    explores, which = key.uniform(2, len(greedy))
    random = (which * actions).to(torch.int64)
    return torch.where(explores < epsilon, random, greedy.cpu())


def refuse_options(options: dict[str, Any], names: tuple[str, ...], agent: str) -> None:
    """ValueError where the runner was given a part that the agent has no use for."""
    for name in names:
        if options.get(name) is not None:
            raise ValueError(f"{name} is given; {agent} has no {name}")
