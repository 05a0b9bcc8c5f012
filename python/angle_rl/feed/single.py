"""Gymnasium environments, stepped one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from angle_rl.feed.protocol import Environment, Step, environment_name
from angle_rl.spaces import (
    Space,
    check_action_space,
    check_observation_space,
    empty_batch,
    row_of,
    to_array,
    with_rows,
    write_row,
)
from angle_rl.types import Array, EnvironmentState, RandomKey, reset_state


class GymnasiumFeed:
    """Feeds from Gymnasium environments, stepped one after the other; an ended episode restarts within the
    same step.

    ``environments``: one or more with equal spaces; Dict and Tuple observations may nest, actions are one
    array (Box, Discrete, MultiDiscrete, MultiBinary). ``factory`` makes one more like them, for evaluation;
    without it the first one is deep-copied, or made again from its spec. ``owned``: ``close`` closes the
    environments.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        *,
        name: str | None = None,
        factory: Callable[[], Environment] | None = None,
        owned: bool = False,
    ) -> None:
        if not environments:
            raise ValueError("environments is empty; at least 1 is needed")
        first = environments[0]
        for index, environment in enumerate(environments):
            if (
                environment.observation_space != first.observation_space
                or environment.action_space != first.action_space
            ):
                raise ValueError(f"environments[{index}] has other spaces than environments[0]")
        self.observation_space: Space = check_observation_space(first.observation_space)
        self.action_space: Space = check_action_space(first.action_space)
        self.num_environments = len(environments)
        self.name = name or environment_name(first)
        self._environments = tuple(environments)
        self._factory = factory
        self._owned = owned

    def init(self, random_key: RandomKey) -> Step:
        """Seed and reset every environment, each with a seed of its own."""
        *keys, random_key = random_key.split(self.num_environments + 1)
        observation = empty_batch(self.observation_space, self.num_environments)
        for index, (environment, key) in enumerate(zip(self._environments, keys, strict=True)):
            first, _ = environment.reset(seed=key.seed())
            write_row(self.observation_space, observation, index, first)
        return reset_state(observation, self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self.init(random_key)

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``; every row has ``stepped`` but those at rest. The key is returned unused."""
        n, space = self.num_environments, self.observation_space
        actions = to_array(self.action_space, actions, "actions", (n,))
        final = empty_batch(space, n)
        rewards = np.empty(n, dtype=np.float64)
        terminated, truncated = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
        restarts: dict[int, Any] = {}
        stepped = ~environment_state.at_rest()
        for index, environment in enumerate(self._environments):
            if not stepped[index]:
                rewards[index] = 0.0
                write_row(space, final, index, row_of(environment_state.observation, index))
                continue
            successor, reward, terminated[index], truncated[index], _ = environment.step(actions[index])
            rewards[index] = np.asarray(reward, dtype=np.float64).item()
            write_row(space, final, index, successor)
            if terminated[index] or truncated[index]:
                restarts[index], _ = environment.reset()
        observation = with_rows(space, final, restarts)
        return EnvironmentState(observation, rewards, terminated, truncated, final, stepped), random_key

    def evaluation_feed(self) -> GymnasiumFeed | None:
        """A feed of one more such environment, or None if it can neither be copied nor made again."""
        if self._factory is not None:
            return GymnasiumFeed([self._factory()], name=self.name, factory=self._factory, owned=True)
        original = self._environments[0]
        try:
            return GymnasiumFeed([copy.deepcopy(original)], name=self.name, owned=True)
        except Exception:  # it holds something that cannot be copied
            if original.spec is None:
                return None
        try:
            return GymnasiumFeed([gymnasium.make(original.spec)], name=self.name, owned=True)
        except Exception:  # its spec does not suffice
            return None

    def close(self) -> None:
        """Close the environments that the feed made; those that it was given stay open."""
        if self._owned:
            for environment in self._environments:
                environment.close()
            self._owned = False
