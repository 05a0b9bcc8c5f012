"""Other libraries' replays, at their own defaults. Each is imported when it is asked for."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from angle_rl.bench.libraries import Kind, spaces
from angle_rl.bench.rows import HALFCHEETAH, Rows, Sampled, Shape


class Cpprb:
    """cpprb's prioritised replay."""

    name = "cpprb"
    prioritized = True
    gives = "numpy"
    exponent = 0.6

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH) -> None:
        import cpprb

        self.capacity, self.shape = capacity, shape
        kind = cpprb.PrioritizedReplayBuffer if self.prioritized else cpprb.ReplayBuffer
        fields = {"obs": {"shape": shape.observation}, "act": {"shape": shape.action}, "rew": {}, "done": {}}
        self.buffer = kind(capacity, {**fields, "next_obs": {"shape": shape.observation}})

    def ready_row(self, rows: Rows, index: int) -> Any:
        return {
            "obs": rows.observations[index],
            "act": rows.actions[index],
            "rew": float(rows.rewards[index]),
            "next_obs": rows.next_observations[index],
            "done": float(rows.terminated[index]),
        }

    def ready_rows(self, rows: Rows) -> Any:
        return {
            "obs": rows.observations,
            "act": rows.actions,
            "rew": rows.rewards,
            "next_obs": rows.next_observations,
            "done": rows.terminated.astype(np.float32),
        }

    def insert(self, row: Any) -> object:
        return self.buffer.add(**row)

    def insert_many(self, rows: Any) -> object:
        return self.buffer.add(**rows)

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def handles(self, batch: Any) -> Any:
        return batch["indexes"]

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        return numbers % self.capacity

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return td_errors

    def update(self, handles: Any, td_errors: Any) -> object:
        return self.buffer.update_priorities(handles, td_errors)

    def arrays(self, batch: Any) -> Sampled:
        indices = batch.get("indexes")
        return Sampled(
            indices=None if indices is None else indices.astype(np.int64),
            observations=batch["obs"],
            actions=batch["act"],
            rewards=batch["rew"][:, 0],
            next_observations=batch["next_obs"],
            terminated=batch["done"][:, 0] != 0,
            weights=batch.get("weights"),
        )


class CpprbUniform(Cpprb):
    """cpprb's uniform replay."""

    prioritized = False


class Tianshou:
    """Tianshou's prioritised replay; the Batch objects to insert stand ready."""

    name = "tianshou"
    prioritized = True
    gives = "numpy"
    exponent = 0.6

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH) -> None:
        from tianshou import data

        self.data, self.capacity, self.shape = data, capacity, shape
        if self.prioritized:
            self.buffer = data.PrioritizedReplayBuffer(capacity, alpha=self.exponent, beta=0.4)
        else:
            self.buffer = data.ReplayBuffer(capacity)

    def ready_row(self, rows: Rows, index: int) -> Any:
        return self.data.Batch(
            obs=rows.observations[index],
            act=rows.actions[index],
            rew=float(rows.rewards[index]),
            obs_next=rows.next_observations[index],
            terminated=bool(rows.terminated[index]),
            truncated=False,
        )

    def ready_rows(self, rows: Rows) -> Any:
        return self.data.ReplayBuffer.from_data(
            obs=rows.observations,
            act=rows.actions,
            rew=rows.rewards,
            obs_next=rows.next_observations,
            terminated=rows.terminated,
            truncated=np.zeros_like(rows.terminated),
            done=rows.terminated,
        )

    def insert(self, row: Any) -> object:
        return self.buffer.add(row)

    def insert_many(self, rows: Any) -> object:
        return self.buffer.update(rows)

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def handles(self, batch: Any) -> Any:
        return batch[1]

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        return numbers % self.capacity

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return td_errors

    def update(self, handles: Any, td_errors: Any) -> object:
        return self.buffer.update_weight(handles, td_errors)

    def arrays(self, batch: Any) -> Sampled:
        values, indices = batch
        return Sampled(
            indices=np.asarray(indices, dtype=np.int64),
            observations=values.obs,
            actions=values.act,
            rewards=values.rew.astype(np.float32),
            next_observations=values.obs_next,
            terminated=values.terminated,
            weights=values.weight if self.prioritized else None,
        )


class TianshouUniform(Tianshou):
    """Tianshou's uniform replay."""

    prioritized = False


class StableBaselines3:
    """Stable-Baselines3's replay, which is uniform."""

    name = "stable-baselines3"
    prioritized = False
    gives = "torch"
    exponent = 0.0

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH) -> None:
        from stable_baselines3.common.buffers import ReplayBuffer

        self.shape = shape
        observation_space, action_space = spaces(shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.buffer = ReplayBuffer(capacity, observation_space, action_space, device="cpu")

    def ready_row(self, rows: Rows, index: int) -> Any:
        one = slice(index, index + 1)
        return (
            rows.observations[one],
            rows.next_observations[one],
            rows.actions[one],
            rows.rewards[one],
            rows.terminated[one],
            [{}],
        )

    def ready_rows(self, rows: Rows) -> Any:
        return [self.ready_row(rows, index) for index in range(len(rows.rewards))]

    def insert(self, row: Any) -> object:
        return self.buffer.add(*row)

    def insert_many(self, rows: Any) -> object:
        for row in rows:
            self.buffer.add(*row)
        return None

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def handles(self, batch: Any) -> Any:
        raise TypeError("Stable-Baselines3 has no priorities")

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        raise TypeError("Stable-Baselines3 has no priorities")

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return td_errors

    def update(self, handles: Any, td_errors: Any) -> object:
        raise TypeError("Stable-Baselines3 has no priorities")

    def arrays(self, batch: Any) -> Sampled:
        return Sampled(
            indices=None,
            observations=batch.observations.numpy(),
            actions=batch.actions.numpy(),
            rewards=batch.rewards.numpy()[:, 0],
            next_observations=batch.next_observations.numpy(),
            terminated=batch.dones.numpy()[:, 0] != 0,
            weights=None,
        )


class TorchRL:
    """TorchRL's prioritised replay; the TensorDict objects to insert stand ready."""

    name = "torchrl"
    prioritized = True
    gives = "torch"
    exponent = 0.6

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH) -> None:
        logging.getLogger("torchrl").setLevel(logging.ERROR)
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

        self.dictionary, self.capacity, self.shape = TensorDict, capacity, shape
        storage = LazyTensorStorage(capacity)
        if self.prioritized:
            import torchrl._torchrl  # noqa: F401 - its failure says why there are no priorities

            self.buffer = TensorDictPrioritizedReplayBuffer(
                alpha=self.exponent, beta=0.4, storage=storage, priority_key="td_error"
            )
        else:
            self.buffer = TensorDictReplayBuffer(storage=storage)

    def _dictionary(self, rows: Rows, which: int | slice) -> Any:
        count = [] if isinstance(which, int) else [len(rows.rewards[which])]
        tensors = [torch.as_tensor(array[which]) for array in rows]
        observation, action, reward, next_observation, terminated = tensors
        following = {
            "observation": next_observation,
            "reward": reward[..., None],
            "terminated": terminated[..., None],
        }
        return self.dictionary({"observation": observation, "action": action, "next": following}, count)

    def ready_row(self, rows: Rows, index: int) -> Any:
        return self._dictionary(rows, index)

    def ready_rows(self, rows: Rows) -> Any:
        return self._dictionary(rows, slice(None))

    def insert(self, row: Any) -> object:
        return self.buffer.add(row)

    def insert_many(self, rows: Any) -> object:
        return self.buffer.extend(rows)

    def sample(self, batch: int) -> Any:
        return self.buffer.sample(batch)

    def handles(self, batch: Any) -> Any:
        return batch["index"]

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        return torch.from_numpy(numbers % self.capacity)

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return torch.from_numpy(td_errors)

    def update(self, handles: Any, td_errors: Any) -> object:
        return self.buffer.update_priority(handles, td_errors)

    def arrays(self, batch: Any) -> Sampled:
        weights = batch.get("priority_weight", batch.get("_weight", None)) if self.prioritized else None
        return Sampled(
            indices=batch["index"].numpy(),
            observations=batch["observation"].numpy(),
            actions=batch["action"].numpy(),
            rewards=batch["next", "reward"].numpy()[:, 0],
            next_observations=batch["next", "observation"].numpy(),
            terminated=batch["next", "terminated"].numpy()[:, 0],
            weights=None if weights is None else weights.numpy(),
        )


class TorchRLUniform(TorchRL):
    """TorchRL's uniform replay."""

    prioritized = False


KINDS: tuple[Kind, ...] = (
    Cpprb,
    CpprbUniform,
    Tianshou,
    TianshouUniform,
    StableBaselines3,
    TorchRL,
    TorchRLUniform,
)


def in_short(failure: BaseException) -> str:
    """The first line of what a failure says, not too long and without this machine's folders."""
    text = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    text = re.sub(r"/\S*/", "", text)
    return text if len(text) <= 200 else text[:200] + " ..."


def why_not(kind: Kind, attempt: Callable[[Kind], object]) -> str | None:
    """One line saying why a peer fails an attempt, in whatever way of its own; None when it does not."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            attempt(kind)
    except Exception as failure:
        return f"{getattr(kind, '__name__', kind)}: {in_short(failure)}"
    return None


def available(
    attempt: Callable[[Kind], object],
) -> tuple[list[Kind], list[str]]:
    """The peers that import, can be made and pass ``attempt``, and a line for each other saying why not."""
    reasons = [(kind, why_not(kind, attempt)) for kind in KINDS]
    return [kind for kind, why in reasons if why is None], [why for _, why in reasons if why is not None]
