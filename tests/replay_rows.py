"""Rows for replay tests: every array of a row follows from one value, so a mixed-up row shows."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._pytree import tree_map

from angle_rl.replay import PrioritizedReplayBuffer, ReplayBuffer
from angle_rl.types import Batch

SCHEMA = {"observations": ((3,), np.float32), "actions": ((2,), np.float32)}


def rows(values, terminated=None):
    """Arguments of insert for one row per value; every array of a row follows from the value."""
    v = np.asarray(values, np.float32)
    observations = np.stack([v, v + 0.25, v + 0.5], axis=-1)
    actions = np.stack([-v, v * 2], axis=-1)
    ended = np.zeros(v.shape, bool) if terminated is None else np.asarray(terminated)
    return observations, actions, v, observations + 1, ended


def values_of(batch: Batch) -> np.ndarray:
    """The values behind a batch, after checking that every array agrees on them."""
    v = batch.rewards
    torch.testing.assert_close(batch.observations, torch.stack([v, v + 0.25, v + 0.5], 1), rtol=0, atol=0)
    torch.testing.assert_close(batch.next_observations, batch.observations + 1, rtol=0, atol=0)
    torch.testing.assert_close(batch.actions, torch.stack([-v, v * 2], 1), rtol=0, atol=0)
    return v.numpy()


def each_row(buffer: ReplayBuffer, n: int | None = None, **asked) -> Batch:
    """Every one of the buffer's n drawable rows once (default: as many as it holds), in no particular order."""
    n = len(buffer) if n is None else n
    if not buffer.resident:
        return buffer.sample(n, replacement=False, **asked)
    batch = buffer.sample(max(4 * n, 200), **asked)
    first = torch.from_numpy(np.unique(batch.handles.cpu().numpy(), return_index=True)[1])
    assert len(first) == n
    return tree_map(lambda tensor: tensor.cpu()[first], batch)


def filled(n=100, capacity=128, **options) -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(capacity, SCHEMA, **options)
    buffer.insert(*rows(np.arange(n)))
    return buffer
