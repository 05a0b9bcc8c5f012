"""Running by episodes: what the caller asked for, and which environments still take part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from angle_rl.spaces import where_rows
from angle_rl.types import Array, EnvironmentState, RLState


@dataclass(kw_only=True)
class Episodes:
    """One run by episodes. `AgentTrainer.train` says what the options mean. One thread."""

    num_episodes: int
    max_iterations: int | None
    accumulated_episodes: int
    state_to_trajectory: Callable[[RLState], Any] | None
    episode_completed: Callable[[RLState, int, int], object] | None
    checkpoint_filter: Callable[[RLState, int], bool] | None
    checkpoint_path: Path | None
    model_name: str
    begun: int = 0  # episodes begun
    active: Array = field(default_factory=lambda: np.zeros(0, np.bool_))  # [n] environments that have not ended

    def check(self, *, can_save: bool) -> None:
        """ValueError or TypeError where the options make no sense."""
        for name, least in (("num_episodes", 1), ("max_iterations", 1), ("accumulated_episodes", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}; it must be an int of at least {least}")
        for name in ("state_to_trajectory", "episode_completed", "checkpoint_filter"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} is a {type(value).__name__}; it must be a function")
        if self.checkpoint_path is not None and self.checkpoint_filter is None:
            raise ValueError(f"checkpoint_path is {self.checkpoint_path} without checkpoint_filter, which says when")
        if self.checkpoint_filter is not None and not can_save:
            raise TypeError("checkpoint_filter is given, but the agent has no export_state; it cannot be saved")

    def begin(self, state: RLState) -> RLState:
        """The state with which an episode starts."""
        self.begun += 1
        self.active = np.ones(len(state.environment_state.reward), np.bool_)
        trajectory = None if self.state_to_trajectory is None else [self.state_to_trajectory(state)]
        return state._replace(trajectory=trajectory)

    def note(self, state: RLState) -> None:
        """One more row of the trajectory."""
        if self.state_to_trajectory is not None:
            state.trajectory.append(self.state_to_trajectory(state))

    def asked_of(self, state: RLState) -> EnvironmentState:
        """What to hand to the feed: environments that have ended are at rest."""
        seen = state.environment_state
        return seen._replace(stepped=seen.stepped & self.active)

    def only_active(self, before: RLState, seen: EnvironmentState) -> EnvironmentState:
        """What was seen, of environments that have not ended; the others stand still and have not stepped.

        At the last iteration those that go on are cut: their transitions are truncated.
        """
        active, frozen = self.active, before.environment_state
        stepped = seen.stepped & active
        truncated = seen.truncated.copy()
        if self.max_iterations is not None and before.iteration + 1 >= self.max_iterations:
            truncated |= stepped & ~seen.terminated
        self.active = active & ~((seen.terminated | truncated) & stepped)
        if active.all():
            return seen._replace(truncated=truncated)
        return EnvironmentState(
            observation=where_rows(active, seen.observation, frozen.observation),
            reward=np.where(active, seen.reward, 0.0),
            terminated=np.where(active, seen.terminated, frozen.terminated),
            truncated=np.where(active, truncated, frozen.truncated),
            final_observation=where_rows(active, seen.final_observation, frozen.final_observation),
            stepped=stepped,
        )

    def is_over(self, state: RLState) -> bool:
        """Whether the episode has ended, or none has begun."""
        cut = self.max_iterations is not None and state.iteration >= self.max_iterations
        return cut or not self.active.any()
