"""The last observations of each environment, stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from angle_rl.feed.protocol import DataFeed, Step
from angle_rl.feed.wrapping import (
    around,
    check_same_arrays,
    check_shows_arrays,
    export_feed_state,
    import_feed_state,
    make_evaluation_feed,
    unscaled_reward,
)
from angle_rl.spaces import Space, check_observation_space, map_space
from angle_rl.types import Array, EnvironmentState, RandomKey


class HistoryFeed:
    """Stacks the last ``k`` observations of each environment on a new leading axis, oldest first.

    Shapes: a Box of ``shape`` becomes a Box of ``(k, *shape)`` with the same dtype and bounds, a batch of it
    ``[n, k, *shape]``, whose ``[:, -1]`` is the newest. Discrete and MultiDiscrete become MultiDiscrete,
    MultiBinary stays MultiBinary, Dict and Tuple are stacked member by member. An image ``(H, W)`` of uint8
    becomes the ``(k, H, W)`` of which a replay keeps each frame once (``frame_stack=k``).

    Where an episode begins, its first observation stands ``k`` times. Where one ends, ``final_observation`` is
    the stack that leads to its last observation, and ``observation`` the first of the new episode. A row
    that did not step has been reset, and begins anew too. (In the row that ended an episode whose environment
    restarts with the next step only, ``observation`` is the last one ``k`` times; no action is taken in it.)

    The history is read from the state that ``step`` is given, so nothing is kept here and each environment's
    is its own. Wrap a NormalizedFeed in this, not the other way round: its statistics are then of single
    observations. Raises ValueError where ``k`` < 1 and for a feed that shows tensors (``device=``), TypeError for
    observations that are no arrays. One thread.
    """

    def __init__(self, feed: DataFeed, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k is {k!r}; it must be a number of observations")
        if k < 1:
            raise ValueError(f"k is {k}; a history has at least 1 observation")
        check_shows_arrays(feed, "HistoryFeed")
        self._single_space = check_observation_space(feed.observation_space)
        self.observation_space: Space = _stacked_space(self._single_space, k)
        self.action_space: Space = feed.action_space
        self.num_environments = feed.num_environments
        self.name = feed.name
        self.k = k
        self.feed = feed

    def init(self, random_key: RandomKey) -> Step:
        """As the feed's, every observation standing ``k`` times."""
        return self._begin(*self.feed.init(random_key))

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self._begin(*self.feed.reset(random_key, self._newest(environment_state)))

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``. Raises ValueError where the state's observation is no stack of this feed's."""
        before = environment_state.observation
        seen, random_key = self.feed.step(random_key, self._newest(environment_state), actions)
        reset = ~seen.stepped
        restarted = reset | seen.terminated | seen.truncated
        final = self._shifted(before, seen.final_observation, reset)
        observation = self._shifted(before, seen.observation, restarted) if restarted.any() else final
        return seen._replace(observation=observation, final_observation=final), random_key

    def evaluation_feed(self) -> HistoryFeed | None:
        """The same history over the feed's own evaluation feed, or None where it has none."""
        inner = make_evaluation_feed(self.feed)
        return None if inner is None else HistoryFeed(inner, self.k)

    def around(self, source: DataFeed) -> HistoryFeed:
        """The same history over ``source``, which the wrappers inside take first. ValueError: other observations."""
        source = around(self.feed, source)
        check_same_arrays(source, self._single_space)
        return HistoryFeed(source, self.k)

    def export_state(self) -> dict[str, Array]:
        """What the feed inside has to save; a history ends with its episode."""
        return export_feed_state(self.feed)

    def import_state(self, arrays: Mapping[str, Any]) -> None:
        """Put it back. Raises as the feed inside does."""
        import_feed_state(self.feed, arrays)

    def unscaled_reward(self, reward: Array) -> Array:
        """The rewards ``[n]`` of the last step before a feed inside scaled them."""
        return unscaled_reward(self.feed, reward)

    def close(self) -> None:
        """Close the feed."""
        self.feed.close()

    def _begin(self, seen: EnvironmentState, random_key: RandomKey) -> Step:
        observation = map_space(lambda _, part: _repeated(part, self.k), self._single_space, seen.observation)
        return seen._replace(observation=observation, final_observation=observation), random_key

    def _shifted(self, stacks: Any, newest: Any, anew: Array) -> Any:
        """``newest`` behind the last k - 1 of ``stacks``; ``k`` times in the rows ``anew``."""

        def shift(_: Space, stack: Array, one: Array) -> Array:
            moved = np.concatenate([stack[:, 1:], one[:, None]], axis=1)
            moved[anew] = _repeated(one[anew], self.k)
            return moved

        return map_space(shift, self._single_space, stacks, newest)

    def _newest(self, state: EnvironmentState) -> EnvironmentState:
        """The state as the feed inside gave it."""

        def newest(leaf: Space, part: Array) -> Array:
            shape = (self.num_environments, self.k, *(leaf.shape or ()))
            if np.shape(part) != shape:
                raise ValueError(
                    f"the state's observation has shape {list(np.shape(part))}; it must be {list(shape)}, "
                    "as the last call returned it"
                )
            return part[:, -1]

        return state._replace(
            observation=map_space(newest, self._single_space, state.observation),
            final_observation=map_space(newest, self._single_space, state.final_observation),
        )


def _repeated(part: Array, k: int) -> Array:
    return np.repeat(part[:, None], k, axis=1)


def _stacked_space(space: Space, k: int) -> Space:
    """The space of ``k`` observations of ``space``."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _stacked_space(part, k) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_stacked_space(part, k) for part in space.spaces])
    if isinstance(space, spaces.Box):
        dtype: Any = space.dtype
        return spaces.Box(np.stack([space.low] * k), np.stack([space.high] * k), dtype=dtype)
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiBinary([k, *space.shape])
    if isinstance(space, spaces.Discrete):
        count, start = np.full(k, space.n), np.full(k, space.start)
    else:
        assert isinstance(space, spaces.MultiDiscrete)
        count, start = np.stack([space.nvec] * k), np.stack([space.start] * k)
    kind: Any = space.dtype
    return spaces.MultiDiscrete(count, dtype=kind, start=start)
