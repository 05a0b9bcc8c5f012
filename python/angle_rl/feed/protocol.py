"""What every feed is asked for."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import gymnasium
from gymnasium.vector import VectorEnv

from angle_rl.spaces import Space
from angle_rl.types import Array, EnvironmentState, RandomKey

Environment = gymnasium.Env[Any, Any]
Step = tuple[EnvironmentState, RandomKey]


@runtime_checkable
class DataFeed(Protocol):
    """What a trainer asks of a source of transitions. A user's own feed needs these names and no others."""

    observation_space: Space  # of one environment
    action_space: Space  # of one environment
    num_environments: int  # n
    name: str  # the environment's id, for folders and messages

    def init(self, random_key: RandomKey) -> Step:
        """Seed everything from the key and begin an episode everywhere; no row has ``stepped``."""

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """Begin a new episode everywhere, as ``init`` does."""

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """Take ``actions`` [n, *action_shape] in ``environment_state``, which the last call returned.

        Where an episode ends a new one begins by itself: ``observation`` is then its first one and
        ``final_observation`` the true successor; rows that spent this step on a reset have ``stepped`` False,
        reward 0 and no flags.
        """

    def close(self) -> None:
        """Release what the feed made itself. May be called twice."""


def environment_name(environment: Environment | VectorEnv[Any, Any, Any]) -> str:
    """Its id, or the name of its class."""
    return environment.spec.id if environment.spec is not None else type(environment.unwrapped).__name__
