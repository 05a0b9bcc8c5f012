"""The feed of whatever a user has: an id, an environment, a function, a feed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from angle_rl.feed.protocol import DataFeed, Environment, environment_name
from angle_rl.feed.single import GymnasiumFeed
from angle_rl.feed.vector import VectorFeed
from angle_rl.feed.workers import in_worker
from angle_rl.function_feed import FunctionFeed, arguments


def make_feed(
    source: Any, *, num_environments: int = 1, vectorization: Literal["sync", "async"] | None = None, **options: Any
) -> DataFeed:
    """The feed of a source.

    ``source``: a registered id or ``EnvSpec`` (``num_environments`` copies; ``options`` go to
    ``gymnasium.make``), a class or zero-argument function making an ``Env`` (likewise; no options), an
    ``Env``, a ``VectorEnv``, a ``DataFeed``, or a transition function (``options`` are ``FunctionFeed``'s).
    ``vectorization``, where environments are made: None steps them one after the other here; "sync" and "async"
    make a Gymnasium SyncVectorEnv, or AsyncVectorEnv with a process each, which restart within the step.
    For a source that fixes its own number of environments, ``num_environments`` is 1 or that number.
    Raises ValueError or TypeError; for an unknown id it names the nearest registered ones.
    """
    if not isinstance(num_environments, int) or num_environments < 1:
        raise ValueError(f"num_environments is {num_environments!r}; at least 1 is needed")
    if vectorization not in (None, "sync", "async"):
        raise ValueError(f"vectorization is {vectorization!r}; it must be 'sync', 'async' or None")
    if isinstance(source, (str, EnvSpec)):
        name = source if isinstance(source, str) else source.id
        return _feed_of(lambda: _make_registered(source, options), num_environments, name, vectorization)
    if vectorization is not None and not _makes(source, options):
        raise TypeError(
            f"vectorization is {vectorization!r}; it applies to an environment id or a function that makes "
            f"environments, not to this {type(source).__name__}"
        )
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
    if _makes(source, options):
        if options:
            raise TypeError(f"options {sorted(options)} do not apply to a function that makes environments")
        return _feed_of(source, num_environments, None, vectorization)
    return FunctionFeed(source, num_environments=num_environments, **options)


def _feed_of(factory: Callable[[], Any], number: int, name: str | None, vectorization: str | None) -> DataFeed:
    def make() -> Environment:
        environment = factory()
        if not isinstance(environment, gymnasium.Env):
            raise TypeError(f"source made a {type(environment).__name__}; a function of no arguments must make an Env")
        return environment

    if vectorization is not None:
        if name is None:
            name = _name_of_one(make)
        kind: Any = AsyncVectorEnv if vectorization == "async" else SyncVectorEnv
        made = in_worker(make) if vectorization == "async" else make
        return VectorFeed(kind([made] * number, autoreset_mode=AutoresetMode.SAME_STEP), name=name, owned=True)
    environments: list[Environment] = []
    try:
        environments.extend(make() for _ in range(number))
        return GymnasiumFeed(environments, name=name, factory=make, owned=True)
    except BaseException:
        for environment in environments:
            environment.close()
        raise


def _name_of_one(make: Callable[[], Environment]) -> str:
    environment = make()
    environment.close()
    return environment_name(environment)


def _make_registered(source: str | EnvSpec, options: Mapping[str, Any]) -> Environment:
    if isinstance(source, str) and source.startswith("MinAtar/"):
        _register_minatar(source)
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


def _register_minatar(name: str) -> None:
    """MinAtar's environments are registered by a call of its own. ImportError where it is not installed."""
    if name in gymnasium.registry:
        return
    try:
        from minatar import gym as minatar
    except ImportError as error:
        raise ImportError(f"environment {name!r} needs MinAtar: pip install minatar") from error
    minatar.register_envs()


def _makes(source: Any, options: Mapping[str, Any]) -> bool:
    """Whether it is a class or a function that makes environments."""
    if isinstance(source, type):
        return True
    if isinstance(source, (gymnasium.Env, VectorEnv, DataFeed)) or not callable(source):
        return False
    required, _, variadic = arguments(source)
    return "initial_observation" not in options and required == 0 and not variadic
