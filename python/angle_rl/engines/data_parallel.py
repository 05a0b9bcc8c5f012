"""Networks in torch's DistributedDataParallel: what of an update goes through it, and what processes agree on.

Every process takes the same updates on batches of its own. States hold the network inside, so acting, targets and
checkpoints are those of one process; only a loss that is to be descended is computed through the wrapper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


class _Computation(nn.Module):
    """A function where a wrapper has its network; that is inside, so that its buffers are found."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def taken_out(networks: dict[str, nn.Module | None]) -> tuple[dict[str, Any], dict[str, DistributedDataParallel]]:
    """The networks, those in a wrapper without it, and the wrappers, by name.

    ValueError where some learn in a wrapper and others do not: these would part from process to process.
    """
    wrappers = {name: network for name, network in networks.items() if isinstance(network, DistributedDataParallel)}
    bare = networks.keys() - wrappers.keys()
    if wrappers and bare:
        raise ValueError(f"{min(wrappers)} is in DistributedDataParallel and {min(bare)} is not; pass both in it")
    inside = {name: wrappers[name].module if name in wrappers else network for name, network in networks.items()}
    return inside, wrappers


def check_device(wrappers: dict[str, DistributedDataParallel], device: torch.device) -> None:
    """ValueError where a network in a wrapper is elsewhere: it cannot be moved any more."""
    for name, wrapper in wrappers.items():
        for parameter in wrapper.module.parameters():
            if parameter.device.type != device.type or device.index not in (None, parameter.device.index):
                raise ValueError(f"{name} is in DistributedDataParallel on {parameter.device}; the device is {device}")


def through(wrapper: DistributedDataParallel | None, compute: Callable[[], Result]) -> Result:
    """``compute()``, whose result's backward pass leaves the mean gradients over all processes in the network.

    The wrapper prepares for a backward pass in its own `forward` only, and losses are made of other calls, such as
    `sample_actions`. So the whole computation takes the network's place in one call of the wrapper.
    """
    if wrapper is None:
        return compute()
    network = wrapper.module
    wrapper.module = _Computation(network)
    try:
        result: Result = wrapper(compute)
    finally:
        wrapper.module = network
    return result


def everywhere(wrapper: DistributedDataParallel | None, holds: bool) -> bool:
    """Whether something holds in all processes. All have to ask."""
    if wrapper is None:
        return holds
    flag = torch.tensor(int(holds), device=next(wrapper.module.parameters()).device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=wrapper.process_group)
    return bool(flag)


def averaged(wrapper: DistributedDataParallel | None, value: Tensor) -> Tensor:
    """A tensor without gradient: its mean over all processes. All have to ask."""
    if wrapper is None:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total, group=wrapper.process_group)
    return total / torch.distributed.get_world_size(wrapper.process_group)
