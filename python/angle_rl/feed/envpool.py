"""EnvPool: environments that run in C++ threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from angle_rl.feed.protocol import Step
from angle_rl.spaces import (
    Space,
    check_action_space,
    check_observation_space,
    row_of,
    to_array,
    to_batch,
    to_vector,
)
from angle_rl.types import Array, EnvironmentState, RandomKey, reset_state

_OWN = ("env_type", "num_envs", "batch_size", "seed")


class EnvPoolFeed:
    """Feeds from an EnvPool in its synchronous mode (Weng et al. 2022, arXiv:2206.10558).

    ``task``: an id of ``envpool.list_all_envs()``; ``options`` go to ``envpool.make``, except env_type, num_envs,
    batch_size and seed, which the feed decides. ``make`` takes the place of ``envpool.make``. An episode's end is
    followed by a step that resets (``stepped`` False), and the true successor is what the ending step showed.

    A pool can be seeded only when it is made. So ``init`` and ``reset`` make a new one, which the same key makes the
    same; a run by episodes of short ones is better off with Gymnasium's environments. One thread.
    Raises ImportError where EnvPool is not installed, TypeError for an option that is the feed's.
    """

    def __init__(
        self,
        task: str,
        *,
        num_environments: int = 1,
        make: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        if num_environments < 1:
            raise ValueError(f"num_environments is {num_environments}; at least 1 is needed")
        for name in _OWN:
            if name in options:
                raise TypeError(f"{name} is the feed's to decide; give num_environments, and the key to init")
        if make is None:
            try:
                make = importlib.import_module("envpool").make
            except ImportError as error:
                raise ImportError(f"task {task!r} needs EnvPool: pip install envpool") from error
        self.num_environments = num_environments
        self.name = task
        self._make = make
        self._options = options
        self._pool = self._made(0)
        self.observation_space: Space = check_observation_space(self._pool.observation_space)
        self.action_space: Space = check_action_space(self._pool.action_space)

    def init(self, random_key: RandomKey) -> Step:
        """Make the pool anew, seeded from the key, and begin an episode everywhere."""
        key, random_key = random_key.split(2)
        self.close()
        self._pool = self._made(key.seed())
        observation, info = self._pool.reset()
        observation = to_batch(self.observation_space, row_of(observation, _order(info)), self.num_environments)
        return reset_state(observation, self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self.init(random_key)

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``. The key is returned unused."""
        n = self.num_environments
        actions = to_array(self.action_space, actions, "actions", (n,))
        observation, reward, terminations, truncations, info = self._pool.step(actions)
        order = _order(info)
        observation = to_batch(self.observation_space, row_of(observation, order), n)
        stepped = ~(environment_state.terminated | environment_state.truncated)
        rewards = np.where(stepped, to_vector(reward, np.float64, n, "rewards")[order], 0.0)
        terminated = to_vector(terminations, np.bool_, n, "terminations")[order] & stepped
        truncated = to_vector(truncations, np.bool_, n, "truncations")[order] & stepped
        return EnvironmentState(observation, rewards, terminated, truncated, observation, stepped), random_key

    def evaluation_feed(self) -> EnvPoolFeed:
        """A feed of one environment of the same task."""
        return EnvPoolFeed(self.name, make=self._make, **self._options)

    def close(self) -> None:
        """End the pool's threads. May be called twice."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _made(self, seed: int) -> Any:
        return self._make(self.name, env_type="gymnasium", num_envs=self.num_environments, seed=seed, **self._options)


def _order(info: Any) -> Array:
    """Where the rows of environments 0, 1, … lie."""
    order: Array = np.argsort(info["env_id"], kind="stable")
    return order
