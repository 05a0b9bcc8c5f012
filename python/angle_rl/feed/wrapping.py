"""What feeds around feeds have in common.

A wrapper is a feed with the method ``around(source)``, which gives the same wrapper for evaluation over another
feed. A feed with something to save has ``export_state()``, a dict of arrays, and ``import_state(arrays)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from gymnasium import spaces

from angle_rl.feed.protocol import DataFeed
from angle_rl.spaces import Space
from angle_rl.types import Array


def make_evaluation_feed(feed: DataFeed) -> DataFeed | None:
    """An independent feed of one environment like ``feed``'s, to evaluate on, or None where none can be made.

    It asks the feed's ``evaluation_feed()``, if it has one. An environment that keeps statistics (say, a
    normalising wrapper) is copied with those it has now: ask again for each evaluation. The caller closes it.
    """
    make = getattr(feed, "evaluation_feed", None)
    return None if make is None else cast("DataFeed | None", make())


def around(feed: DataFeed, source: DataFeed) -> DataFeed:
    """``source`` within the wrappers that ``feed`` has, as they evaluate; itself where ``feed`` has none."""
    wrap = getattr(feed, "around", None)
    return source if wrap is None else cast("DataFeed", wrap(source))


def leaves(tree: Any, name: str = "observations") -> dict[str, Any]:
    """The arrays of batched observations, or the spaces of single ones, by names like "observations.camera"."""
    if isinstance(tree, (dict, spaces.Dict)):
        return {leaf: part for key in tree for leaf, part in leaves(tree[key], f"{name}.{key}").items()}
    if isinstance(tree, (tuple, spaces.Tuple)):
        return {leaf: part for i, member in enumerate(tree) for leaf, part in leaves(member, f"{name}.{i}").items()}
    return {name: tree}


def check_shows_arrays(feed: DataFeed, wrapper: str) -> None:
    """ValueError where a feed's observations are tensors, which a wrapper does not take."""
    place = getattr(feed, "device", None)
    if place is not None:
        raise ValueError(f"{feed.name} shows tensors on {place}; {wrapper} takes arrays: leave out the feed's device=")


def check_same_arrays(source: DataFeed, space: Space) -> None:
    """ValueError where a feed's observations have other shapes or kinds of numbers than ``space`` has."""
    there, here = _shapes(source.observation_space), _shapes(space)
    if there != here:
        raise ValueError(
            f"{source.name} shows {source.observation_space}; what is to be evaluated was trained on {space} "
            "(a feed to evaluate on is given without the training feed's wrappers)"
        )


def export_feed_state(feed: DataFeed) -> dict[str, Array]:
    """What a feed has to save with a run, by name: copies; nothing, where it has no ``export_state``."""
    export = getattr(feed, "export_state", None)
    return {} if export is None else dict(export())


def import_feed_state(feed: DataFeed, arrays: Mapping[str, Any]) -> None:
    """Put back what ``export_feed_state`` gave; tensors will do. ValueError where it does not fit this feed;
    nothing changes then.
    """
    restore = getattr(feed, "import_state", None)
    if restore is not None:
        restore(arrays)
    elif arrays:
        raise ValueError(f"{sorted(arrays)} were saved with the feed; {type(feed).__name__} keeps nothing")


def unscaled_reward(feed: DataFeed, reward: Array) -> Array:
    """The rewards ``[n]`` of the feed's last step before it scaled them to ``reward``."""
    unscaled = getattr(feed, "unscaled_reward", None)
    return reward if unscaled is None else cast(Array, unscaled(reward))


def _shapes(space: Space) -> dict[str, Any]:
    return {name: (leaf.shape, leaf.dtype.kind) for name, leaf in leaves(space).items()}
