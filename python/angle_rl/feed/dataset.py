"""Recorded transitions as a feed, for offline training with the trainer as it is."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from angle_rl.feed.make import make_feed
from angle_rl.feed.protocol import DataFeed, Step
from angle_rl.feed.wrapping import leaves
from angle_rl.spaces import (
    Space,
    check_action_space,
    check_observation_space,
    map_space,
    row_of,
    space_like,
    to_array,
    to_batch,
    to_vector,
)
from angle_rl.types import Array, EnvironmentState, RandomKey, reset_state

_NAMES = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated", "streams")
_LEFT_ASIDE = ("handles", "priorities")  # a replay's own
AnyAgent = TypeVar("AnyAgent")


class DatasetFeed:
    """Goes through ``n`` parts of a data set side by side, in the order recorded, again and again.

    Its contract is that it answers no action but the recorded one: ``step`` takes exactly ``recorded_actions``
    and refuses others, so no transition can reach a replay with an action that did not cause it. `offline` makes an
    agent that takes them. With ``learning_starts`` and ``replay_capacity`` both the number of rows, the whole data
    set is in the replay before the first update, and every later pass puts the same rows in the same places::

        feed = DatasetFeed.from_npz("walks.npz", action_space=box, evaluation="Walker2d-v5")
        config = AgentConfig(hyperparameters=Hyperparameters(learning_starts=len(feed), replay_capacity=len(feed), ...),
                             training=Training(steps=len(feed) + 100_000))  # 100,000 updates
        AgentTrainer(config, feed, agent=offline(SAC(config), feed)).train()

    ``data``: ``observations`` and ``next_observations`` ``[rows, ...]``, ``actions``, ``rewards``, ``terminated``,
    and if wanted ``truncated`` and ``streams`` (which environment or episode a row is of: each one's rows are put
    together). Nested observations nest likewise, or have names like "observations.camera". What a replay's
    ``export_arrays`` and ``save_npz`` give will do. A row whose successor is not the next row's observation, and the
    last of a part, counts as truncated, if it is not terminated.
    ``action_space`` is needed, since the bounds of actions cannot be told from a sample of them;
    ``observation_space`` is unbounded by default. ``num_environments``: the parts, at most as many as rows.
    ``evaluation``: what `make_feed` makes an evaluation feed of, anew each time; None: there is none.

    Everything is copied once, and is random nowhere: the keys are not used. Raises ValueError or TypeError for
    names, lengths, shapes and dtypes that do not fit, and for rewards that are not finite. One thread.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        action_space: Space,
        observation_space: Space | None = None,
        num_environments: int = 1,
        name: str = "dataset",
        evaluation: Any = None,
    ) -> None:
        if observation_space is None:
            if "observations" not in data:
                raise ValueError("the data lack 'observations' (nested ones named with dots need observation_space)")
            observation_space = space_like(row_of(data["observations"], 0))
        self.observation_space: Space = check_observation_space(observation_space)
        self.action_space: Space = check_action_space(action_space)
        columns = _columns(data, self.observation_space)
        rows = len(columns["rewards"])
        if not 1 <= num_environments <= rows:
            raise ValueError(f"num_environments is {num_environments}; it must lie in [1, {rows}], the number of rows")
        self._observations = to_batch(self.observation_space, columns["observations"], rows)
        self._successors = to_batch(self.observation_space, columns["next_observations"], rows)
        self._actions = to_array(self.action_space, columns["actions"], "actions", (rows,))
        self._rewards = to_vector(columns["rewards"], np.float64, rows, "rewards")
        self._terminated = to_vector(columns["terminated"], np.bool_, rows, "terminated")
        self._truncated = to_vector(columns["truncated"], np.bool_, rows, "truncated")
        if not np.isfinite(self._rewards).all():
            row = int(np.flatnonzero(~np.isfinite(self._rewards))[0])
            raise ValueError(f"rewards[{row}] is {self._rewards[row]}; rewards must be finite")
        edges = np.linspace(0, rows, num_environments + 1).astype(np.int64)
        self._starts, self._lengths = edges[:-1], np.diff(edges)
        self._truncated |= ~self._terminated & ~_goes_on(self._observations, self._successors)
        self._truncated[edges[1:] - 1] |= ~self._terminated[edges[1:] - 1]
        self._position = 0  # in every part
        self.num_environments = num_environments
        self.name = name
        self._evaluation = evaluation

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str], *, action_space: Space, **options: Any) -> DatasetFeed:
        """The arrays of an npz file; ``options`` are the class's. Nothing is unpickled: arrays of objects are refused
        with a ValueError.
        """
        with np.load(path, allow_pickle=False) as file:
            return cls({name: file[name] for name in file.files}, action_space=action_space, **options)

    @classmethod
    def from_minari(cls, dataset: Any, **options: Any) -> DatasetFeed:
        """A Minari data set, or the id of a local one; ``options`` are the class's.

        It is asked for ``observation_space``, ``action_space``, ``id``, ``iterate_episodes()`` (whose ``observations``
        have one row more than the rest) and, to evaluate, ``recover_environment(eval_env=True)`` where it has an
        ``env_spec``. ImportError for an id where Minari is not installed.
        """
        if isinstance(dataset, str):
            try:
                minari = importlib.import_module("minari")
            except ImportError as error:
                raise ImportError(f"data set {dataset!r} needs Minari: pip install 'minari[hdf5]'") from error
            dataset = minari.load_dataset(dataset)
        space, episodes = dataset.observation_space, list(dataset.iterate_episodes())
        if not episodes:
            raise ValueError(f"{dataset.id} has no episodes")
        shown = [episode.observations for episode in episodes]
        data = {
            "observations": map_space(lambda _, *parts: np.concatenate([p[:-1] for p in parts]), space, *shown),
            "next_observations": map_space(lambda _, *parts: np.concatenate([p[1:] for p in parts]), space, *shown),
            "actions": np.concatenate([episode.actions for episode in episodes]),
            "rewards": np.concatenate([episode.rewards for episode in episodes]),
            "terminated": np.concatenate([episode.terminations for episode in episodes]),
            "truncated": np.concatenate([episode.truncations for episode in episodes]),
            "streams": np.repeat(np.arange(len(episodes)), [len(episode.rewards) for episode in episodes]),
        }
        if getattr(dataset, "env_spec", None) is not None:
            options.setdefault("evaluation", lambda: dataset.recover_environment(eval_env=True))
        options.setdefault("name", dataset.id)
        return cls(data, observation_space=space, action_space=dataset.action_space, **options)

    def __len__(self) -> int:
        return len(self._rewards)

    @property
    def recorded_actions(self) -> Array:
        """The actions ``[n, *action_shape]`` that were taken in what the feed showed last; what the next step takes."""
        recorded: Array = self._actions[self._rows()]
        return recorded

    def init(self, random_key: RandomKey) -> Step:
        """Begin every part with its first row."""
        self._position = 0
        return reset_state(row_of(self._observations, self._rows()), self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """Go on where every part stands: an episode of its own begins there. After an episode of one part has ended,
        that is the next one; of several parts, run by episodes, rows are passed over while the longest episode ends.
        """
        return reset_state(row_of(self._observations, self._rows()), self.num_environments), random_key

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``. A part that is through while a longer one is not does not step.

        ValueError where an action is not the recorded one; nothing moves then.
        """
        rows, stepped = self._rows(), self._position < self._lengths
        actions = to_array(self.action_space, actions, "actions", (self.num_environments,))
        recorded = self._actions[rows]
        wrong = ((actions != recorded) & ~((actions != actions) & (recorded != recorded))).reshape(len(rows), -1)
        wrong_rows = np.flatnonzero(wrong.any(axis=1) & stepped)
        if len(wrong_rows):
            i = int(wrong_rows[0])
            raise ValueError(
                f"actions[{i}] is {actions[i]} where {recorded[i]} was recorded; a data set answers no other action. "
                "Train with agent=offline(agent, feed)"
            )
        self._position = (self._position + 1) % int(self._lengths.max())
        observation = row_of(self._observations, self._rows())
        final = row_of(self._successors, rows)
        if not stepped.all():
            idle = np.flatnonzero(~stepped)
            for name, leaf in leaves(final).items():
                leaf[idle] = leaves(observation)[name][idle]
        return (
            EnvironmentState(
                observation,
                np.where(stepped, self._rewards[rows], 0.0),
                self._terminated[rows] & stepped,
                self._truncated[rows] & stepped,
                final,
                stepped,
            ),
            random_key,
        )

    def evaluation_feed(self) -> DataFeed | None:
        """A feed of one environment made of ``evaluation``, or None."""
        return None if self._evaluation is None else make_feed(self._evaluation)

    def close(self) -> None:
        """Nothing to release."""

    def _rows(self) -> Array:
        """The row that each part shows: a part that is through shows its first again."""
        position = np.where(self._position < self._lengths, self._position, 0)
        rows: Array = self._starts + position
        return rows


def offline(agent: AnyAgent, feed: DatasetFeed) -> AnyAgent:
    """A copy of ``agent`` that takes the actions which ``feed`` recorded, and learns from them as from its own.

    Only ``select_action`` differs, so what it saves can be loaded by the agent itself, to go on in an environment.
    """
    follower = copy.copy(agent)
    changed: Any = follower
    changed.select_action = lambda rl_state, iteration: (feed.recorded_actions, rl_state)
    return follower


def _columns(data: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The named columns of the data, each stream's rows together. ValueError for names and lengths."""
    given = dict(data)
    found = {name: _take(given, name, space) for name in ("observations", "next_observations")}
    missing = [name for name in ("actions", "rewards", "terminated") if name not in given]
    if missing:
        raise ValueError(f"the data lack {missing}; a row has {_NAMES}, of which the last two may be left out")
    found |= {name: np.asarray(given.pop(name)) for name in ("actions", "rewards", "terminated")}
    rows = len(found["rewards"]) if found["rewards"].ndim else 0
    if rows == 0:
        raise ValueError("the data have no rows")
    found["truncated"] = np.asarray(given.pop("truncated", np.zeros(rows, np.bool_)))
    streams = np.asarray(given.pop("streams", np.zeros(rows, np.int64)))
    unknown = sorted(set(given) - set(_LEFT_ASIDE))
    if unknown:
        raise ValueError(f"the data hold {unknown}, which are no part of a transition; a row has {_NAMES}")
    for name, part in (leaves(found, "") | {".streams": streams}).items():
        if np.shape(part)[:1] != (rows,):
            raise ValueError(f"{name[1:]} has shape {list(np.shape(part))}; rewards has {rows} rows")
    order = np.argsort(streams, kind="stable")
    found = {name: row_of(part, order) for name, part in found.items()}
    last = np.append(np.diff(streams[order]) != 0, True)  # of its stream
    found["truncated"] = found["truncated"].astype(np.bool_) | (last & ~found["terminated"].astype(np.bool_))
    return found


def _take(given: dict[str, Any], name: str, space: Space) -> Any:
    """Take observations out of ``given``: a tree under their name, or its leaves under names with dots."""
    if name in given:
        return _arrays(given.pop(name))
    named = {f"{name}{leaf.removeprefix('observations')}": part for leaf, part in leaves(space).items()}
    missing: Sequence[str] = [leaf for leaf in named if leaf not in given]
    if missing:
        raise ValueError(f"the data lack {missing}")
    values = iter([np.asarray(given.pop(leaf)) for leaf in named])
    return map_space(lambda _: next(values), space)


def _arrays(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _arrays(part) for name, part in tree.items()}
    return tuple(_arrays(part) for part in tree) if isinstance(tree, tuple) else np.asarray(tree)


def _goes_on(observations: Any, successors: Any) -> Array:
    """Whether each row's successor is what the next row observes; the last one's is not."""
    rows = len(next(iter(leaves(observations).values())))
    same = np.ones(rows, dtype=np.bool_)
    same[-1] = False
    others = leaves(successors)
    for name, leaf in leaves(observations).items():
        after, shown = others[name][:-1].reshape(rows - 1, -1), leaf[1:].reshape(rows - 1, -1)
        same[:-1] &= ((after == shown) | ((after != after) & (shown != shown))).all(axis=1)
    return same
