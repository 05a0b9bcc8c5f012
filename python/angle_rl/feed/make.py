"""The feed of whatever a user has: an id, an environment, a function, a feed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from angle_rl.feed.protocol import DataFeed, Environment
from angle_rl.feed.single import GymnasiumFeed
from angle_rl.feed.vector import VectorFeed
from angle_rl.function_feed import FunctionFeed, arguments


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
