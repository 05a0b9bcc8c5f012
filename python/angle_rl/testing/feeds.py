"""Whether a feed, a user's own too, keeps what DataFeed promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from angle_rl.feed.protocol import DataFeed
from angle_rl.feed.wrapping import leaves
from angle_rl.tensors import as_arrays, device_of
from angle_rl.types import Array, EnvironmentState, RandomKey


def check_feed(
    feed: DataFeed,
    *,
    steps: int = 200,
    random_key: RandomKey | None = None,
    actions: Callable[[], Array] | None = None,
) -> None:
    """Run a feed for ``steps`` steps, twice from the same key, and raise AssertionError for the first promise broken.

    Checked: the names; shapes and dtypes of what it gives, in arrays, or tensors on the feed's ``device``; that a start
    has no reward, flags or ``stepped``; that ``observation`` is ``final_observation`` where an episode goes on; that
    rows which did not step have reward 0, no flags, and follow an end; that nothing handed out is written to later;
    that the same key and actions give the same again; that actions of a wrong shape are refused; that it can be closed
    twice, which this function does.
    ``actions``: gives the next ones ``[n, ...]``; None: random ones of the action space. One thread.
    """
    for name in ("observation_space", "action_space", "num_environments", "name", "init", "reset", "step", "close"):
        assert hasattr(feed, name), f"a {type(feed).__name__} has no {name}"
    n, key = feed.num_environments, RandomKey(0) if random_key is None else random_key
    assert isinstance(n, int), f"num_environments is {n!r}; it must be an int"
    assert n >= 1, f"num_environments is {n}; at least 1 is needed"
    first, taken = _run(feed, key, steps, actions, None)
    second, _ = _run(feed, key, steps, actions, taken)
    for time, (one, other) in enumerate(zip(first, second, strict=True)):
        for name, here, there in zip(EnvironmentState._fields, one, other, strict=True):
            assert _same(here, there), f"{name} after {time} steps differs though key and actions are the same"
    state, key = feed.reset(key, second[-1])
    _check_start(feed, state, "reset")
    try:
        feed.step(key, state, np.zeros((n + 1, *(feed.action_space.shape or ())), feed.action_space.dtype))
    except (TypeError, ValueError):
        pass
    else:
        raise AssertionError(f"step took {n + 1} actions for {n} environments")
    feed.close()
    feed.close()


def _run(
    feed: DataFeed, key: RandomKey, steps: int, actions: Callable[[], Array] | None, given: list[Array] | None
) -> tuple[list[EnvironmentState], list[Array]]:
    """The states of a run and the actions taken: those given, or new ones."""
    space = copy.deepcopy(feed.action_space)
    space.seed(key.seed())
    state, key = feed.init(key)
    _check_start(feed, state, "init")
    states, copies, taken = [state], [copy.deepcopy(state)], []
    for time in range(steps):
        if given is not None:
            action = given[time]
        elif actions is not None:
            action = actions()
        else:
            action = np.stack([np.asarray(space.sample()) for _ in range(feed.num_environments)])
        taken.append(action.copy())
        after, key = feed.step(key, state, action)
        _check_step(feed, state, after, time)
        state = after
        states.append(state)
        copies.append(copy.deepcopy(state))
    for time, (one, other) in enumerate(zip(states, copies, strict=True)):
        for name, now, then in zip(EnvironmentState._fields, one, other, strict=True):
            assert _same(now, then), f"{name} after {time} steps was written to after it was handed out"
    return states, taken


def _check_shapes(feed: DataFeed, state: EnvironmentState, when: str) -> None:
    n = feed.num_environments
    for name in ("observation", "final_observation"):
        found, wanted = leaves(_arrays(feed, getattr(state, name)), name), leaves(feed.observation_space, name)
        assert found.keys() == wanted.keys(), f"{name} {when} holds {sorted(found)}; {sorted(wanted)} are due"
        for leaf, space in wanted.items():
            array, shape = found[leaf], (n, *(space.shape or ()))
            assert isinstance(array, np.ndarray), f"{leaf} {when} is a {type(array).__name__}, not an array"
            assert array.shape == shape, f"{leaf} {when} has shape {list(array.shape)}; {list(shape)} is due"
            assert array.dtype == space.dtype, f"{leaf} {when} is {array.dtype}; {space.dtype} is due"
    kinds = {"reward": np.float64, "terminated": np.bool_, "truncated": np.bool_, "stepped": np.bool_}
    for name, kind in kinds.items():
        array = getattr(state, name)
        assert isinstance(array, np.ndarray), f"{name} {when} is a {type(array).__name__}, not an array"
        assert array.shape == (n,), f"{name} {when} has shape {list(array.shape)}; [{n}] is due"
        assert array.dtype == kind, f"{name} {when} is {array.dtype}; {np.dtype(kind)} is due"


def _check_start(feed: DataFeed, state: EnvironmentState, call: str) -> None:
    _check_shapes(feed, state, f"after {call}")
    for name in ("stepped", "terminated", "truncated", "reward"):
        assert not getattr(state, name).any(), f"{name} is set after {call}, where nothing happened yet"
    assert _same(state.observation, state.final_observation), f"final_observation differs from observation after {call}"


def _check_step(feed: DataFeed, before: EnvironmentState, after: EnvironmentState, time: int) -> None:
    when = f"in step {time}"
    _check_shapes(feed, after, when)
    idle, ended = ~after.stepped, after.terminated | after.truncated
    assert not (idle & ended).any(), f"a row that did not step has flags {when}"
    assert not after.reward[idle].any(), f"a row that did not step has a reward {when}"
    assert not (idle & before.stepped & ~(before.terminated | before.truncated)).any(), (
        f"a row did not step {when} though its episode had not ended"
    )
    on = ~ended
    final = leaves(_arrays(feed, after.final_observation))
    for name, leaf in leaves(_arrays(feed, after.observation)).items():
        assert _same(leaf[on], final[name][on]), f"{name} {when} is not where the step led, and no episode ended"


def _arrays(feed: DataFeed, observation: Any) -> Any:
    """An observation to look at; as it is, where it is not on the device that the feed names."""
    place = getattr(feed, "device", None)
    return as_arrays(observation) if place is not None and place == device_of(observation) else observation


def _same(one: Any, other: Any) -> bool:
    one, other = as_arrays(one), as_arrays(other)
    return all(
        np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
        for a, b in zip(leaves(one).values(), leaves(other).values(), strict=True)
    )
