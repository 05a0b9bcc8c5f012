"""What a replay must be able to do to be measured, and ours.

A library's adapter prepares its arguments outside the timed calls: the rows to insert stand ready in whatever
form the library takes, and sampling returns what the library returns by default.
"""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt
import torch

from angle_rl.bench.rows import HALFCHEETAH, Rows, Sampled, Shape
from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer


class Library(Protocol):
    """One replay buffer under test, empty when it is made with ``(capacity, shape)``."""

    name: str  # the library's name in the table
    prioritized: bool  # whether it draws by priority and takes new ones
    gives: str  # what sampling returns: "torch", "numpy" or "jax"
    exponent: float  # priority exponent: a row's weight is its td error to this power
    shape: Shape  # what its rows hold

    def ready_row(self, rows: Rows, index: int) -> Any:
        """One row in the form that ``insert`` takes."""

    def ready_rows(self, rows: Rows) -> Any:
        """Rows in the form that ``insert_many`` takes."""

    def insert(self, row: Any) -> object:
        """Stores one row."""

    def insert_many(self, rows: Any) -> object:
        """Stores rows in time order."""

    def sample(self, batch: int) -> Any:
        """A batch as the library gives it."""

    def handles(self, batch: Any) -> Any:
        """What ``update`` takes for the rows of a sampled batch."""

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        """What ``update`` takes for the rows that were inserted ``numbers``-th and still live."""

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        """td errors [batch] in the form that ``update`` takes."""

    def update(self, handles: Any, td_errors: Any) -> object:
        """Gives rows new priorities."""

    def arrays(self, batch: Any) -> Sampled:
        """A sampled batch as NumPy arrays."""


class Kind(Protocol):
    """Makes an empty library."""

    def __call__(self, capacity: int, shape: Shape = HALFCHEETAH) -> Library: ...


def spaces(shape: Shape = HALFCHEETAH) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """Observation and action spaces of such rows, in float32."""
    return (
        gymnasium.spaces.Box(-np.inf, np.inf, (shape.observation,), np.float32),
        gymnasium.spaces.Box(-1.0, 1.0, (shape.action,), np.float32),
    )


class Angle:
    """Our prioritised replay."""

    name = "angle"
    prioritized = True
    gives = "torch"
    exponent = 0.6

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH, **arguments: Any) -> None:
        observation_space, action_space = spaces(shape)
        self.shape = shape
        self.buffer: Any = PrioritizedReplayBuffer(
            capacity, observation_space=observation_space, action_space=action_space, seed=0, **arguments
        )
        self.out: Any = None
        self.stream: tuple[Any, ...] = ()

    @classmethod
    def around(cls, buffer: PrioritizedReplayBuffer, shape: Shape = HALFCHEETAH, stream: int = 0) -> Angle:
        """The adapter of a buffer that is there already; its rows go into ``stream``."""
        self = cls.__new__(cls)
        self.shape, self.buffer, self.out = shape, buffer, None
        self.stream = (None, stream) if stream else ()
        return self

    def ready_row(self, rows: Rows, index: int) -> Any:
        return (
            rows.observations[index],
            rows.actions[index],
            float(rows.rewards[index]),
            rows.next_observations[index],
            bool(rows.terminated[index]),
            *self.stream,
        )

    def ready_rows(self, rows: Rows) -> Any:
        return tuple(rows)

    def insert(self, row: Any) -> object:
        return self.buffer.insert(*row)

    def insert_many(self, rows: Any) -> object:
        return self.buffer.insert(*rows)

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def sample_out(self, batch: int) -> Any:
        """A sample into the tensors of the one before."""
        if self.out is None or len(self.out.rewards) != batch:
            self.out = self.buffer.sample(batch)
        return self.buffer.sample(batch, out=self.out)

    def handles(self, batch: Any) -> Any:
        return batch.handles

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        return numbers

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return torch.from_numpy(td_errors)

    def update(self, handles: Any, td_errors: Any) -> object:
        return self.buffer.update_priorities(handles, td_errors)

    def arrays(self, batch: Any) -> Sampled:
        return Sampled(
            indices=batch.handles.numpy(),
            observations=batch.observations.numpy(),
            actions=batch.actions.numpy(),
            rewards=batch.rewards.numpy(),
            next_observations=batch.next_observations.numpy(),
            terminated=batch.discounts.numpy() == 0.0,
            weights=batch.importance_weights.numpy(),
        )


class AngleUniform(Angle):
    """Our uniform replay."""

    prioritized = False

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH) -> None:
        observation_space, action_space = spaces(shape)
        self.shape = shape
        self.buffer = ReplayBuffer(capacity, observation_space=observation_space, action_space=action_space, seed=0)
        self.out = None
        self.stream = ()
