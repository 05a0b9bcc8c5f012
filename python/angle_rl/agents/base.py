"""What an agent is: five callbacks over one state object."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol, TypeVar, runtime_checkable

from angle_rl.types import Array, RandomKey, RLState


@runtime_checkable
class Agent(Protocol):
    """Five callbacks. The runner calls them in this order and hands each what the one before returned.

    All arrays have a leading axis over the ``n`` environments. An agent may change `rl_state.agent_state` in
    place; whoever wants an old one copies it first. One thread at a time.
    """

    def init(self, random_key: RandomKey, **options: Any) -> tuple[Any, RandomKey]:
        """The agent's first state. Called once, with the runner's options (spaces, networks, replay)."""
        ...

    def reset(self, random_key: RandomKey, rl_state: RLState) -> tuple[Any, RandomKey]:
        """The agent's state at the start of an episode: once before the first step, then after each end.

        `rl_state.episode` is still the number of the episode that ended; the first call sees what the feed
        began with.
        """
        ...

    def select_action(self, rl_state: RLState, iteration: int) -> tuple[Array, RLState]:
        """The next actions ``[n, *action_shape]``, answering `rl_state.environment_state.observation`.

        An array; where the observations are tensors it may be a tensor on their device.
        """
        ...

    def record_observation(
        self, rl_state: RLState, action: Array, reward: Array, terminated: Array, next_rl_state: RLState
    ) -> RLState:
        """Take in what the actions led to; returns `next_rl_state` with the agent's new state."""
        ...

    def optimize_model(self, rl_state: RLState) -> RLState:
        """Learn, if it is time to. Called after every step; the agent decides."""
        ...


Method = TypeVar("Method", bound=Callable[..., Any])
_MARK = "known_as"


def known_as(name: str) -> Callable[[Method], Method]:
    """Marks a method as the equation that engines know as `name`. A method that replaces it has no such mark."""

    def mark(method: Method) -> Method:
        setattr(method, _MARK, name)
        return method

    return mark


def name_of(method: Callable[..., Any]) -> str:
    """What `known_as` says of a method; "other" where it says nothing."""
    name: str = getattr(method, _MARK, "other")
    return name


def in_updates(interval: int | None, updates_per_step: Fraction) -> Fraction | None:
    """An interval of environment steps counted in updates: exact, also where an update takes several steps."""
    return None if interval is None else interval * updates_per_step


def crossings(interval: int | Fraction | None, before: int, after: int) -> int:
    """How often an interval fires on the way from `before` to `after`: the multiples in ``(before, after]``.

    None never fires. Exact for fractions.
    """
    return 0 if interval is None else int(after // interval - before // interval)
