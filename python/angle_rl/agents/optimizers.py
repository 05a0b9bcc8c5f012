"""The optimisers of the agents' networks: Adam and AdamW, made without what torch would import for them."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch

from angle_rl.config import Hyperparameters


def adam(
    parameters: Any, learning_rate: float, *, kind: str = "adam", weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) in its fused form, the fastest there is on CPU and CUDA.

    `kind` "adamw": with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return without_compiler(make, parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def without_compiler(make: type[torch.optim.Optimizer], *arguments: Any, **options: Any) -> torch.optim.Optimizer:
    """``make(*arguments, **options)``, which by itself would import torch's compiler: a second's work, and not needed.

    Torch keeps its compiler out of `add_param_group` by a wrapper that imports it first. As long as nothing has, there
    is none to keep out: the new object calls what is wrapped, until it is made. With the compiler there already, and
    where the wrapper is none or not torch's own, this is the plain call.
    """
    add = make.add_param_group
    wrapped = getattr(add, "__wrapped__", None)
    by_torch = getattr(add, "__globals__", {}).get("__name__") == "torch._compile"
    if wrapped is None or not by_torch or "torch._dynamo" in sys.modules:
        return make(*arguments, **options)
    optimizer = make.__new__(make)
    vars(optimizer)["add_param_group"] = MethodType(wrapped, optimizer)
    make.__init__(optimizer, *arguments, **options)
    del vars(optimizer)["add_param_group"]
    return optimizer


def network_optimizer(
    network: torch.nn.Module, learning_rate: float, hyperparameters: Hyperparameters
) -> torch.optim.Optimizer:
    """The optimiser that the config asks for, of a network's parameters."""
    return adam(
        network.parameters(),
        learning_rate,
        kind=hyperparameters.optimizer,
        weight_decay=hyperparameters.weight_decay,
    )


def moments_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    """An optimiser's tensors by parameter and slot, not copied: the "state" of its ``state_dict()``.

    That method's first call would import torch's compiler, which takes a second.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {index: optimizer.state.get(parameter, {}) for index, parameter in enumerate(parameters)}
    return {index: slots for index, slots in found.items() if slots}
