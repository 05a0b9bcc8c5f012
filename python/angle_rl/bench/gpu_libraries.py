"""Replays whose rows are on a device, in the form that ``libraries`` asks for: ours, and TorchRL's."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from angle_rl import device as devices
from angle_rl.bench import libraries, peers, replay_atari
from angle_rl.bench.rows import HALFCHEETAH, Rows, Sampled, Shape

OURS, TORCHRL, TORCHRL_HOST_TREE = "angle", "torchrl", "torchrl-host-tree"
PAGE = Shape("4 KB", 509, 5)  # 4,096 bytes of numbers a row
AT_ONCE = 1 << 19  # rows made at a time


class There(NamedTuple):
    """``Rows`` as tensors on a device."""

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminated: torch.Tensor


def make_there(numbers: torch.Tensor, shape: Shape = HALFCHEETAH) -> There:
    """What ``rows.make_rows`` makes of these numbers, on their device."""
    column = torch.arange(3, 3 + shape.observation, device=numbers.device)
    observations = ((numbers[:, None] * column) % 251).to(torch.float32) / 256
    observations[:, 0] = (numbers % 4096).to(torch.float32)
    observations[:, 1] = (numbers // 4096).to(torch.float32)
    actions = ((numbers[:, None] * column[: shape.action]) % 127).to(torch.float32) / 64 - 1
    return There(observations, actions, (numbers % 1021).to(torch.float32), observations + 0.5, numbers % 1000 == 999)


def chunks_there(count: int, shape: Shape, device: torch.device) -> Iterator[There]:
    """Rows 0 to `count` in order, a chunk of at most 1 GiB at a time."""
    step = min(AT_ONCE, max(1, 2**30 // (8 * shape.payload)))
    for first in range(0, count, step):
        yield make_there(torch.arange(first, min(first + step, count), device=device), shape)


def _on_host(batch: Any) -> Any:
    """A batch of plain columns with its tensors in host memory."""
    return batch._replace(**{name: tensor.cpu() for name, tensor in batch._asdict().items()})


class Angle(libraries.Angle):
    """Ours on a device."""

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH, **arguments: Any) -> None:
        super().__init__(capacity, shape, device="cuda", **arguments)

    def update(self, handles: Any, td_errors: Any) -> object:
        return self.buffer.update_priorities(handles, td_errors)

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return torch.from_numpy(td_errors).to(devices.memory_device("cuda"))

    def ready_there(self, rows: There) -> Any:
        """Rows that are on the device, in the form that ``insert_many`` takes."""
        return tuple(rows)

    def arrays(self, batch: Any) -> Sampled:
        return super().arrays(_on_host(batch))


class AtariAngle(replay_atari.Angle):
    """Ours with frames on a device."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, device="cuda")

    def arrays(self, batch: Any) -> Any:
        return super().arrays(_on_host(batch))


class TorchRL(peers.TorchRL):
    """TorchRL's prioritised replay with its rows on a device, and the trees there, too, where its build has such."""

    name = TORCHRL
    tree: str | None = None  # where the trees are to be; None: TorchRL's own choice, which is where the rows are

    def __init__(self, capacity: int, shape: Shape = HALFCHEETAH) -> None:
        logging.getLogger("torchrl").setLevel(logging.ERROR)
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

        self.dictionary, self.capacity, self.shape = TensorDict, capacity, shape
        self.device = devices.memory_device("cuda")
        where = {} if self.tree is None else {"device": self.tree}
        if "device" not in inspect.signature(PrioritizedSampler).parameters:
            where = {}  # a version whose trees are always in host memory
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(capacity, device=self.device),
            sampler=PrioritizedSampler(capacity, alpha=self.exponent, beta=0.4, **where),
            priority_key="td_error",
        )

    def require_tree(self) -> None:
        """RuntimeError unless the trees are where the rows are. To be asked when rows have been drawn."""
        sampler: Any = self.buffer.sampler
        place = getattr(sampler, "device", None)
        if place is None or torch.device(place).type != self.device.type:
            raise RuntimeError(f"the trees are on {place}, not on {self.device}: this TorchRL knows no trees there")

    def ready_there(self, rows: There) -> Any:
        """Rows that are on the device, as a TensorDict there."""
        following = {
            "observation": rows.next_observations,
            "reward": rows.rewards[:, None],
            "terminated": rows.terminated[:, None],
        }
        values = {"observation": rows.observations, "action": rows.actions, "next": following}
        return self.dictionary(values, [len(rows.rewards)], device=self.device)

    def ready_rows(self, rows: Rows) -> Any:
        return super().ready_rows(rows).to(self.device)

    def ready_row(self, rows: Rows, index: int) -> Any:
        return super().ready_row(rows, index).to(self.device)

    def handles_of(self, numbers: npt.NDArray[np.int64]) -> Any:
        return super().handles_of(numbers).to(self.device)

    def ready_errors(self, td_errors: npt.NDArray[np.float32]) -> Any:
        return torch.from_numpy(td_errors).to(self.device)

    def arrays(self, batch: Any) -> Sampled:
        return super().arrays(batch.cpu())


class TorchRLHostTree(TorchRL):
    """The same with the trees in host memory, for builds of TorchRL without trees on devices."""

    name = TORCHRL_HOST_TREE
    tree = "cpu"
