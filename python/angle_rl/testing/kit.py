"""What every check is given and raises."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from angle_rl.feed import DataFeed
from angle_rl.testing.contents import Contents, Leaf, as_array, contents, of_kind, same
from angle_rl.testing.probe import Finish, Run
from angle_rl.types import Array, RLState

TOLERANCE = 1e-5
"""How far float actions of one batch and of its rows may lie apart, relative and absolute: kernels differ by size."""


class ConformanceError(AssertionError):
    """An agent breaks a promise of the contract: `check` names it, the text says where and with which values."""

    def __init__(self, check: str, text: str) -> None:
        super().__init__(f"{check}: {text}")
        self.check = check


class NotApplicableError(Exception):
    """A check says nothing about this agent; the text is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kit:
    """What the checks are given."""

    make: Callable[[], Any]  # a fresh agent at each call, or always the same one
    same_agent: str | None  # why `make` can give but one agent; None: each is fresh
    feed: DataFeed
    options: Mapping[str, Any]  # for init
    steps: int  # of a run
    learning_starts: int | None  # transitions before the first update; None: not known
    transformed: tuple[str, ...]  # replay fields that the agent keeps otherwise than it was given them
    seed: int

    def run(self, **options: Any) -> Run:
        """A fresh agent that has begun its first episodes."""
        return self.new(**options).begin()

    def new(self, **options: Any) -> Run:
        """A fresh agent after init only."""
        return Run(self.make(), self.feed, self.options, **{"seed": self.seed} | options)

    def require_fresh_agents(self) -> None:
        """For checks that compare two runs."""
        if self.same_agent is not None:
            raise NotApplicableError(self.same_agent)

    @functools.cached_property
    def learned_exports(self) -> frozenset[str]:
        """Names of the float arrays of export_state that optimize_model changes in a run."""
        names: set[str] = set()

        def watch(name: str, run: Run, arguments: tuple[Any, ...]) -> Finish | None:
            if name != "optimize_model":
                return None
            before = exported_floats(run.agent, arguments[0].agent_state)

            def finish(result: RLState) -> None:
                after = exported_floats(run.agent, result.agent_state)
                names.update(path for path in after if path not in before or not same(before[path], after[path]))

            return finish

        self.run(watch=watch).advance(self.steps)
        return frozenset(names)

    def learned(self, run: Run, agent_state: Any) -> Contents:
        """Replay, parameters, optimisers, and what optimize_model changes among the exported arrays."""
        exports = exported_floats(run.agent, agent_state)
        everything = contents(agent_state)
        found = of_kind(everything, "replay") | of_kind(everything, "parameter", "optimizer")
        return found | {
            f"export_state {name}": Leaf("other", exports[name]) for name in self.learned_exports & {*exports}
        }

    def parameters(self, run: Run, agent_state: Any) -> Contents:
        """The modules' tensors and those that take gradients; of an agent without any, its exported float arrays."""
        found = of_kind(contents(agent_state), "parameter")
        if found:
            return found
        return {name: Leaf("other", array) for name, array in exported_floats(run.agent, agent_state).items()}


def exported_floats(agent: Any, agent_state: Any) -> dict[str, Array]:
    """The float arrays of export_state that have at least one axis and are no part of a replay or an optimiser."""
    if not callable(getattr(agent, "export_state", None)):
        return {}
    tensors, _ = agent.export_state(agent_state)
    return {
        name: as_array(tensor)
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dim() > 0 and not name.startswith(("replay.", "optimizers."))
    }


def close(first: Any, second: Any) -> bool:
    """Whether actions agree: whole numbers exactly, floats up to `TOLERANCE`."""
    if np.asarray(first).dtype.kind != "f":
        return bool(np.array_equal(first, second))
    return bool(np.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))


def replaced(value: Any, other: Any, rows: Array) -> Any:
    """A copy of a batch, nested as its space, in which the `rows` (bool [n]) are `other`'s."""
    if isinstance(value, dict):
        return {name: replaced(part, other[name], rows) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(replaced(part, other[i], rows) for i, part in enumerate(value))
    changed = value.copy()
    changed[rows] = other[rows]
    return changed
