"""Promises about learning: what is recorded, when it is learned from, what a reset leaves, what a checkpoint holds.

Each check is a function of a `Kit`, as in `angle_rl.testing.acting`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from angle_rl.testing.contents import Contents, both, contents, difference, find_replay, same
from angle_rl.testing.kit import Kit, NotApplicableError, replaced
from angle_rl.testing.probe import BrokenError, Finish, Run, draw, shortly
from angle_rl.types import Array, EnvironmentState, RandomKey, RLState

NO_PARAMETERS = "the agent has no parameters: no module, no tensor with gradients, no exported float array"


# Reset ----------


def reset_keeps_what_was_learned(kit: Kit) -> None:
    """reset leaves every parameter, the optimisers and the replay as they are."""

    def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> Finish | None:
        if name != "reset":
            return None
        before = kit.learned(run, arguments[1].agent_state)

        def finish(result: Any) -> None:
            changed = difference(before, kit.learned(run, result[0]))
            if changed is not None:
                raise BrokenError(f"reset after {run.steps} steps changed {changed} (before and after)")

        return finish

    _ = kit.learned_exports  # has a run of its own, and the feed serves one at a time
    run = kit.run(watch=watch)
    run.advance(kit.steps)
    run.begin()


# Saving ----------


def saves_and_restores(kit: Kit) -> None:
    """A fresh agent of another seed that imports what one exported goes on exactly as that one does.

    It is saved where episodes begin, and both begin new ones, as the trainer does after a load: what belongs to an
    episode under way need not come back.
    """
    first = kit.run()
    if not all(callable(getattr(first.agent, name, None)) for name in ("export_state", "import_state")):
        raise NotApplicableError(f"{type(first.agent).__name__} has no export_state and import_state")
    kit.require_fresh_agents()
    first.advance(kit.steps)
    first.begin()
    tensors, values = first.agent.export_state(first.state.agent_state)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise BrokenError(f"export_state gave {name} as {shortly(tensor)}; its first result holds tensors")
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        values = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise BrokenError(f"export_state's second result cannot be written as JSON: {error}") from None
    second = kit.new(agent_seed=kit.seed + 1)
    second.agent.import_state(second.state.agent_state, tensors, values)
    kept = {name: getattr(first.state, name) for name in ("random_key", "iteration", "episode")}
    second.state, second.feed_key = second.state._replace(**kept), first.feed_key
    lost = difference(kit.learned(first, first.state.agent_state), kit.learned(second, second.state.agent_state))
    if lost is not None:
        raise BrokenError(f"after import_state, {lost} (saved and restored)")
    more = max(8, kit.steps // 4)
    firsts, seconds = first.begin().advance(more), second.begin().advance(more)
    for step, (one, other) in enumerate(zip(firsts, seconds, strict=True)):
        if not same(one, other):
            raise BrokenError(f"{step} steps after import_state the restored agent acts otherwise: {both(one, other)}")
    changed = difference(kit.learned(first, first.state.agent_state), kit.learned(second, second.state.agent_state))
    if changed is not None:
        raise BrokenError(f"{more} steps after import_state, {changed} (saved agent and restored agent)")


# What is recorded ----------


def ignores_rows_that_did_not_step(kit: Kit) -> None:
    """Another action and final_observation in rows with stepped False change nothing that the agent does or learns."""
    kit.require_fresh_agents()
    feed, altered = kit.feed, 0

    def tamper(actions: Array, seen: EnvironmentState) -> tuple[Array, EnvironmentState]:
        nonlocal altered
        rows, key = ~seen.stepped, RandomKey(altered)
        altered += int(rows.sum())
        other = draw(feed.observation_space, len(rows), key.split(2)[0])
        actions = replaced(actions, draw(feed.action_space, len(rows), key).astype(actions.dtype), rows)
        return actions, seen._replace(final_observation=replaced(seen.final_observation, other, rows))

    first = kit.run()
    firsts = first.advance(kit.steps)  # to the end before the second begins: they share the feed
    second = kit.run(tamper=tamper)
    seconds = second.advance(kit.steps)
    if not altered:
        raise NotApplicableError(f"every environment of the feed stepped in each of {kit.steps} steps")
    changed = difference(kit.learned(first, first.state.agent_state), kit.learned(second, second.state.agent_state))
    if changed is not None:
        raise BrokenError(f"rows with stepped False reach what is recorded or learned: altering them, {changed}")
    for step, (one, other) in enumerate(zip(firsts, seconds, strict=True)):
        if not same(one, other):
            raise BrokenError(f"rows with stepped False decide actions: altering them, step {step} {both(one, other)}")


def records_what_happened(kit: Kit) -> None:
    """The replay holds a row for each environment that stepped, with the final_observation and the true flags."""
    expected: dict[str, list[Any]] = {}

    def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> None:
        if name == "record_observation":
            state, actions, reward, terminated, following = arguments
            before, after = state.environment_state, following.environment_state
            rows = np.flatnonzero(after.stepped)
            given = {"observations": before.observation, "next_observations": after.final_observation}
            given |= {"actions": actions, "rewards": reward, "terminated": terminated, "truncated": after.truncated}
            for path, leaf in contents(given).items():
                expected.setdefault(path, []).extend(leaf.value[rows])
            expected.setdefault("environment", []).extend(rows)

    run = kit.run(watch=watch)
    run.advance(kit.steps)
    replay = find_replay(run.state.agent_state)
    if replay is None:
        raise NotApplicableError("the agent_state has no replay with export_arrays")
    found, environments = replay.export_arrays(), expected.pop("environment")
    held, happened = len(found["terminated"]), len(environments)
    if held > happened or (held < happened <= replay.capacity // 2):  # near its capacity a replay may leave slots free
        raise BrokenError(
            f"the replay holds {held} rows after {happened} transitions; its capacity is {replay.capacity}"
        )
    given, kept = same_rows(np.array(environments), found["streams"])
    for path, values in expected.items():
        if path in found and path.split(".")[0] not in kit.transformed:
            require_rows(path, np.array(values)[given], found[path][kept], np.array(environments)[given])


def same_rows(environments: Array, streams: Array) -> tuple[Array, Array]:
    """Which transitions given should be which rows of a replay: two index arrays of equal length.

    The newest ones, in the order of time: within each environment, if those are the replay's streams.
    """
    if not set(streams.tolist()) <= set(environments.tolist()) or (len({*environments}) > 1 and len({*streams}) < 2):
        return np.arange(len(environments))[len(environments) - len(streams) :], np.arange(len(streams))
    given, kept = [], []
    for stream in np.unique(streams):
        of_replay = np.flatnonzero(streams == stream)
        of_run = np.flatnonzero(environments == stream)
        rows = min(len(of_replay), len(of_run))
        given.append(of_run[len(of_run) - rows :])
        kept.append(of_replay[len(of_replay) - rows :])
    return np.concatenate(given), np.concatenate(kept)


def require_rows(path: str, given: Array, found: Array, environments: Array) -> None:
    """BrokenError where a replay's field is not what was given; of stacked observations the newest frame counts."""
    flat_given, flat_found = given.reshape(len(given), -1), found.reshape(len(found), -1)
    width = flat_given.shape[1]
    if flat_found.shape[1] % width:
        raise BrokenError(f"the replay's {path} have the shape {list(found.shape)}; given were {list(given.shape)}")
    newest = flat_found[:, -width:]
    wrong = np.flatnonzero((flat_given.astype(found.dtype) != newest).any(1))
    if len(wrong):
        row = int(wrong[0])
        due = "final_observation was" if path.startswith("next_observations") else "given was"
        where = f"row {row} (environment {environments[row]})"
        raise BrokenError(f"the replay's {path} in {where} is {newest[row]}; {due} {given[row]}")


# Learning ----------


def waits_for_learning_starts(kit: Kit) -> None:
    """Before learning_starts transitions, optimize_model changes no parameter."""
    if not kit.learning_starts:
        unknown = kit.learning_starts is None
        raise NotApplicableError("learning_starts is not known; pass learning_starts=" if unknown else "it is 0")
    starts = kit.learning_starts

    def early(path: str, run: Run, change: str) -> None:
        if run.recorded < starts:
            raise BrokenError(
                f"optimize_model changed {change} (before and after) with {run.recorded} transitions; "
                f"learning_starts is {starts}"
            )

    _watch_parameters(kit, early)


def learns(kit: Kit) -> None:
    """After learning_starts, optimize_model changes a parameter."""
    changes: list[str] = []
    run, parameters = _watch_parameters(kit, lambda path, run, change: changes.append(path))
    if changes:
        return
    if not parameters:
        raise NotApplicableError(NO_PARAMETERS)
    if kit.learning_starts is None:
        raise NotApplicableError(
            f"no parameter changed with {run.recorded} transitions, and learning_starts is not known; "
            "pass learning_starts= and steps="
        )
    if run.recorded <= kit.learning_starts:
        raise NotApplicableError(f"{run.recorded} transitions are not more than learning_starts; pass more steps=")
    raise BrokenError(
        f"optimize_model changed no parameter with {run.recorded} transitions; learning_starts is {kit.learning_starts}"
    )


def _watch_parameters(kit: Kit, changed: Callable[[str, Run, str], None]) -> tuple[Run, Contents]:
    """A run that calls `changed` at each optimize_model that changes a parameter; the run and its parameters."""

    def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> Finish | None:
        if name != "optimize_model":
            return None
        before = kit.parameters(run, arguments[0].agent_state)

        def finish(result: RLState) -> None:
            change = difference(before, kit.parameters(run, result.agent_state))
            if change is not None:
                changed(change.split(" ")[0], run, change)

        return finish

    run = kit.run(watch=watch)
    run.advance(kit.steps)
    return run, kit.parameters(run, run.state.agent_state)


# Numbers ----------


def stays_finite(kit: Kit) -> None:
    """No parameter that was finite at the start is NaN or infinite after the steps."""
    run = kit.run()
    start = kit.parameters(run, run.state.agent_state)
    run.advance(kit.steps)
    end = kit.parameters(run, run.state.agent_state)
    if not end:
        raise NotApplicableError(NO_PARAMETERS)
    for path, leaf in end.items():
        value = np.asarray(leaf.value)
        was = np.asarray(start[path].value) if path in start else np.zeros(())
        if value.dtype.kind != "f" or was.shape != value.shape:
            continue
        bad = np.argwhere(np.isfinite(was) & ~np.isfinite(value))
        if len(bad):
            index = tuple(int(i) for i in bad[0])
            raise BrokenError(f"{path} at {list(index)} is {value[index]} after {run.steps} steps; it was {was[index]}")
