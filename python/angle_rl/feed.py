"""Where transitions come from: Gymnasium environments, single or vectorised, or a function.

A ``DataFeed`` runs ``n`` environments side by side; every array that it gives has a leading axis ``n``, also
for one environment. Observations of Dict and Tuple spaces are dicts and tuples of such arrays, in the dtypes
of the space. What it gives is never overwritten later. All randomness comes from the keys it is handed:
``init`` and ``reset`` seed the environments, so the same key gives the same episodes. What an environment
raises passes through untouched, and rewards are passed on as they come, finite or not. A feed belongs to one
thread.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from angle_rl.function_feed import FunctionFeed, arguments
from angle_rl.spaces import (
    Space,
    check_action_space,
    check_observation_space,
    empty_batch,
    row_of,
    to_array,
    to_batch,
    to_vector,
    with_rows,
    write_row,
)
from angle_rl.types import Array, EnvironmentState, RandomKey, reset_state

__all__ = ["DataFeed", "FunctionFeed", "GymnasiumFeed", "VectorFeed", "make_evaluation_feed", "make_feed"]

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


def make_feed(source: Any, *, num_environments: int = 1, **options: Any) -> DataFeed:
    """The feed of a source.

    ``source``: a registered id or ``EnvSpec`` (``num_environments`` copies; ``options`` go to
    ``gymnasium.make``), a class or zero-argument function making an ``Env`` (likewise; no options), an
    ``Env``, a ``VectorEnv``, a ``DataFeed``, or a transition function (``options`` are ``FunctionFeed``'s).
    For a source that fixes its own number of environments, ``num_environments`` is 1 or that number.
    Raises ValueError or TypeError; for an unknown id it names the nearest registered ones.
    """
    if not isinstance(num_environments, int) or num_environments < 1:
        raise ValueError(f"num_environments is {num_environments!r}; at least 1 is needed")
    if isinstance(source, (str, EnvSpec)):
        name = source if isinstance(source, str) else source.id
        return _feed_of(lambda: _make_registered(source, options), num_environments, name)
    if isinstance(source, (gymnasium.Env, VectorEnv, DataFeed)) and not isinstance(source, type):
        if options:
            raise TypeError(f"options {sorted(options)} do not apply to a {type(source).__name__} made already")
        feed: DataFeed
        if isinstance(source, VectorEnv):
            feed = VectorFeed(source)
        elif isinstance(source, gymnasium.Env):
            feed = GymnasiumFeed([source])
        else:
            feed = source
        if num_environments not in (1, feed.num_environments):
            raise ValueError(
                f"num_environments is {num_environments}, but the {type(source).__name__} given has "
                f"{feed.num_environments}; pass an id, or a function that makes one environment"
            )
        return feed
    if not callable(source):
        raise TypeError(
            f"source is a {type(source).__name__}; a feed is made of an environment id, an Env, a VectorEnv, "
            "a DataFeed or a function"
        )
    if isinstance(source, type) or ("initial_observation" not in options and _makes_environments(source)):
        if options:
            raise TypeError(f"options {sorted(options)} do not apply to a function that makes environments")
        return _feed_of(source, num_environments, None)
    return FunctionFeed(source, num_environments=num_environments, **options)


def make_evaluation_feed(feed: DataFeed) -> DataFeed | None:
    """An independent feed of one environment like ``feed``'s, to evaluate on, or None where none can be made.

    It asks the feed's ``evaluation_feed()``, if it has one. An environment that keeps statistics (say, a
    normalising wrapper) is copied with those it has now: ask again for each evaluation. The caller closes it.
    """
    make = getattr(feed, "evaluation_feed", None)
    return None if make is None else cast("DataFeed | None", make())


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
        self.name = name or _environment_name(first)
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
        """See ``DataFeed.step``; every row has ``stepped``. The key is returned unused."""
        n, space = self.num_environments, self.observation_space
        actions = to_array(self.action_space, actions, "actions", (n,))
        final = empty_batch(space, n)
        rewards = np.empty(n, dtype=np.float64)
        terminated, truncated = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
        restarts: dict[int, Any] = {}
        for index, environment in enumerate(self._environments):
            successor, reward, terminated[index], truncated[index], _ = environment.step(actions[index])
            rewards[index] = np.asarray(reward, dtype=np.float64).item()
            write_row(space, final, index, successor)
            if terminated[index] or truncated[index]:
                restarts[index], _ = environment.reset()
        observation = with_rows(space, final, restarts)
        stepped = np.ones(n, dtype=np.bool_)
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


class VectorFeed:
    """Feeds from a Gymnasium ``VectorEnv``, in each of its three autoreset modes
    (``metadata["autoreset_mode"]``).

    NEXT_STEP: the step after an episode's end is the reset, and has ``stepped`` False. SAME_STEP: the true
    successor is taken from ``infos["final_obs"]``. DISABLED: ended rows are reset here, with
    ``options={"reset_mask": …}``. Another mode, or none, is refused with a ValueError. ``owned``: ``close``
    closes the environment.
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
        self.name = name or _environment_name(environment)
        self._environment = environment
        self._owned = owned

    def init(self, random_key: RandomKey) -> Step:
        """Seed and reset all of them; the environment derives the single seeds from one."""
        key, random_key = random_key.split(2)
        observation, _ = self._environment.reset(seed=key.seed())
        observation = to_batch(self.observation_space, observation, self.num_environments)
        return reset_state(observation, self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self.init(random_key)

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array) -> Step:
        """See ``DataFeed.step``. The key is returned unused."""
        n, space = self.num_environments, self.observation_space
        actions = to_array(self.action_space, actions, "actions", (n,))
        observation, reward, terminations, truncations, infos = self._environment.step(actions)
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
                    first, _ = self._environment.reset(options={"reset_mask": ended.copy()})
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
            self._environment.close()
            self._owned = False


def _feed_of(factory: Callable[[], Any], number: int, name: str | None) -> GymnasiumFeed:
    environments: list[Environment] = []
    try:
        for _ in range(number):
            environment = factory()
            if not isinstance(environment, gymnasium.Env):
                raise TypeError(
                    f"source made a {type(environment).__name__}; a function of no arguments must make an Env"
                )
            environments.append(environment)
        return GymnasiumFeed(environments, name=name, factory=factory, owned=True)
    except BaseException:
        for environment in environments:
            environment.close()
        raise


def _make_registered(source: str | EnvSpec, options: Mapping[str, Any]) -> Environment:
    try:
        # The checker warns of faults while an environment is being written; it costs more than a small step.
        return gymnasium.make(source, **{"disable_env_checker": True, **options})
    except gymnasium.error.Error as error:
        unknown = isinstance(error, (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv))
        if not isinstance(source, str) or not (unknown or type(error) is gymnasium.error.Error):
            raise
        known = {name.lower(): name for name in gymnasium.registry}
        nearest = [known[name] for name in difflib.get_close_matches(source.lower(), known, n=3)]
        hint = f"the nearest names: {', '.join(nearest)}" if nearest else "no registered name is like it"
        raise ValueError(f"environment {source!r} cannot be made ({error}); {hint}") from error


def _makes_environments(function: Callable[..., Any]) -> bool:
    required, _, variadic = arguments(function)
    return required == 0 and not variadic


def _environment_name(environment: Environment | VectorEnv[Any, Any, Any]) -> str:
    return environment.spec.id if environment.spec is not None else type(environment.unwrapped).__name__


def _final_rows(infos: Mapping[str, Any], rows: Sequence[int]) -> dict[int, Any]:
    """The successors of ended episodes out of a SAME_STEP environment's infos: one by one, or batched."""
    if "final_obs" not in infos:
        raise ValueError("an episode ended without infos['final_obs'], though autoreset_mode is SAME_STEP")
    found = {index: row_of(infos["final_obs"], index) for index in rows}
    missing = [index for index, row in found.items() if row is None]
    if missing:
        raise ValueError(f"infos['final_obs'] is None in rows {missing}, where an episode ended")
    return found
