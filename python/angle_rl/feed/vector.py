"""Gymnasium vector environments in every autoreset mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from angle_rl.feed import workers
from angle_rl.feed.protocol import DataFeed, Step, environment_name
from angle_rl.feed.single import GymnasiumFeed
from angle_rl.spaces import (
    Space,
    check_action_space,
    check_observation_space,
    row_of,
    to_array,
    to_batch,
    to_vector,
    with_rows,
)
from angle_rl.types import Array, EnvironmentState, RandomKey, reset_state


class VectorFeed:
    """Feeds from a Gymnasium ``VectorEnv``, in each of its three autoreset modes
    (``metadata["autoreset_mode"]``).

    NEXT_STEP: the step after an episode's end is the reset, and has ``stepped`` False. SAME_STEP: the true
    successor is taken from ``infos["final_obs"]``. DISABLED: ended rows are reset here, with
    ``options={"reset_mask": …}``. Another mode, or none, is refused with a ValueError. ``owned``: ``close``
    closes the environment.

    Where one environment of a SyncVectorEnv or AsyncVectorEnv raises, or the process of one dies, all of them are
    closed and no process is left, also where ``owned`` is False, and VectorEnvironmentError names the environment
    and what it raised. What another kind of vector environment raises passes through untouched.
    """

    def __init__(self, environment: VectorEnv[Any, Any, Any], *, name: str | None = None, owned: bool = False) -> None:
        mode = environment.metadata.get("autoreset_mode")
        self._mode = str(getattr(mode, "value", mode))
        if self._mode not in ("NextStep", "SameStep", "Disabled"):
            raise ValueError(
                f"metadata['autoreset_mode'] of {type(environment.unwrapped).__name__} is {mode!r}; it must "
                "be NEXT_STEP, SAME_STEP or DISABLED (gymnasium.vector.AutoresetMode), or nobody knows where "
                "its episodes begin"
            )
        self.observation_space: Space = check_observation_space(environment.single_observation_space)
        self.action_space: Space = check_action_space(environment.single_action_space)
        self.num_environments = int(environment.num_envs)
        self.name = name or environment_name(environment)
        self._environment = environment
        self._owned = owned
        workers.watch(environment)

    def init(self, random_key: RandomKey) -> Step:
        """Seed and reset all of them; the environment derives the single seeds from one."""
        key, random_key = random_key.split(2)
        observation, _ = self._call(self._environment.reset, seed=key.seed())
        observation = to_batch(self.observation_space, observation, self.num_environments)
        return reset_state(observation, self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self.init(random_key)

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``. The key is returned unused."""
        n, space = self.num_environments, self.observation_space
        actions = to_array(self.action_space, actions, "actions", (n,))
        observation, reward, terminations, truncations, infos = self._call(self._environment.step, actions)
        observation = to_batch(space, observation, n)
        rewards = to_vector(reward, np.float64, n, "rewards")
        terminated = to_vector(terminations, np.bool_, n, "terminations")
        truncated = to_vector(truncations, np.bool_, n, "truncations")
        final = observation
        stepped = np.ones(n, dtype=np.bool_)
        if self._mode == "NextStep":
            stepped = ~(environment_state.terminated | environment_state.truncated)
            rewards[~stepped] = 0.0
            terminated &= stepped
            truncated &= stepped
        else:
            ended = terminated | truncated
            if ended.any():
                rows = [int(index) for index in np.flatnonzero(ended)]
                if self._mode == "SameStep":
                    final = with_rows(space, observation, _final_rows(infos, rows))
                else:
                    first, _ = self._call(self._environment.reset, options={"reset_mask": ended.copy()})
                    observation = with_rows(space, final, {index: row_of(first, index) for index in rows})
        return EnvironmentState(observation, rewards, terminated, truncated, final, stepped), random_key

    def evaluation_feed(self) -> DataFeed | None:
        """A feed of one such environment, or None if none can be made (say, under a vector wrapper).

        It is made from the environment's own constructor functions (``env_fns``), or from its spec.
        """
        environment = self._environment
        while isinstance(environment, gymnasium.wrappers.vector.RecordEpisodeStatistics):
            environment = environment.env
        if environment.unwrapped is not environment:
            return None
        functions = getattr(environment, "env_fns", None)
        try:
            if functions:
                return GymnasiumFeed([functions[0]()], name=self.name, factory=functions[0], owned=True)
            if environment.spec is None:
                return None
            spec = copy.deepcopy(environment.spec)
            spec.kwargs.pop("num_envs", None)
            return VectorFeed(gymnasium.make_vec(spec, num_envs=1), name=self.name, owned=True)
        except Exception:  # the recipe does not suffice
            return None

    def close(self) -> None:
        """Close the environment if the feed made it; one that it was given stays open."""
        if self._owned:
            workers.close(self._environment)
            self._owned = False

    def _call(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the environment's method returns. See the class for what is raised."""
        try:
            return method(*arguments, **named)
        except (Exception, KeyboardInterrupt) as error:
            failed = workers.failure(self._environment, self.name, error)
            if failed is None:
                raise
            raise failed from error


def _final_rows(infos: Mapping[str, Any], rows: Sequence[int]) -> dict[int, Any]:
    """The successors of ended episodes out of a SAME_STEP environment's infos: one by one, or batched."""
    if "final_obs" not in infos:
        raise ValueError("an episode ended without infos['final_obs'], though autoreset_mode is SAME_STEP")
    found = {index: row_of(infos["final_obs"], index) for index in rows}
    missing = [index for index, row in found.items() if row is None]
    if missing:
        raise ValueError(f"infos['final_obs'] is None in rows {missing}, where an episode ended")
    return found
