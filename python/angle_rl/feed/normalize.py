"""Observations and rewards brought to unit scale by running statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from angle_rl.feed.history import HistoryFeed
from angle_rl.feed.protocol import DataFeed, Step
from angle_rl.feed.statistics import RunningStatistics
from angle_rl.feed.wrapping import (
    around,
    check_same_arrays,
    check_shows_arrays,
    export_feed_state,
    import_feed_state,
    leaves,
    make_evaluation_feed,
    unscaled_reward,
)
from angle_rl.spaces import Space, check_observation_space
from angle_rl.types import Array, EnvironmentState, RandomKey

_EPSILON = 1e-8  # added to a variance before its root
_REWARDS = "rewards"
_OBSERVATIONS = "observations"
_INNER = "inner."


class NormalizedFeed:
    """A feed whose observations have mean 0 and variance 1, and whose rewards have unit scale, as far as was seen.

    ``observations``: every Box of floats, also within Dict and Tuple, gives ``(x - mean) / sqrt(variance +
    1e-8)`` as float32, clipped to ``[-observation_clip, observation_clip]``. Discrete observations and
    whole-number Boxes (images) pass as they are. Counted are the observations in which an action was taken
    that stepped: once each, the first of an episode too, whatever the environment's way to restart.
    ``rewards``: ``r / sqrt(variance of R + 1e-8)`` in float64, clipped to ``[-reward_clip, reward_clip]``, where
    ``R <- discount * R + r`` runs within each episode of each environment. The mean is not taken off, which would
    reward or punish a long life. What is not finite is not counted, and such a reward is handed on as it is.

    What was handed out is not normalised anew when the statistics move on, so a replay holds rows of earlier
    statistics. They settle as 1 / count; where what is seen changes much while the policy learns, learning is slower
    than without. A learned entropy coefficient starts large beside rewards of unit scale: give a small one.

    ``observation_clip``, ``reward_clip``: > 0, or None for none. ``discount`` lies in [0, 1]. ``frozen``: the
    statistics do not change. ``export_state`` and ``import_state`` save and restore them;
    ``evaluation_feed`` and ``around`` give a feed with a frozen copy of them and the rewards as they are.
    Raises ValueError where a value is out of range, where neither is asked for, or where ``observations`` is and
    there is no Box of floats, and for a feed that shows tensors. One thread.
    """

    def __init__(
        self,
        feed: DataFeed,
        *,
        observations: bool = True,
        rewards: bool = True,
        discount: float = 0.99,
        observation_clip: float | None = 10.0,
        reward_clip: float | None = 10.0,
        frozen: bool = False,
    ) -> None:
        if not (observations or rewards):
            raise ValueError("observations and rewards are both False; then there is nothing to normalise")
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"discount is {discount}; it must lie in [0, 1]")
        for name, clip in (("observation_clip", observation_clip), ("reward_clip", reward_clip)):
            if clip is not None and not 0.0 < clip < math.inf:
                raise ValueError(f"{name} is {clip}; it must be a number above 0, or None")
        check_shows_arrays(feed, "NormalizedFeed")
        self._raw_space = check_observation_space(feed.observation_space)
        self._statistics: dict[str, RunningStatistics] = {}  # by the names of the observation's Boxes
        if observations:
            for name, leaf in leaves(self._raw_space).items():
                if _is_scale(leaf):
                    self._statistics[name] = RunningStatistics(leaf.shape)
            if not self._statistics:
                raise ValueError(
                    f"observations of {feed.observation_space} cannot be normalised; there is no Box of floats in them"
                )
        self._returns = RunningStatistics() if rewards else None
        limit = math.inf if observation_clip is None else observation_clip
        self.observation_space: Space = _normalized_space(self._raw_space, limit) if observations else self._raw_space
        self.action_space: Space = feed.action_space
        self.num_environments = feed.num_environments
        self.name = feed.name
        self.feed = feed
        self.frozen = frozen
        self._discount = discount
        self._observation_clip, self._reward_clip = observation_clip, reward_clip
        self._running_returns = np.zeros(feed.num_environments)
        self._raw: EnvironmentState | None = None  # what the feed showed last

    def init(self, random_key: RandomKey) -> Step:
        """As the feed's, normalised; the statistics go on."""
        return self._begin(*self.feed.init(random_key))

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self._begin(*self.feed.reset(random_key, self._last()))

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``. RuntimeError before ``init``."""
        asked = environment_state
        before = self._last()._replace(terminated=asked.terminated, truncated=asked.truncated, stepped=asked.stepped)
        seen, random_key = self.feed.step(random_key, before, actions)
        counted = seen.stepped & ~asked.at_rest()
        if not self.frozen:
            for name, leaf in leaves(before.observation).items():
                if name in self._statistics:
                    self._statistics[name].count_rows(leaf[counted])
        self._raw = seen
        return self._normalized(seen, self._scaled(seen, counted)), random_key

    @property
    def statistics(self) -> dict[str, RunningStatistics]:
        """By name: "observations" (nested ones "observations.camera", "observations.0") and "rewards" (of R)."""
        return self._statistics | ({} if self._returns is None else {_REWARDS: self._returns})

    def export_state(self) -> dict[str, Array]:
        """The statistics, and what the feed inside has to save. The running returns end with their episodes."""
        own = {f"{name}/{key}": array for name, s in self.statistics.items() for key, array in s.export_state().items()}
        return own | {_INNER + name: array for name, array in export_feed_state(self.feed).items()}

    def import_state(self, arrays: Mapping[str, Any]) -> None:
        """Put back what `export_state` gave. ValueError where it does not fit, and nothing changes then."""
        found: dict[str, dict[str, Any]] = {name: {} for name in self.statistics}
        inner = {}
        for name, array in arrays.items():
            owner, _, key = name.rpartition("/")
            if name.startswith(_INNER):
                inner[name.removeprefix(_INNER)] = array
            elif owner in found:
                found[owner][key] = array
            else:
                raise ValueError(f"{name} was saved with the feed; here no such statistics are kept")
        for name, statistics in self.statistics.items():
            statistics.check_state(found[name], name)
        import_feed_state(self.feed, inner)
        for name, statistics in self.statistics.items():
            statistics.import_state(found[name])

    def evaluation_feed(self) -> DataFeed | None:
        """Like this one over the feed's own evaluation feed, frozen, with the rewards as they are; None where it
        has none.
        """
        inner = make_evaluation_feed(self.feed)
        return None if inner is None else self._frozen_over(inner)

    def around(self, source: DataFeed) -> DataFeed:
        """Like this one over ``source``, frozen, with the rewards as they are. ValueError: other observations."""
        source = around(self.feed, source)
        check_same_arrays(source, self._raw_space)
        return self._frozen_over(source)

    def unscaled_reward(self, reward: Array) -> Array:
        """The rewards ``[n]`` of the last step as the environment gave them."""
        return unscaled_reward(self.feed, reward if self._raw is None else self._raw.reward)

    def close(self) -> None:
        """Close the feed."""
        self.feed.close()

    def _frozen_over(self, source: DataFeed) -> DataFeed:
        if not self._statistics:
            return source
        other = NormalizedFeed(source, rewards=False, observation_clip=self._observation_clip, frozen=True)
        for name, statistics in self._statistics.items():
            other._statistics[name].import_state(statistics.export_state())
        return other

    def _begin(self, seen: EnvironmentState, random_key: RandomKey) -> Step:
        self._raw = seen
        self._running_returns[:] = 0.0
        return self._normalized(seen, seen.reward), random_key

    def _last(self) -> EnvironmentState:
        if self._raw is None:
            raise RuntimeError("the feed has not begun; call init first")
        return self._raw

    def _scaled(self, seen: EnvironmentState, counted: Array) -> Array:
        """The step's rewards, scaled, after the returns of the rows ``counted`` were."""
        if self._returns is None:
            return seen.reward
        finite = seen.stepped & np.isfinite(seen.reward)
        running = np.where(finite, self._discount * self._running_returns + seen.reward, self._running_returns)
        if not self.frozen:
            self._returns.count_rows(running[finite & counted])
        self._running_returns = np.where(seen.terminated | seen.truncated | ~seen.stepped, 0.0, running)
        scaled = seen.reward / math.sqrt(float(self._returns.variance) + _EPSILON)
        if self._reward_clip is not None:
            scaled = np.clip(scaled, -self._reward_clip, self._reward_clip)
        return np.where(finite, scaled, seen.reward)

    def _normalized(self, seen: EnvironmentState, reward: Array) -> EnvironmentState:
        observation = final = self._tree(seen.observation)
        if seen.final_observation is not seen.observation:
            final = self._tree(seen.final_observation)
        return seen._replace(observation=observation, final_observation=final, reward=reward)

    def _tree(self, tree: Any, name: str = _OBSERVATIONS) -> Any:
        """Batched observations, normalised."""
        if isinstance(tree, dict):
            return {key: self._tree(part, f"{name}.{key}") for key, part in tree.items()}
        if isinstance(tree, tuple):
            return tuple(self._tree(part, f"{name}.{i}") for i, part in enumerate(tree))
        statistics = self._statistics.get(name)
        if statistics is None:
            return tree
        normalized = (tree.astype(np.float64) - statistics.mean) / np.sqrt(statistics.variance + _EPSILON)
        if self._observation_clip is not None:
            normalized = np.clip(normalized, -self._observation_clip, self._observation_clip)
        return normalized.astype(np.float32)


def _is_scale(space: Space) -> bool:
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


def _normalized_space(space: Space, limit: float) -> Space:
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _normalized_space(part, limit) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_normalized_space(part, limit) for part in space.spaces])
    return spaces.Box(-limit, limit, space.shape, np.float32) if _is_scale(space) else space


def wrap_feed(
    feed: DataFeed,
    *,
    observation_history: int = 1,
    normalize_observations: bool = False,
    normalize_rewards: bool = False,
    discount: float = 0.99,
) -> DataFeed:
    """``feed`` within the wrappers that are asked for: normalised first, then stacked; itself where none is."""
    if normalize_observations or normalize_rewards:
        feed = NormalizedFeed(feed, observations=normalize_observations, rewards=normalize_rewards, discount=discount)
    return HistoryFeed(feed, observation_history) if observation_history != 1 else feed
