"""What the checks run an agent on: a feed that needs no environment, and the trainer's order of calls."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from angle_rl.feed import DataFeed
from angle_rl.spaces import Space, check_action_space, check_observation_space, map_space, with_rows
from angle_rl.types import Array, EnvironmentState, RandomKey, RLState, reset_state


def draw(space: Space, n: int, key: RandomKey) -> Any:
    """``n`` values of a space, ``[n, ...]``: uniform within bounds, standard normals where there are none."""

    def leaf(part: Any) -> Array:
        nonlocal key
        one, key = key.split(2)
        share = one.uniform(n, *part.shape).numpy()
        if isinstance(part, spaces.Box):
            low, high = np.float64(part.low), np.float64(part.high)
            if not part.is_bounded():
                normals = np.clip(one.normal(*share.shape, dtype=torch.float64).numpy(), low, high)
                return np.asarray(normals.astype(part.dtype))
            whole = part.dtype.kind in "iu"
            values = low + (np.floor(share * (high - low + 1)) if whole else share * (high - low))
            return np.asarray(values.astype(part.dtype))
        count = 2 if isinstance(part, spaces.MultiBinary) else part.nvec if hasattr(part, "nvec") else part.n
        return np.asarray((getattr(part, "start", 0) + np.floor(share * count)).astype(part.dtype))

    return map_space(leaf, space)


class BrokenError(Exception):
    """What a check raises inside; `check_agent` adds the name of the check: `check`, or the one under way."""

    def __init__(self, text: str, check: str | None = None) -> None:
        super().__init__(text)
        self.check = check


def require_due(name: str, steps: int, result: Any) -> None:
    """BrokenError unless a callback returned what it must: right types, as far as the runner uses them."""
    where, check = f"{name} after {steps} steps returned", "callbacks_return_what_is_due"
    pair = isinstance(result, tuple) and len(result) == 2 and not isinstance(result, RLState)
    if name == "reset":
        if not pair or not isinstance(result[1], RandomKey):
            raise BrokenError(f"{where} {shortly(result)}; it must return (agent_state, RandomKey)", check)
        return
    if name == "select_action":
        if not pair or not isinstance(result[1], RLState):
            raise BrokenError(f"{where} {shortly(result)}; it must return (actions, RLState)", check)
        result = result[1]
    if not isinstance(result, RLState):
        raise BrokenError(f"{where} {shortly(result)}; it must return an RLState", check)
    if not isinstance(result.random_key, RandomKey):
        raise BrokenError(f"{where} a random_key that is {shortly(result.random_key)}", check)


def shortly(value: Any) -> str:
    """A value's type, or its members' types."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return f"a {type(value).__name__}"


class CheckFeed:
    """A feed of random observations, for checks: every kind of row comes up within 20 steps.

    Environment i's episodes have ``3 + i % 3`` steps. They end terminated or truncated, and the new one begins
    within the same step or in a step of its own (``stepped`` False), in turn. Rewards grow with the actions.
    """

    def __init__(self, observation_space: Space, action_space: Space, num_environments: int) -> None:
        if num_environments < 1:
            raise ValueError(f"num_environments is {num_environments}; at least 1 is needed")
        self.observation_space = check_observation_space(observation_space)
        self.action_space = check_action_space(action_space)
        self.num_environments = num_environments
        self.name = "check"
        self._time_steps = [0] * num_environments
        self._episodes = list(range(num_environments))

    def init(self, random_key: RandomKey) -> tuple[EnvironmentState, RandomKey]:
        """Begin an episode everywhere."""
        key, random_key = random_key.split(2)
        self._time_steps = [0] * self.num_environments
        self._episodes = list(range(self.num_environments))
        observation = draw(self.observation_space, self.num_environments, key)
        return reset_state(observation, self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> tuple[EnvironmentState, RandomKey]:
        """As `init`."""
        return self.init(random_key)

    def step(
        self, random_key: RandomKey, environment_state: EnvironmentState, actions: Array
    ) -> tuple[EnvironmentState, RandomKey]:
        """See `DataFeed.step`."""
        n = self.num_environments
        final_key, first_key, reward_key, random_key = random_key.split(4)
        final, first = (draw(self.observation_space, n, key) for key in (final_key, first_key))
        rewards = reward_key.uniform(n).numpy() + np.float64(actions).reshape(n, -1).mean(1)
        terminated, truncated = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        stepped, restarts = np.ones(n, np.bool_), {}
        for i in range(n):
            if self._time_steps[i] < 0:  # the episode ended, and this step is its reset
                stepped[i], rewards[i], self._time_steps[i] = False, 0.0, 0
                continue
            self._time_steps[i] += 1
            if self._time_steps[i] == 3 + i % 3:
                kind = self._episodes[i] % 4
                terminated[i], truncated[i] = kind in (0, 3), kind in (1, 2)
                self._episodes[i] += 1
                self._time_steps[i] = 0 if kind in (0, 2) else -1
                if kind in (0, 2):
                    restarts[i] = map_space(lambda _, part, row=i: part[row], self.observation_space, first)
        observation = with_rows(self.observation_space, final, restarts)
        return EnvironmentState(observation, rewards, terminated, truncated, final, stepped), random_key

    def close(self) -> None:
        """Nothing to release."""


Finish = Callable[[Any], None]
Watch = Callable[[str, "Run", tuple[Any, ...]], "Finish | None"]
"""Called before each callback with its name, the run and its arguments; what it gives is called with the result."""
Tamper = Callable[[Array, EnvironmentState], "tuple[Array, EnvironmentState]"]


def init_options(feed: DataFeed, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the trainer hands to an agent's init beside the key, and `options`."""
    given = {"policy": None, "critics": None, "replay": None, "meta": None} | dict(options)
    return given | {"observation_space": feed.observation_space, "action_space": feed.action_space}


class Run:
    """One agent on one feed, called in the trainer's order.

    `options` go to the agent's init beside the spaces. `state` is what the next callback gets.
    """

    def __init__(
        self,
        agent: Any,
        feed: DataFeed,
        options: Mapping[str, Any],
        *,
        seed: int,
        agent_seed: int | None = None,
        watch: Watch | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        self.agent, self.feed, self.watch, self.tamper = agent, feed, watch, tamper
        agent_key, self.feed_key, run_key = RandomKey(seed).split(3)
        if agent_seed is not None:
            agent_key = RandomKey(agent_seed)
        self.steps = 0  # times that the environments were stepped
        self.recorded = 0  # transitions: rows that stepped
        agent_state, _ = agent.init(agent_key, **init_options(feed, options))
        nothing_seen: Any = None
        self.state = RLState(agent_state, nothing_seen, run_key, 0, 0, None)

    def begin(self) -> Run:
        """New episodes everywhere, as at the start and after a load."""
        seen, self.feed_key = self.feed.init(self.feed_key)
        self.state = self.state._replace(environment_state=seen)
        self.reset()
        return self

    def advance(self, steps: int) -> list[Array]:
        """So many steps; returns the actions of each."""
        return [self.step() for _ in range(steps)]

    def step(self) -> Array:
        """One step of everything; returns the actions."""
        actions = self.select()
        self.record(actions.copy())  # an agent that writes into them is found by a check of its own
        self.optimize()
        seen = self.state.environment_state
        for _ in np.flatnonzero((seen.terminated | seen.truncated) & seen.stepped):
            self.reset()
            iteration = 0 if self.feed.num_environments == 1 else self.state.iteration
            self.state = self.state._replace(iteration=iteration, episode=self.state.episode + 1)
        return actions

    def select(self) -> Array:
        """`select_action`; returns a copy of the actions."""
        actions, self.state = self._call("select_action", self.state, self.state.iteration)
        return actions.copy() if isinstance(actions, np.ndarray) else np.asarray(actions)

    def record(self, actions: Array) -> None:
        """The feed's step and `record_observation`, of whose result the agent_state counts."""
        state = self.state
        seen, self.feed_key = self.feed.step(self.feed_key, state.environment_state, actions)
        if self.tamper is not None:
            actions, seen = self.tamper(actions, seen)
        next_state = state._replace(environment_state=seen, iteration=state.iteration + 1)
        recorded = self._call("record_observation", state, actions, seen.reward, seen.terminated, next_state)
        self.steps += 1
        self.recorded += int(seen.stepped.sum())
        self.state = next_state._replace(agent_state=recorded.agent_state)

    def optimize(self) -> None:
        """`optimize_model`."""
        self.state = self._call("optimize_model", self.state)

    def reset(self) -> None:
        """`reset`."""
        agent_state, random_key = self._call("reset", self.state.random_key, self.state)
        self.state = self.state._replace(agent_state=agent_state, random_key=random_key)

    def _call(self, name: str, *arguments: Any) -> Any:
        finish = self.watch(name, self, arguments) if self.watch is not None else None
        result = getattr(self.agent, name)(*arguments)
        require_due(name, self.steps, result)
        if finish is not None:
            finish(result)
        return result


def global_generators() -> dict[str, Any]:
    """The states of the global generators of random, NumPy and torch."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    states: dict[str, Any] = {"random": random.getstate(), "numpy.random": numpy_state}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["torch.cuda"] = torch.cuda.get_rng_state_all()
    return states


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """The global generators seeded inside, and as they were afterwards."""
    before = global_generators()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before["random"])
        np.random.set_state(before["numpy.random"])  # noqa: NPY002
        torch.set_rng_state(before["torch"])
        if "torch.cuda" in before:
            torch.cuda.set_rng_state_all(before["torch.cuda"])
