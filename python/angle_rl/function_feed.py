"""Transitions from a function: the feed behind a simulator that is no Gymnasium environment."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from angle_rl.device import memory_device
from angle_rl.spaces import (
    Space,
    action_space_like,
    check_action_space,
    check_observation_space,
    empty_batch,
    row_of,
    space_like,
    to_array,
    to_batch,
    to_vector,
    with_rows,
    write_row,
)
from angle_rl.tensors import numbers_on_host, to_tensor, to_tensors, with_tensor_rows
from angle_rl.types import EnvironmentState, RandomKey, reset_state

Step = tuple[EnvironmentState, RandomKey]


class FunctionFeed:
    """Feeds from a function.

    It is ``f(observation, action[, time_step]) -> (next_observation, reward[, terminated[, truncated]])``.
    ``time_step``, the number of steps taken in the episode before this one, is passed iff the function takes
    three positional arguments (``*args`` does not count). The function gets copies, so it may work in place.
    ``initial_observation``: a value, or a function of nothing or of a ``RandomKey``, called for each new
    episode.
    ``observation_space``: by default unbounded, of the initial observation's shape and dtype (Python floats:
    float32).
    ``action_space``: by default a Box in [-1, 1] with ``initial_action``'s shape and float dtype.
    ``initial_action`` is an example action, used for nothing else; whole-number actions need
    ``action_space``. With both, the space must contain it.
    ``step_limit``: an episode of so many steps is truncated; where the function says terminated too, both
    flags stand.
    ``batched``: the function takes and returns ``num_environments`` rows at once (``time_step`` is then int64
    [n]; a single flag holds for all rows).
    ``device``: None: observations and actions are NumPy arrays. "cuda" or "cpu", of a batched function only: they are
    tensors there, what the function takes (``time_step`` too) and what the feed shows, and never leave it; agents then
    act by tensors, too. Only rewards and flags come to the host, each step in one copy, which the step waits for: the
    trainer keeps its books by them. What the function returns as arrays goes to the device. Whole numbers there are not
    checked to fit a narrower dtype.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        initial_observation: Any = None,
        observation_space: Space | None = None,
        action_space: Space | None = None,
        initial_action: Any = None,
        step_limit: int | None = None,
        batched: bool = False,
        num_environments: int = 1,
        name: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        required, taken, _ = arguments(function)
        if required > 3 or taken < 2:
            raise TypeError(
                f"function takes {required if required > 3 else taken} positional arguments; "
                "it is called as function(observation, action[, time_step])"
            )
        if initial_observation is None:
            raise TypeError("initial_observation is missing; a function needs what an episode begins with")
        if step_limit is not None and step_limit < 1:
            raise ValueError(f"step_limit is {step_limit}; an episode has at least 1 step (None: no limit)")
        if num_environments < 1:
            raise ValueError(f"num_environments is {num_environments}; at least 1 is needed")
        if device is not None and not batched:
            raise ValueError(f"device is {device} and batched is False; tensors there hold all environments' rows")
        if action_space is None:
            if initial_action is None:
                raise TypeError("action_space and initial_action are missing; a function needs one of them")
            action_space = action_space_like(initial_action)
        elif initial_action is not None:
            to_array(check_action_space(action_space), initial_action, "initial_action")
            if not action_space.contains(to_array(action_space, initial_action, "initial_action")):
                raise ValueError(f"initial_action is {initial_action!r}, which is not in {action_space}")
        self._initial = initial_observation
        self._initial_takes_key = callable(initial_observation) and arguments(initial_observation)[0] > 0
        if observation_space is None:
            observation_space = space_like(self._first_observation(RandomKey(0)))
        elif not callable(initial_observation):
            checked = check_observation_space(observation_space)
            write_row(checked, empty_batch(checked, 1), 0, initial_observation)
        self.observation_space: Space = check_observation_space(observation_space)
        self.action_space: Space = check_action_space(action_space)
        self.num_environments = num_environments
        self.name = name or getattr(function, "__name__", "function").strip("<>")
        self._function = function
        self._takes_time = taken >= 3
        self._step_limit = step_limit
        self._batched = batched
        self.device = None if device is None else memory_device(device)
        self._time_steps = np.zeros(num_environments, dtype=np.int64)

    def init(self, random_key: RandomKey) -> Step:
        """Begin an episode everywhere; a key-taking ``initial_observation`` gets one key per environment."""
        rows, random_key = self._begin(random_key, range(self.num_environments))
        observation = empty_batch(self.observation_space, self.num_environments)
        if self.device is not None:
            observation = to_tensors(self.observation_space, observation, self.num_environments, self.device)
        return reset_state(self._with_rows(observation, rows), self.num_environments), random_key

    def reset(self, random_key: RandomKey, environment_state: EnvironmentState) -> Step:
        """As ``init``."""
        return self.init(random_key)

    def step(self, random_key: RandomKey, environment_state: EnvironmentState, actions: Any) -> Step:
        """See ``DataFeed.step``; every row has ``stepped`` but those at rest. The key is used only where an episode
        begins.
        """
        n, space = self.num_environments, self.observation_space
        stepped = ~environment_state.at_rest()
        if self._batched:
            final, reward, ended, cut = self._all_rows(environment_state.observation, actions)
            rewards = to_vector(reward, np.float64, n, "rewards")
            ended, cut = (flag if np.ndim(flag) else np.full(n, flag) for flag in (ended, cut))
            terminated = to_vector(ended, np.bool_, n, "terminated")
            truncated = to_vector(cut, np.bool_, n, "truncated")
        else:
            actions = to_array(self.action_space, actions, "actions", (n,))
            final = copy.deepcopy(environment_state.observation)
            rewards = np.zeros(n, dtype=np.float64)
            terminated, truncated = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
            for index in np.flatnonzero(stepped).tolist():
                time: tuple[int, ...] = (int(self._time_steps[index]),) if self._takes_time else ()
                observation = copy.deepcopy(row_of(environment_state.observation, index))
                successor, reward, ended, cut = _outcome(self._function(observation, actions[index], *time))
                write_row(space, final, index, successor)
                rewards[index] = to_vector(reward, np.float64, None, "reward")
                terminated[index] = to_vector(ended, np.bool_, None, "terminated")
                truncated[index] = to_vector(cut, np.bool_, None, "truncated")
        self._time_steps += stepped
        if self._step_limit is not None:
            truncated |= self._time_steps >= self._step_limit
        rewards, terminated, truncated = np.where(stepped, rewards, 0.0), terminated & stepped, truncated & stepped
        rows, random_key = self._begin(random_key, np.flatnonzero(terminated | truncated).tolist())
        observation = self._with_rows(final, rows)
        return EnvironmentState(observation, rewards, terminated, truncated, final, stepped), random_key

    def evaluation_feed(self) -> FunctionFeed:
        """A feed of one environment from the same function."""
        return FunctionFeed(
            self._function,
            initial_observation=self._initial,
            observation_space=self.observation_space,
            action_space=self.action_space,
            step_limit=self._step_limit,
            batched=self._batched,
            name=self.name,
            device=self.device,
        )

    def close(self) -> None:
        """Nothing to release."""

    def _all_rows(self, observation: Any, actions: Any) -> tuple[Any, Any, Any, Any]:
        """What a batched function makes of copies: its successors, copied, and its rewards and flags on the host."""
        n, space, time = self.num_environments, self.observation_space, self._time_steps.copy()
        if self.device is None:
            actions = to_array(self.action_space, actions, "actions", (n,))
            given = to_batch(space, observation, n), actions, time
            successors, *numbers = _outcome(self._function(*given[: 2 + self._takes_time]))
            return to_batch(space, successors, n), *numbers
        there = to_tensors(space, observation, n, self.device)
        arguments = [there, to_tensor(self.action_space, actions, "actions", n, self.device)]
        if self._takes_time:
            arguments.append(torch.from_numpy(time).to(self.device, non_blocking=True))
        with torch.no_grad():
            successors, *numbers = _outcome(self._function(*arguments))
        return to_tensors(space, successors, n, self.device), *numbers_on_host(*numbers)

    def _with_rows(self, batch: Any, rows: dict[int, Any]) -> Any:
        return (with_rows if self.device is None else with_tensor_rows)(self.observation_space, batch, rows)

    def _begin(self, random_key: RandomKey, rows: Sequence[int]) -> tuple[dict[int, Any], RandomKey]:
        """First observations of new episodes in ``rows``."""
        if not rows:
            return {}, random_key
        self._time_steps[list(rows)] = 0
        if not self._initial_takes_key:
            return {index: self._first_observation(random_key) for index in rows}, random_key
        *keys, random_key = random_key.split(len(rows) + 1)
        first = {index: self._first_observation(key) for index, key in zip(rows, keys, strict=True)}
        return first, random_key

    def _first_observation(self, key: RandomKey) -> Any:
        if not callable(self._initial):
            return self._initial
        return self._initial(key) if self._initial_takes_key else self._initial()


def arguments(function: Callable[..., Any]) -> tuple[int, int, bool]:
    """How many positional arguments it requires, how many it names, and whether it takes ``*args``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in without a signature
        return 2, 2, False
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = sum(p.default is p.empty for p in named)
    return required, max(len(named), 2 if variadic else 0), variadic


def _outcome(result: Any) -> tuple[Any, Any, Any, Any]:
    if not isinstance(result, tuple) or not 2 <= len(result) <= 4:
        what = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise TypeError(f"function returned {what}, not (next_observation, reward[, terminated[, truncated]])")
    flags = (*result[2:], False, False)
    return result[0], result[1], flags[0], flags[1]
