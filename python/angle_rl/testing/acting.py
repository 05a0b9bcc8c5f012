"""Promises about acting: the callbacks, what passes through them, keys, rows.

Each check is a function of a `Kit` that returns where its promise is kept; it raises `BrokenError` with what broke
where, or `NotApplicableError` with the reason why it says nothing about this agent.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from angle_rl.agents.actor_critic import as_tensors
from angle_rl.agents.noise import policy_actions
from angle_rl.spaces import row_of
from angle_rl.testing.contents import Contents, as_array, both, contents, difference, same
from angle_rl.testing.kit import Kit, NotApplicableError, close, replaced
from angle_rl.testing.probe import BrokenError, Finish, Run, draw, global_generators, global_seed, init_options, shortly
from angle_rl.types import Array, RandomKey, RLState

# The callbacks ----------

CALLBACKS = {
    "init": ("random_key",),
    "reset": ("random_key", "rl_state"),
    "select_action": ("rl_state", "iteration"),
    "record_observation": ("rl_state", "action", "reward", "terminated", "next_rl_state"),
    "optimize_model": ("rl_state",),
}


def has_five_callbacks(kit: Kit) -> None:
    """All five are there and take what the runner hands them; init takes options by name besides."""
    agent = kit.make()
    for name, arguments in CALLBACKS.items():
        callback = getattr(agent, name, None)
        if not callable(callback):
            raise BrokenError(f"{type(agent).__name__} has no callback {name}({', '.join(arguments)})")
        options = {"observation_space": 0, "action_space": 0, "policy": 0, "critics": 0, "replay": 0, "meta": 0}
        try:
            inspect.signature(callback).bind(*arguments, **(options | dict(kit.options) if name == "init" else {}))
        except TypeError as error:
            due = ", ".join((*arguments, "**options") if name == "init" else arguments)
            raise BrokenError(f"{name}{inspect.signature(callback)} does not take ({due}): {error}") from None


def init_gives_a_state_and_a_new_key(kit: Kit) -> None:
    """init returns (agent_state, RandomKey); the key is not the one passed, unless nothing was drawn from that."""
    given = []
    for key in RandomKey(kit.seed).split(2):
        given.append(kit.make().init(key, **init_options(kit.feed, kit.options)))
        require_state_and_key("init", given[-1])
        kept = given[-1][1] == key
    drawn = difference(*(contents(agent_state) for agent_state, _ in given))
    if kept and drawn is not None:
        raise BrokenError(f"init drew from the key that it was passed and gave it back, {key}: under another {drawn}")


def require_state_and_key(name: str, given: Any) -> None:
    """BrokenError unless `given` is a pair whose second is a RandomKey."""
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], RandomKey):
        raise BrokenError(f"{name} returned {shortly(given)}; it must return (agent_state, RandomKey)")


# Actions ----------


def callbacks_return_what_is_due(kit: Kit) -> None:
    """select_action returns (actions, RLState), reset (agent_state, RandomKey), the other two an RLState.

    Every run looks at that; whichever check is under way, it is this one that is named.
    """
    kit.run().advance(kit.steps)


def actions_lie_in_the_space(kit: Kit) -> None:
    """select_action gives a NumPy array [n, *action_shape] of the space's kind of dtype, each row in the space."""
    space, n = kit.feed.action_space, kit.feed.num_environments
    dtype: np.dtype[Any] = np.dtype(space.dtype)

    def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> Finish | None:
        if name != "select_action":
            return None

        def finish(result: Any) -> None:
            where = f"select_action after {run.steps} steps"
            actions = result[0]
            if not isinstance(actions, np.ndarray):
                raise BrokenError(f"{where} gave {shortly(actions)}; actions are a NumPy array")
            shape = (n, *(space.shape or ()))
            if actions.shape != shape:
                raise BrokenError(f"{where} gave actions of shape {list(actions.shape)}; {list(shape)} is due")
            if actions.dtype.kind != dtype.kind and {actions.dtype.kind, dtype.kind} != {"i", "u"}:
                raise BrokenError(f"{where} gave actions of dtype {actions.dtype}; {space} needs {dtype}")
            for index in range(n):
                if not contains(space, actions[index]):
                    raise BrokenError(f"{where} gave environment {index} the action {actions[index]}, not in {space}")

        return finish

    kit.run(watch=watch).advance(kit.steps)


def contains(space: Any, action: Any) -> bool:
    """Whether an action lies in a space; floats may pass a bound by what float32 rounds off."""
    if np.dtype(space.dtype).kind != "f":
        return bool(space.contains(np.asarray(action, space.dtype)[()]))
    low, high = np.float64(space.low), np.float64(space.high)
    slack = 1e-6 * np.maximum(1.0, np.maximum(*(np.abs(np.where(np.isfinite(b), b, 0)) for b in (low, high))))
    return bool(((action >= low - slack) & (action <= high + slack)).all())


# Pass-through ----------


def passes_the_state_through(kit: Kit) -> None:
    """Callbacks change nothing but agent_state and random_key, and write to no argument.

    record_observation returns next_rl_state with the agent's new state; or its first argument, if it recorded
    nothing.
    """

    def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> Finish:
        states = [argument for argument in arguments if isinstance(argument, RLState)]
        before = [outside(state) for state in states]
        arrays = [argument.copy() for argument in arguments if isinstance(argument, np.ndarray)]
        inside = contents(states[0].agent_state) if name == "record_observation" else {}

        def finish(result: Any) -> None:
            where = f"{name} after {run.steps} steps"
            for state, was in zip(states, before, strict=True):
                changed = difference(was, outside(state))
                if changed is not None:
                    raise BrokenError(f"{where} wrote into its argument: {changed} (before and after)")
            for array, was_array in zip([a for a in arguments if isinstance(a, np.ndarray)], arrays, strict=True):
                if not same(array, was_array):
                    raise BrokenError(f"{where} wrote into its argument: an entry {both(was_array, array)}")
            if name == "reset":
                return None
            if name == "select_action":
                result = result[1]
            if name == "record_observation":
                return require_next_state(where, result, states, before, inside)
            changed = difference(before[0], outside(result))
            if changed is not None:
                raise BrokenError(
                    f"{where} changed more than agent_state and random_key: {changed} (given and returned)"
                )
            return None

        return finish

    kit.run(watch=watch).advance(kit.steps)


def outside(state: RLState) -> Contents:
    """All of a state but what is the agent's own to change."""
    return contents(state._replace(agent_state=None, random_key=None))  # type: ignore[arg-type]


def require_next_state(
    where: str, result: RLState, states: list[RLState], before: list[Contents], inside: Contents
) -> None:
    """BrokenError unless record_observation returned what it may: `states` are its rl_state and next_rl_state."""
    returned, (first, following) = outside(result), before
    changed = difference(following, returned)
    if changed is None:
        if result.random_key != states[1].random_key:
            raise BrokenError(f"{where} changed random_key, which the runner does not take from it")
        return
    if difference(first, returned) is not None:
        raise BrokenError(f"{where} returned neither next_rl_state nor rl_state: {changed} (due and returned)")
    recorded = difference(inside, contents(result.agent_state))
    if recorded is not None:
        raise BrokenError(
            f"{where} returned its first argument although it recorded: agent_state's {recorded} (before and after); "
            "an agent that records returns next_rl_state with its new agent_state"
        )


# Keys ----------


def leaves_global_generators_alone(kit: Kit) -> None:
    """The global generators of random, NumPy and torch are the same after each callback as before."""

    def compare(where: str, before: Contents) -> None:
        changed = difference(before, contents(global_generators()))
        if changed is not None:
            which = next(g for g in ("torch.cuda", "torch", "numpy.random", "random") if changed.startswith(g))
            raise BrokenError(
                f"{where} drew from the global generator of {which}; all randomness comes from random_key"
            )

    def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> Finish:
        before = contents(global_generators())
        return lambda result: compare(f"{name} after {run.steps} steps", before)

    before = contents(global_generators())
    run = kit.new(watch=watch)
    compare("init", before)
    run.begin().advance(kit.steps)


def gives_the_same_for_the_same_key(kit: Kit) -> None:
    """Two fresh agents given the same keys act alike bit for bit and learn the same, whatever the global seeds are."""
    kit.require_fresh_agents()
    with global_seed(1):
        first = kit.run()
        firsts = first.advance(kit.steps)
    with global_seed(2):
        second = kit.run()
        seconds = second.advance(kit.steps)
    for step, (one, other) in enumerate(zip(firsts, seconds, strict=True)):
        if not same(one, other):
            raise BrokenError(f"the same keys gave other actions after {step} steps: an entry {both(one, other)}")
    changed = difference(kit.learned(first, first.state.agent_state), kit.learned(second, second.state.agent_state))
    if changed is not None:
        raise BrokenError(f"the same keys led elsewhere in {kit.steps} steps: {changed}")


def uses_each_key_once(kit: Kit) -> None:
    """Where what a callback gives depends on the key that it was passed, it gives back another key."""
    kit.require_fresh_agents()
    _ = kit.learned_exports  # has a run of its own, and the feed serves one at a time
    for steps, name in itertools.product((0, kit.steps), ("select_action", "optimize_model", "reset")):
        kept, gave = _after_a_key(kit, steps, name, RandomKey(1))
        change = difference(gave, _after_a_key(kit, steps, name, RandomKey(2))[1]) if kept else None
        if change is not None:
            raise BrokenError(
                f"{name} after {steps} steps drew from random_key and gave that key back; under two keys {change}"
            )


def _after_a_key(kit: Kit, steps: int, name: str, key: RandomKey) -> tuple[bool, Contents]:
    """After so many steps, a callback that is handed `key`: whether it gives that back, and what it gives."""
    run = kit.run()
    run.advance(steps)
    if name == "optimize_model":
        run.record(run.select())
    run.state = run.state._replace(random_key=key)
    if name == "select_action":
        gave = contents({"actions": run.select()})
    elif name == "optimize_model":
        run.optimize()
        gave = kit.learned(run, run.state.agent_state)
    else:
        run.reset()
        gave = contents(run.state.agent_state)
    return run.state.random_key == key, gave


# Rows ----------


def rows_do_not_mix(kit: Kit) -> None:
    """Other observations in all other environments do not change an environment's action (same state, same key)."""
    kit.require_fresh_agents()
    n, space = kit.feed.num_environments, kit.feed.observation_space
    if n < 2:
        raise NotApplicableError(f"the feed has {n} environment")
    for steps in (0, kit.steps):
        actions = [_actions_with(kit, steps, lambda observation: observation)]
        for kept in range(min(n, 3)):
            other, rows = draw(space, n, RandomKey(steps).split(3)[kept]), np.arange(n) != kept
            change = functools.partial(replaced, other=other, rows=rows)
            actions.append(_actions_with(kit, steps, change))
            if not close(actions[0][kept], actions[-1][kept]):
                raise BrokenError(
                    f"after {steps} steps other observations in the other environments change environment {kept}'s "
                    f"action from {actions[0][kept]} to {actions[-1][kept]}"
                )


def _actions_with(kit: Kit, steps: int, change: Callable[[Any], Any]) -> Array:
    """The actions after so many steps if the newest observations are changed."""
    run = kit.run()
    run.advance(steps)
    seen = run.state.environment_state
    run.state = run.state._replace(environment_state=seen._replace(observation=change(seen.observation)))
    return run.select()


def batched_actions_equal_single_ones(kit: Kit) -> None:
    """The policy's deterministic actions for a batch are those for its rows, one by one, up to `TOLERANCE`."""
    run = kit.run()
    run.advance(kit.steps)
    policy: Any = getattr(run.state.agent_state, "policy", None)
    if not callable(getattr(policy, "sample_actions", None)):
        raise NotApplicableError("the agent_state has no policy with sample_actions")
    parameter = next(policy.parameters(), None) if isinstance(policy, torch.nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    n, shape = 8, kit.feed.action_space.shape or ()
    observations = draw(kit.feed.observation_space, n, RandomKey(kit.seed))

    def act(rows: Array) -> Array:
        given = as_tensors(row_of(observations, rows), device)
        with torch.no_grad():
            actions, _ = policy_actions(policy, given, (len(rows), *shape), RandomKey(0), deterministic=True)
        return as_array(actions)

    try:
        batched = act(np.arange(n))
    except (RuntimeError, ValueError, TypeError) as error:
        raise NotApplicableError(f"policy.sample_actions does not take the feed's observations: {error}") from None
    if batched.shape != (n, *shape):
        raise BrokenError(f"policy gave actions of shape {list(batched.shape)} for {n} rows; {[n, *shape]} is due")
    for row in range(n):
        single = act(np.array([row]))
        if single.shape != (1, *shape) or not close(single[0], batched[row]):
            raise BrokenError(
                f"policy's deterministic action is {batched[row]} in row {row} of a batch, {single} alone"
            )
