"""A memory of what environments show at the start of their episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from angle_rl.feed.protocol import DataFeed, Step
from angle_rl.feed.wrapping import (
    around,
    check_shows_arrays,
    export_feed_state,
    import_feed_state,
    leaves,
    make_evaluation_feed,
    unscaled_reward,
)
from angle_rl.spaces import Space, empty_batch, map_space, row_of
from angle_rl.types import Array, EnvironmentState, RandomKey

RESETS = "resets."  # before the names of the arrays of a feed's state


class ResetsFeed:
    """A feed that also keeps the newest `capacity` observations that followed a reset, in a ring.

    Everything else is the feed's own. ValueError where ``capacity`` < 1, and for a feed that shows tensors. One thread.
    """

    def __init__(self, feed: DataFeed, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1")
        check_shows_arrays(feed, "ResetsFeed")
        self.feed = feed
        self.observation_space: Space = feed.observation_space
        self.action_space: Space = feed.action_space
        self.num_environments = feed.num_environments
        self.name = feed.name
        self.capacity = capacity
        self._ring = empty_batch(self.observation_space, capacity)
        self._kept = 0  # since the beginning

    @property
    def reset_observations(self) -> Any:
        """What is kept, in no order: ``[k, *observation_shape]``, k up to `capacity`, as the space nests. Views."""
        return row_of(self._ring, slice(0, min(self._kept, self.capacity)))

    def init(self, random_key: RandomKey) -> Step:
        """As the feed's."""
        return self._begun(*self.feed.init(random_key))

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As the feed's."""
        return self._begun(*self.feed.reset(random_key, environment_state))

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """As the feed's."""
        seen, random_key = self.feed.step(random_key, environment_state, actions)
        ended = (seen.terminated | seen.truncated) & seen.stepped
        for index in map(int, np.flatnonzero(ended | ~seen.stepped)):
            # Where the reset is a step of its own, the row that ended shows its last observation still.
            if not ended[index] or not _same(row_of(seen.observation, index), row_of(seen.final_observation, index)):
                self._keep(row_of(seen.observation, index))
        return seen, random_key

    def evaluation_feed(self) -> DataFeed | None:
        """The feed's own: nothing is kept of an evaluation."""
        return make_evaluation_feed(self.feed)

    def around(self, source: DataFeed) -> DataFeed:
        """``source`` within the feed's own wrappers."""
        return around(self.feed, source)

    def export_state(self) -> dict[str, Array]:
        """What the feed inside has to save, and what is kept."""
        own = {RESETS + name: np.array(part) for name, part in leaves(self.reset_observations).items()}
        return {**export_feed_state(self.feed), **own, f"{RESETS}kept": np.array(self._kept)}

    def import_state(self, arrays: Mapping[str, Any]) -> None:
        """Put it back. ValueError where it does not fit this feed; nothing changes then."""
        own = {name: np.asarray(array) for name, array in arrays.items() if name.startswith(RESETS)}
        kept = int(own.get(f"{RESETS}kept", np.array(0)))
        ring = leaves(self._ring)
        count = min(kept, self.capacity)
        for name, part in ring.items():
            found = own.get(RESETS + name)
            if kept > 0 and (found is None or found.shape != (count, *part.shape[1:])):
                shape = "missing" if found is None else f"of shape {list(found.shape)}"
                raise ValueError(f"{RESETS}{name} is {shape}; it must be {[count, *part.shape[1:]]}")
        import_feed_state(self.feed, {name: array for name, array in arrays.items() if name not in own})
        for name, part in ring.items():
            if kept > 0:
                part[:count] = own[RESETS + name]
        self._kept = kept

    def unscaled_reward(self, reward: Array) -> Array:
        """The rewards ``[n]`` of the last step before a feed inside scaled them."""
        return unscaled_reward(self.feed, reward)

    def close(self) -> None:
        """Close the feed."""
        self.feed.close()

    def _begun(self, seen: EnvironmentState, random_key: RandomKey) -> Step:
        for index in range(self.num_environments):
            self._keep(row_of(seen.observation, index))
        return seen, random_key

    def _keep(self, observation: Any) -> None:
        place = self._kept % self.capacity

        def put(_: Space, ring: Array, part: Any) -> None:
            ring[place] = part

        map_space(put, self.observation_space, self._ring, observation)
        self._kept += 1


def _same(left: Any, right: Any) -> bool:
    pairs = zip(leaves(left).values(), leaves(right).values(), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)
