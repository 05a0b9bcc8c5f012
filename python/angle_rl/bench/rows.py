"""Rows whose every number follows from the row's own number, so that any mix-up shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

OBSERVATION = 17  # HalfCheetah's float32 numbers an observation
ACTION = 6  # HalfCheetah's float32 numbers an action
CHUNK = 1 << 15  # rows made at a time

Floats = npt.NDArray[np.float32]


class Shape(NamedTuple):
    """What a row holds, all of it float32 but the end flag."""

    name: str  # as tables show it
    observation: int  # numbers an observation, >= 2
    action: int  # numbers an action, >= 1

    @property
    def payload(self) -> int:
        """Bytes of a row's numbers: both observations, action and reward."""
        return 4 * (2 * self.observation + self.action + 1)


HALFCHEETAH = Shape("halfcheetah", OBSERVATION, ACTION)
SMALL = Shape("32 bytes", 3, 1)


class Rows(NamedTuple):
    """``n`` transitions in time order."""

    observations: Floats  # [n, observation]
    actions: Floats  # [n, action] in [-1, 1]
    rewards: Floats  # [n]
    next_observations: Floats  # [n, observation]
    terminated: npt.NDArray[np.bool_]  # [n]


class Sampled(NamedTuple):
    """What a library returned, as NumPy arrays, to check."""

    indices: npt.NDArray[np.int64] | None  # [batch] handle or slot; None where the library gives none
    observations: Floats  # [batch, observation]
    actions: Floats  # [batch, action]
    rewards: Floats  # [batch]
    next_observations: Floats  # [batch, observation]
    terminated: npt.NDArray[np.bool_]  # [batch]
    weights: Floats | None  # [batch] importance weights; None where the library gives none


def make_rows(numbers: npt.NDArray[np.int64], shape: Shape = HALFCHEETAH) -> Rows:
    """The rows with these numbers, each in [0, 2**36)."""
    column = np.arange(3, 3 + shape.observation, dtype=np.int64)
    observations = ((numbers[:, None] * column) % 251).astype(np.float32) / np.float32(256)
    observations[:, 0] = numbers % 4096
    observations[:, 1] = numbers // 4096
    actions = ((numbers[:, None] * column[: shape.action]) % 127).astype(np.float32) / np.float32(64) - np.float32(1)
    return Rows(
        observations=observations,
        actions=np.ascontiguousarray(actions),
        rewards=(numbers % 1021).astype(np.float32),
        next_observations=observations + np.float32(0.5),
        terminated=numbers % 1000 == 999,
    )


def chunks(count: int, shape: Shape = HALFCHEETAH) -> Iterator[Rows]:
    """Rows 0 to ``count`` in order, a chunk at a time."""
    for first in range(0, count, CHUNK):
        yield make_rows(np.arange(first, min(first + CHUNK, count), dtype=np.int64), shape)


def numbers_of(observations: Floats) -> npt.NDArray[np.int64]:
    """The numbers of the rows that these observations belong to."""
    return observations[:, 0].astype(np.int64) + 4096 * observations[:, 1].astype(np.int64)


def check_rows(sampled: Sampled, library: str) -> npt.NDArray[np.int64]:
    """The numbers of the sampled rows; RuntimeError when a row's fields do not belong together."""
    numbers = numbers_of(sampled.observations)
    truth = make_rows(numbers, Shape("", sampled.observations.shape[1], sampled.actions.shape[1]))
    for name in Rows._fields:
        if not np.array_equal(getattr(sampled, name), getattr(truth, name)):
            raise RuntimeError(f"{library}: sampled {name} do not belong to the sampled observations")
    return numbers


def check_indices(sampled: Sampled, inserted: int, capacity: int, library: str) -> None:
    """RuntimeError unless row k was stored at index k modulo ``capacity`` and is the newest one there."""
    numbers = check_rows(sampled, library)
    if sampled.indices is None:
        return
    slots = np.asarray(sampled.indices, dtype=np.int64) % capacity
    newest = slots + (inserted - 1 - slots) // capacity * capacity
    if not np.array_equal(numbers, newest):
        raise RuntimeError(f"{library}: a sampled row is not the newest one at its index")
